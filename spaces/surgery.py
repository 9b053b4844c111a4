"""Slice a model along a plan, in a copy: the user's model is never changed."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from .copying import collector_paused, copy_model
from .groups import Kept, Layout, Owner, Structure, groups_in
from .huggingface import follow_config
from .sizes import set_size

#: For some dimensions in order, the elements that stay.
Chosen = list[tuple[int, NDArray[np.int64]]]
#: By tensor, dimensions and what their elements are multiplied with.
Factors = Mapping[str, list[tuple[int, NDArray[np.float64]]]]


def elements(layout: Layout, kept: Kept) -> NDArray[np.bool_]:
    """Which elements of a dimension stay: an element of a product goes when any of its factors' units goes."""
    parts = []
    for term in layout:
        mask = np.ones(1, dtype=bool)
        for factor in term:
            units = kept[factor] if factor >= 0 else np.ones(-factor, dtype=bool)
            mask = np.logical_and.outer(mask, units).reshape(-1)
        parts.append(mask)
    return np.concatenate(parts) if parts else np.zeros(0, dtype=bool)


def kept_elements(structure: Structure, kept: Kept, tensor: str, dim: int) -> NDArray[np.int64]:
    """Which elements of the dense dimension the candidate's consists of, in the candidate's order (ascending)."""
    return np.flatnonzero(elements(structure.tensors[tensor][dim], kept))


def slice_model(
    model: nn.Module, structure: Structure, kept: Kept, replaced: Mapping[str, torch.Tensor] | None = None
) -> nn.Module:
    """One candidate; see :class:`Slicer`, which makes many."""
    return Slicer(model, structure)(kept, replaced)


class Slicer:
    """Makes candidates of one model, from several threads if need be.

    A candidate owns only the kept slices, with every size attribute set. Those on the CPU share one allocation, which
    lives as long as any of them: large allocations come in huge pages, which the kernel clears several times faster.
    """

    def __init__(self, model: nn.Module, structure: Structure) -> None:
        self._model, self._structure = model, structure
        self._recipe: Recipe | None = None

    def __call__(self, kept: Kept, replaced: Mapping[str, torch.Tensor] | None = None) -> nn.Module:
        """``replaced``: tensors of the candidate's shapes, by name, that take the place of slices.

        Raises:
            ValueError: a tensor of ``replaced`` has another shape than the slice.
        """
        with collector_paused():
            return self._slice(kept, replaced or {})

    def _slice(self, kept: Kept, replaced: Mapping[str, torch.Tensor]) -> nn.Module:
        recipe = self._recipe
        if recipe is None or not recipe.is_of_now():
            recipe = self._recipe = write_recipe(self._model, self._structure)
        picks = [_pick(layout, kept) for layout in recipe.layouts]
        memo: dict[int, Any] = {}
        with torch.no_grad():
            _slice_tensors(recipe, picks, _factors(self._structure, kept), kept, replaced, memo)
        candidate = copy_model(self._model, memo)
        modules: dict[str, Any] = {name: memo.get(id(module)) for name, module in recipe.modules.items()}
        if None in modules.values():  # below a module that copies itself
            modules = dict(candidate.named_modules())
        for name, attribute, slot in recipe.sites:
            set_size(modules[name], attribute, recipe.width(slot, picks))
        for name in recipe.sized:
            _follow_weight(modules[name])
        _take_out(modules, self._structure, kept)
        follow_config(self._model, candidate, self._structure, kept)
        return candidate


#: The elements of a dimension that stay; None for all.
Pick = NDArray[np.int64] | None


@dataclass(frozen=True)
class _Sliced:
    """A parameter or buffer: where the model holds it, and the layouts of those of its dimensions that can shrink."""

    name: str
    holder: dict[str, torch.Tensor]
    key: str
    dims: tuple[tuple[int, int], ...]
    owners: tuple[Owner, ...]


@dataclass(frozen=True)
class Recipe:
    """What is the same for all candidates. Layouts are numbered: many tensors share one."""

    layouts: tuple[Layout, ...]
    sizes: tuple[int, ...]
    tensors: tuple[_Sliced, ...]
    modules: dict[str, nn.Module]
    #: Every module's place in its parent.
    places: tuple[tuple[dict[str, Any], str, nn.Module], ...]
    sites: tuple[tuple[str, str, int], ...]
    #: Modules that keep sizes beside their weights.
    sized: tuple[str, ...]

    def is_of_now(self) -> bool:
        """Whether the model still consists of the same modules."""
        return all(children.get(key) is module for children, key, module in self.places)

    def width(self, slot: int, picks: Sequence[Pick]) -> int:
        pick = picks[slot]
        return self.sizes[slot] if pick is None else len(pick)


def write_recipe(model: nn.Module, structure: Structure) -> Recipe:
    slots: dict[Layout, int] = {}

    def slot(layout: Layout) -> int:
        return slots.setdefault(layout, len(slots))

    modules = dict(model.named_modules())
    tensors = []
    for name in tensors_of(model):
        path, _, key = name.rpartition(".")
        holder: Any = modules[path]._parameters if key in modules[path]._parameters else modules[path]._buffers
        layouts = enumerate(structure.tensors[name])
        dims = tuple((dim, slot(layout)) for dim, layout in layouts if groups_in(layout))
        tensors.append(_Sliced(name, holder, key, dims, structure.owners[name]))
    sites = tuple((name, attribute, slot(layout)) for name, attribute, layout in structure.sites)
    return Recipe(
        tuple(slots),
        tuple(_dense_size(structure, layout) for layout in slots),
        tuple(tensors),
        modules,
        tuple((m._modules, key, child) for m in modules.values() for key, child in m._modules.items()),
        sites,
        tuple(name for name, module in modules.items() if isinstance(module, _SIZED)),
    )


def _pick(layout: Layout, kept: Kept) -> Pick:
    mask = kept[layout[0][0]] if len(layout) == len(layout[0]) == 1 and layout[0][0] >= 0 else elements(layout, kept)
    return None if mask.all() else np.flatnonzero(mask)


#: What numpy takes elements of a type for. Of others (complex numbers, quantised ones) torch makes the slices.
_CARRIERS = {dtype: dtype for dtype in (torch.float32, torch.float64, torch.float16, torch.bool, torch.uint8)}
_CARRIERS |= {dtype: dtype for dtype in (torch.int8, torch.int16, torch.int32, torch.int64)}
_CARRIERS |= {torch.bfloat16: torch.int16}
_CARRIERS |= dict.fromkeys((torch.float8_e4m3fn, torch.float8_e5m2), torch.uint8)
_STANDARD = (nn.Parameter, torch.Tensor)
#: Bytes: what vector instructions and caches like, what is sliced in one go, and what is worth a thread.
_ALIGNMENT, _CHUNK = 64, 1 << 18
_PER_THREAD = 1 << 23


def _slice_tensors(
    recipe: Recipe,
    picks: Sequence[Pick],
    factors: Factors,
    kept: Kept,
    replaced: Mapping[str, torch.Tensor],
    memo: dict[int, Any],
) -> None:
    """Put the candidate's parameters and buffers into ``memo``, by the ids of the model's."""
    jobs: list[tuple[str, torch.Tensor, Chosen, list[int], int]] = []
    end = 0
    for sliced in recipe.tensors:
        tensor = sliced.holder[sliced.key]
        if sliced.owners and any(_is_gone(owner, kept) for owner in sliced.owners):
            memo[id(tensor)] = tensor  # its module is about to be taken out
            continue
        chosen = [(dim, pick) for dim, slot in sliced.dims if (pick := picks[slot]) is not None]
        shape = list(tensor.shape)
        for dim, pick in chosen:
            shape[dim] = len(pick)
        if sliced.name in replaced:
            part = _fitting(sliced.name, replaced[sliced.name], tensor, shape)
        elif tensor.dtype in _CARRIERS and _is_plain(tensor):
            jobs.append((sliced.name, tensor, chosen, shape, end))
            end += -(-math.prod(shape) * tensor.itemsize // _ALIGNMENT) * _ALIGNMENT
            continue
        else:
            part = _selected(tensor, chosen)
        memo[id(tensor)] = _owned(_scaled(part, sliced.name, chosen, factors), tensor)
    storage = _allocate(end)
    parts = [
        ((source := _array(tensor)), np.ndarray(shape, source.dtype, storage, start), chosen)
        for _, tensor, chosen, shape, start in jobs
    ]
    _gather_all(parts, end)
    for (name, tensor, chosen, _, _), (_, array, _) in zip(jobs, parts, strict=True):
        memo[id(tensor)] = _owned(_scaled(_tensor(array, tensor.dtype), name, chosen, factors), tensor)


def _is_plain(tensor: torch.Tensor) -> bool:
    """Whether numpy can take elements of its memory."""
    return tensor.is_cpu and tensor.is_contiguous() and type(tensor) in _STANDARD and tensor.numel() > 0


def _array(tensor: torch.Tensor) -> NDArray[Any]:
    """The same memory for numpy, as integers where numpy does not know the type."""
    carrier = _CARRIERS[tensor.dtype]
    array: NDArray[Any] = (tensor if carrier is tensor.dtype else tensor.view(carrier)).numpy()
    return array


def _tensor(array: NDArray[Any], dtype: torch.dtype) -> torch.Tensor:
    tensor = torch.from_numpy(array)
    if tensor.dtype is dtype:
        return tensor
    # Not view(), which autograd would remember.
    return torch.empty(0, dtype=dtype).set_(tensor.untyped_storage(), 0, tensor.shape, tensor.stride())


def _allocate(size: int) -> NDArray[np.uint8]:
    """``size`` bytes, aligned; from numpy, which asks the kernel for huge pages."""
    storage = np.empty(size + _ALIGNMENT, dtype=np.uint8)
    skipped = -storage.ctypes.data % _ALIGNMENT
    return storage[skipped : skipped + size]


def _gather_all(parts: list[tuple[NDArray[Any], NDArray[Any], Chosen]], size: int) -> None:
    threads = min(torch.get_num_threads(), size // _PER_THREAD)
    large = [] if threads < 2 else [item for item in parts if item[1].nbytes > _CHUNK]
    if large:
        with ThreadPoolExecutor(threads) as pool:
            for done in [pool.submit(_gather, *item) for item in sorted(large, key=lambda item: -item[1].nbytes)]:
                done.result()
    for item in parts:
        if not large or item[1].nbytes <= _CHUNK:
            _gather(*item)


def _gather(source: NDArray[Any], part: NDArray[Any], chosen: Chosen) -> None:
    """Copy the chosen elements of ``source`` to ``part``.

    A convolution's kernels are long enough to be looked up one by one; single elements are taken from whole rows that
    were copied before, in pieces that stay in the cache.
    """
    # Every index is valid; of the modes that write to their place at once, "wrap" is the fastest.
    if not chosen:
        np.copyto(part, source)
    elif len(chosen) == 1:
        ((dim, pick),) = chosen
        source.take(pick, dim, out=part, mode="wrap")
    elif len(chosen) == 2 and math.prod(source.shape[2:]) > 1 and [dim for dim, _ in chosen] == [0, 1]:
        (_, rows), (_, columns) = chosen
        kernels = (rows[:, None] * source.shape[1] + columns).reshape(-1)
        inner = source.shape[2:]
        source.reshape(-1, *inner).take(kernels, 0, out=part.reshape(-1, *inner), mode="wrap")
    else:
        _gather_rows(source, part, chosen)


def _gather_rows(source: NDArray[Any], part: NDArray[Any], chosen: Chosen) -> None:
    (first, rows), *others = chosen if chosen[0][0] == 0 else [(0, np.arange(len(source))), *chosen]
    *between, (last, pick) = others
    step = max(1, _CHUNK // max(1, source[0].nbytes))
    for start in range(0, len(rows), step):
        piece = source.take(rows[start : start + step], first)
        for dim, indices in between:
            piece = piece.take(indices, dim)
        piece.take(pick, last, out=part[start : start + step], mode="wrap")


def _selected(tensor: torch.Tensor, chosen: Chosen) -> torch.Tensor:
    part = tensor.detach()
    for dim, pick in chosen:
        part = part.index_select(dim, torch.from_numpy(pick).to(part.device))
    return part


def _fitting(name: str, given: torch.Tensor, original: torch.Tensor, shape: list[int]) -> torch.Tensor:
    if list(given.shape) != shape:
        raise ValueError(f"the tensor for {name} must have shape {tuple(shape)}, not {tuple(given.shape)}")
    return given.detach().to(original.device, original.dtype, copy=True)


def _scaled(part: torch.Tensor, name: str, chosen: Chosen, factors: Factors) -> torch.Tensor:
    """``part`` times the factors of its elements along the dimensions that have some."""
    for dim, values in factors.get(name, ()):
        rows = dict(chosen).get(dim)
        row_values = torch.from_numpy(values if rows is None else values[rows]).to(part)
        part = part * row_values.view([-1 if d == dim else 1 for d in range(part.dim())])
    return part


def mask_model(model: nn.Module, structure: Structure, kept: Kept) -> nn.Module:
    """A copy of ``model`` of dense shapes in which the removed slices, and all of removed blocks, are zero."""
    masked = copy_model(model)
    with torch.no_grad():
        for name, tensor in tensors_of(masked).items():
            if any(_is_gone(owner, kept) for owner in structure.owners[name]):
                tensor.zero_()
                continue
            for dim, layout in enumerate(structure.tensors[name]):
                gone = torch.from_numpy(~elements(layout, kept)).to(tensor.device)
                if gone.any():
                    tensor.masked_fill_(gone.view([-1 if d == dim else 1 for d in range(tensor.dim())]), 0)
    return masked


def tensors_of(model: nn.Module) -> dict[str, torch.Tensor]:
    """Every parameter and buffer once, by its first name, persistent or not."""
    return dict([*model.named_parameters(), *model.named_buffers()])


def _is_gone(owner: Owner, kept: Kept) -> bool:
    group, unit = owner
    return not kept[group][unit]


def _owned(part: torch.Tensor, original: torch.Tensor) -> torch.Tensor:
    part = part.clone() if part.data_ptr() == original.data_ptr() else part
    if isinstance(original, nn.Parameter):
        return nn.Parameter(part, requires_grad=original.requires_grad)
    return part


def row_factors(structure: Structure, kept: Kept) -> dict[tuple[str, int], NDArray[np.float64]]:
    """What the elements of parameter dimensions, as long as in the dense model, are multiplied with, where an
    attention's scale would change."""
    factors: dict[tuple[str, int], NDArray[np.float64]] = {}
    for scale in structure.scales:
        mask = elements(scale.head_dim, kept)
        if mask.all():
            continue
        for tensor, dim in scale.parameters:
            length = _dense_size(structure, structure.tensors[tensor][dim])
            held = factors.setdefault((tensor, dim), np.ones(length))
            held[list(scale.rows)] = np.sqrt(mask.mean())
    return factors


def _factors(structure: Structure, kept: Kept) -> Factors:
    by_tensor: dict[str, list[tuple[int, NDArray[np.float64]]]] = {}
    for (name, dim), values in sorted(row_factors(structure, kept).items()) if structure.scales else ():
        by_tensor.setdefault(name, []).append((dim, values))
    return by_tensor


def _dense_size(structure: Structure, layout: Layout) -> int:
    return sum(math.prod([_size(structure, factor) for factor in term]) for term in layout)


def _size(structure: Structure, factor: int) -> int:
    return structure.groups[factor].size if factor >= 0 else -factor


def _take_out(modules: Mapping[str, nn.Module], structure: Structure, kept: Kept) -> None:
    """Remove layers from their containers, and put substitutes in the place of parts of layers."""
    for group, mask in zip(structure.groups, kept, strict=True):
        gone = [unit for unit in range(group.size) if not mask[unit]] if group.blocks else []
        for unit in gone:
            parent, _, key = group.blocks[unit].rpartition(".")
            if group.substitutes is not None:
                modules[parent]._modules[key] = copy.deepcopy(group.substitutes[unit]).train(modules[""].training)
            else:
                del modules[parent]._modules[key]
        if gone and group.substitutes is None:
            renumber(modules[group.blocks[0].rpartition(".")[0]])


def renumber(container: nn.Module) -> None:
    """Containers count their modules; Hugging Face layers know their place for the cache of keys and values."""
    remaining = list(container._modules.items())
    if all(key.isdigit() for key, _ in remaining):
        before = kept_blocks(container)
        vars(container)[KEPT_BLOCKS] = tuple(before[int(key)] if before else int(key) for key, _ in remaining)
        container._modules.clear()
        container._modules.update({str(place): module for place, (_, module) in enumerate(remaining)})
    for place, module in enumerate(container._modules.values()):
        for part in module.modules() if module is not None else ():
            if type(getattr(part, "layer_idx", None)) is int:
                part.layer_idx = place  # type: ignore[assignment]


#: Attribute of a container that lost blocks: which of the dense model's it still has.
KEPT_BLOCKS = "kept_blocks"


def kept_blocks(container: nn.Module) -> tuple[int, ...] | None:
    """Places in the dense model of what ``container`` holds; None if nothing was taken out."""
    found: tuple[int, ...] | None = vars(container).get(KEPT_BLOCKS)
    return found


def dense_names(model: nn.Module) -> dict[str, str]:
    """For every module of a pruned model, its name in the dense one."""
    names = {"": ""}
    for name, module in model.named_modules():
        kept = kept_blocks(module)
        for key in module._modules:
            dense = key if kept is None else str(kept[int(key)])
            names[f"{name}.{key}".lstrip(".")] = f"{names[name]}.{dense}".lstrip(".")
    return names


#: Modules that keep sizes beside their weights.
_SIZED = (
    *(nn.modules.batchnorm._NormBase, nn.modules.conv._ConvNd, nn.Linear, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm),
    *(nn.Embedding, nn.PReLU),
)


def _follow_weight(module: nn.Module) -> None:
    """Set the sizes that standard modules keep beside their weights."""
    weight = module._parameters["weight"] if "weight" in module._parameters else getattr(module, "weight", None)
    if isinstance(module, nn.modules.batchnorm._NormBase):
        reference = weight if weight is not None else module.running_mean
        if reference is not None:
            _set(module, "num_features", len(reference))
    elif weight is None:
        return
    elif isinstance(module, nn.modules.conv._ConvTransposeNd):
        _set(module, "in_channels", weight.shape[0])
        _set(module, "out_channels", weight.shape[1] * module.groups)
    elif isinstance(module, nn.modules.conv._ConvNd):
        _set(module, "out_channels", weight.shape[0])
        _set(module, "in_channels", weight.shape[1] * module.groups)
    elif isinstance(module, nn.Linear):
        _set(module, "out_features", weight.shape[0])
        _set(module, "in_features", weight.shape[1])
    elif isinstance(module, nn.GroupNorm):
        _set(module, "num_channels", len(weight))
    elif isinstance(module, nn.LayerNorm | nn.RMSNorm):
        _set(module, "normalized_shape", tuple(weight.shape))
    elif isinstance(module, nn.Embedding):
        _set(module, "embedding_dim", weight.shape[1])
    elif isinstance(module, nn.PReLU):
        _set(module, "num_parameters", len(weight))


def _set(module: nn.Module, attribute: str, value: int | tuple[int, ...]) -> None:
    """An assignment that skips what modules check for parameters and buffers: there are hundreds in a candidate."""
    object.__setattr__(module, attribute, value)
