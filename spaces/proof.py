"""Every group proves itself: the sliced candidate must equal the masked dense model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import nn

from .copying import copy_model
from .devices import all_cuda_devices, device_of
from .errors import ModelError
from .groups import Kept, Structure
from .huggingface import from_config
from .inputs import Inputs, output_tensors
from .modes import EagerMode
from .surgery import mask_model, slice_model
from .trace import evaluating, keeping_buffers

#: Largest difference relative to the largest output that pruning changes, in double precision: far above rounding, far
#: below any error.
TOLERANCE = 1e-9
#: Shares of the units of a group that are removed, and of how many groups of one size each gets its own width.
SHARES, FEW = (0.25, 0.75), 3
#: Of groups of so few units any number may be removed.
SMALL = 16


class Prover:
    """Compares candidates with masked models in double precision.

    Without numbers (``shapes_only``: meta tensors, or a model too large for a copy in double precision) only the shapes
    of the candidates' outputs are checked. ``uniform``: a candidate must also be what its configuration says, so that a
    Hugging Face model can be loaded again from it.
    """

    def __init__(self, model: nn.Module, inputs: Inputs, shapes_only: bool, uniform: bool) -> None:
        self._shapes_only, self._uniform = shapes_only, uniform
        #: What the whole model gives, by whether normalisations count nothing.
        self._dense: dict[bool, list[torch.Tensor]] = {}
        if shapes_only:
            self._model, self._inputs = on_meta(model), inputs.map(_to_meta)
        else:
            self._model, self._inputs = _copied(model).double(), inputs.map(_to_double)
            _stir(self._model)

    def failures(self, structure: Structure, dimensions: Iterable[Sequence[str]]) -> dict[str, str]:
        """Why groups cannot be removed, by name; all others can, together and each alone.

        ``dimensions``: names of groups that are removed together. All are tried at once. If that fails they are added
        in halves, so that a few that fail among many are found in a few runs, and groups that hold alone but not
        together are told apart by the order of the model.
        """
        accepted: list[str] = []
        found: dict[str, str] = {}
        groups = {group.name: group for group in structure.groups}
        phases: dict[tuple[bool, bool], list[Sequence[str]]] = {}
        for names in dimensions:
            # Exact ones first; inexact blocks come last: with them no numbers can be compared.
            inexact = not all(groups[name].exact for name in names)
            phases.setdefault((inexact, groups[names[0]].kind == "block"), []).append(names)
        for phase in sorted(phases):
            self._add(phases[phase], structure, accepted, found)
        return found

    def _add(
        self, dimensions: list[Sequence[str]], structure: Structure, accepted: list[str], found: dict[str, str]
    ) -> None:
        names = [name for tied in dimensions for name in tied]
        reason = self.failure(structure, [*accepted, *names])
        if reason is None:
            accepted += names
        elif len(dimensions) == 1:
            found |= dict.fromkeys(names, reason)
        else:
            middle = len(dimensions) // 2
            for part in (dimensions[:middle], dimensions[middle:]):
                self._add(part, structure, accepted, found)

    def failure(self, structure: Structure, names: list[str]) -> str | None:
        """Why about half of the units of the groups ``names`` cannot be removed together; None when they can.

        What the first run keeps is removed in the second, so that every unit is removed once. Groups of one size could
        hold only because they have one width: in one of the runs, any two have different ones.
        """
        exact = all(group.exact for group in structure.groups if group.name in names)
        for kept in _trials(structure, names, self._uniform):
            if reason := self._compare(structure, kept, exact):
                return reason
        return None

    def _compare(self, structure: Structure, kept: Kept, exact: bool) -> str | None:
        comparable = Comparable(normalising=not exact)
        try:
            candidate = slice_model(self._model, structure, kept)
            with nullcontext() if self._shapes_only else comparable:
                actual = self._run(candidate)
            with Comparable(normalising=False):
                outputs = [] if exact or self._shapes_only else self._run(candidate)
        except Exception as error:  # whatever the user's forward raises on the pruned shapes
            return f"the pruned model fails: {type(error).__name__}: {error}"
        if self._uniform and (reason := self._differs_from_config(candidate)):
            return reason
        if self._shapes_only:
            return _differing_shapes(self._run(self._model), actual)
        if not all(bool(torch.isfinite(tensor).all()) for tensor in [*outputs, *actual]):
            return "the pruned model's output is not finite"
        masked = mask_model(self._model, structure, kept)
        with comparable, comparable.routing(masked, structure, kept):
            expected = self._run(masked)
        if reason := _differing_shapes(expected, actual):
            return reason
        if not _is_comparable(structure, kept):
            return None
        reason, is_changed = _differing_values(expected, actual, self._whole(exact))
        if reason is None and not is_changed and not self._responds:
            return "nothing in the output on the example inputs depends on weights: nothing can be compared"
        return reason

    @cached_property
    def _responds(self) -> bool:
        """Whether other weights give another output: dead activations do not, nor does a forward of another model."""
        other = copy_model(self._model)
        _stir(other, seed=1)
        return any(not torch.equal(*pair) for pair in zip(self._run(other), self._whole(True), strict=True))

    def _whole(self, exact: bool) -> list[torch.Tensor]:
        """What the whole model gives."""
        if exact not in self._dense:
            with Comparable(normalising=not exact):
                self._dense[exact] = self._run(self._model)
        return self._dense[exact]

    def _differs_from_config(self, candidate: nn.Module) -> str | None:
        """Why a new model of the candidate's configuration is not the candidate."""
        try:
            fresh = from_config(candidate)
        except Exception as error:  # whatever the model's class says about such sizes
            return f"its configuration makes no model: {type(error).__name__}: {error}"
        shapes = [{name: tuple(t.shape) for name, t in model.state_dict().items()} for model in (candidate, fresh)]
        if shapes[0] != shapes[1]:
            differing = sorted(name for name in shapes[0] | shapes[1] if shapes[0].get(name) != shapes[1].get(name))
            return f"its configuration makes a model of other shapes: {', '.join(differing[:3])}"
        if self._shapes_only:
            return None
        fresh.double().load_state_dict(candidate.state_dict())
        with Comparable(normalising=False):
            made = self._run(candidate)
            differing_values, _ = _differing_values(made, self._run(fresh), [torch.zeros_like(t) for t in made])
        return f"its configuration makes another model: {differing_values}" if differing_values else None

    def _run(self, model: nn.Module) -> list[torch.Tensor]:
        if self._shapes_only:
            return outputs_of(model, self._inputs)
        with _double_by_default():  # tensors that the forward makes
            return [_real(leaf).double() for leaf in outputs_of(model, self._inputs)]


def _copied(model: nn.Module) -> nn.Module:
    """Raises ModelError where the model holds what Python cannot copy."""
    try:
        return copy_model(model)
    except Exception as error:
        raise ModelError(
            f"the model cannot be copied: {type(error).__name__}: {error}; candidates are copies of it, so keep what "
            "cannot be copied out of its attributes, or give it a __deepcopy__"
        ) from error


class Comparable(EagerMode):
    """Runs a model so that a removed unit and a zero are the same thing, and in double precision throughout.

    Casts to a lower precision inside the forward would drown the comparison in rounding; they are left out.
    ``normalising``: layer, group and root mean square normalisation, means and variances depend on how many units there
    are, so that a sliced model differs from a masked one by nature. Here all of them divide by a constant instead: what
    is left to differ is a wrong slice.
    """

    #: Stands for the number of elements in every mean.
    COUNT = 64.0

    def __init__(self, normalising: bool) -> None:
        super().__init__()
        self.normalising = normalising
        self._experts: torch.Tensor | None = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        arguments = dict(kwargs or {})
        if arguments.get("dtype") in (torch.float32, torch.bfloat16, torch.float16):
            arguments["dtype"] = torch.float64
        name = func.overloadpacket.__name__
        if self._experts is not None and name in ("_softmax", "topk") and args[0].shape[-1] == len(self._experts):
            args = (args[0].masked_fill(~self._experts, -torch.inf), *args[1:])
        if name == "_grouped_mm":
            return _grouped_product(args[0], args[1], args[2] if len(args) > 2 else arguments["offs"])
        if self.normalising and name in _SURROGATES:
            return _SURROGATES[name](func, args, arguments)
        return func(*args, **arguments)

    @contextmanager
    def routing(self, masked: nn.Module, structure: Structure, kept: Kept) -> Iterator[None]:
        """Routers of ``masked`` do not choose removed experts: a zero weight alone would not keep them from it."""
        modules = dict(masked.named_modules())
        with ExitStack() as hooks:
            for group, mask in zip(structure.groups, kept, strict=True):
                if group.kind == "expert" and not mask.all():
                    module = modules[group.name.rpartition(".")[0]]
                    left = torch.from_numpy(mask).to(device_of(masked))
                    hooks.callback(module.register_forward_pre_hook(lambda *_, left=left: self._enter(left)).remove)
                    hooks.callback(module.register_forward_hook(lambda *_: self._enter(None)).remove)
            yield

    def _enter(self, experts: torch.Tensor | None) -> None:
        self._experts = experts


def _grouped_product(rows: torch.Tensor, weights: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """Rows up to the first end times the first matrix, and so on: the kernel has no double precision."""
    parts = torch.tensor_split(rows, ends[:-1].cpu().long())
    return torch.cat([part @ weight for part, weight in zip(parts, weights, strict=True)])


def _constant_norm(x: torch.Tensor, dims: list[int], weight: Any, bias: Any) -> torch.Tensor:
    """``x`` over the root of its sum of squares along ``dims``, as if there were always as many elements.

    Units whose weight is masked do not count: something behind the mask (a bias along another dimension, as in token
    mixing) may have given them values again.
    """
    x = x if weight is None else x * (weight != 0)
    scaled = x * torch.rsqrt(x.square().sum(dims, keepdim=True) / Comparable.COUNT + 1e-6)
    scaled = scaled if weight is None else scaled * weight
    return scaled if bias is None else scaled + bias


def _layer_norm(func: Any, args: Any, kwargs: Any) -> Any:
    x, shape, weight, bias = (*args, None, None)[:4]
    result = _constant_norm(x, list(range(-len(shape), 0)), weight, bias)
    return result, result.new_zeros(()), result.new_zeros(())


def _rms_norm(func: Any, args: Any, kwargs: Any) -> Any:
    x, shape, weight = (*args, None)[:3]
    result = _constant_norm(x, list(range(-len(shape), 0)), weight, None)
    return result, result.new_zeros(())


def _group_norm(func: Any, args: Any, kwargs: Any) -> Any:
    x, weight, bias, batch, channels, _, groups, _ = args
    shape = [1, channels, *[1] * (x.dim() - 2)]
    x = x if weight is None else x * (weight != 0).view(shape)
    result = _constant_norm(x.reshape(batch, groups, -1), [-1], None, None).reshape(x.shape)
    result = result if weight is None else result * weight.view(shape)
    result = result if bias is None else result + bias.view(shape)
    return result, result.new_zeros(()), result.new_zeros(())


def _mean(func: Any, args: Any, kwargs: Any) -> Any:
    return func(*args, **kwargs) * (_reduced_count(args) / Comparable.COUNT)


def _variance(func: Any, args: Any, kwargs: Any) -> Any:
    dims = args[1] if len(args) > 1 and not isinstance(args[1], bool) else None
    square = args[0].square().sum(dims, keepdim=kwargs.get("keepdim", False)) / Comparable.COUNT
    name = func.overloadpacket.__name__
    return square.sqrt() if name == "std" else (square, square * 0) if name == "var_mean" else square


def _reduced_count(args: Any) -> int:
    x, dims = args[0], args[1] if len(args) > 1 else None
    return x.numel() if dims is None or dims == [] else int(np.prod([x.shape[d] for d in np.atleast_1d(dims)]))


_SURROGATES = {
    "native_layer_norm": _layer_norm,
    "_fused_rms_norm": _rms_norm,
    "native_group_norm": _group_norm,
    "mean": _mean,
    **dict.fromkeys(("var", "std", "var_mean"), _variance),
}


def outputs_of(model: nn.Module, example_inputs: Any) -> list[torch.Tensor]:
    """The tensors that ``model`` returns in evaluation mode, with the same random numbers every time."""
    with evaluating(model), keeping_buffers(model), torch.no_grad(), torch.random.fork_rng(devices=all_cuda_devices()):
        torch.manual_seed(0)
        return output_tensors(Inputs.of(example_inputs).call(model))


def _stir(model: nn.Module, seed: int = 0) -> None:
    """Move all weights and BatchNorm statistics a little: the proof is about shapes and slices, and a classifier that
    starts at zero or a layer scale of 1e-6 would hide every error from it."""
    generator = torch.Generator().manual_seed(seed)

    def noise(tensor: torch.Tensor) -> torch.Tensor:
        return torch.randn(tensor.shape, generator=generator, dtype=torch.float32).to(tensor)

    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(noise(parameter), alpha=max(0.05, parameter.abs().mean().item()) / 4)
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_var is not None:
                variance: torch.Tensor = module.running_var
                if module.running_mean is not None:
                    module.running_mean.add_(variance.sqrt() / 4 * noise(variance))
                variance.mul_(1 + noise(variance).abs() / 2)


def on_meta(model: nn.Module) -> nn.Module:
    """A copy of ``model`` with shapes and no numbers."""
    memo: dict[int, Any] = {}
    for tensor in [*model.parameters(), *model.buffers()]:
        empty = tensor.detach().to("meta")
        memo[id(tensor)] = nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty
    return copy_model(model, memo)


def _is_comparable(structure: Structure, kept: Kept) -> bool:
    """A block with a normalisation behind its sum is not the identity when its branches are zero."""
    return all(g.exact or g.kind != "block" or mask.all() for g, mask in zip(structure.groups, kept, strict=True))


def _differing_shapes(expected: list[torch.Tensor], actual: list[torch.Tensor]) -> str | None:
    shapes = [[tuple(tensor.shape) for tensor in tensors] for tensors in (expected, actual)]
    return None if shapes[0] == shapes[1] else f"the pruned model's outputs have shapes {shapes[1]}, not {shapes[0]}"


def _differing_values(
    expected: list[torch.Tensor], actual: list[torch.Tensor], whole: list[torch.Tensor]
) -> tuple[str | None, bool]:
    """Why ``actual`` is not ``expected``, and whether that is another output than that of the ``whole`` model.

    What is the same there, such as the large negative number of a masked logit, is no measure of what differs.
    """
    is_changed = False
    for left, right, dense in zip(expected, actual, whole, strict=True):
        changed = left[left != dense] if left.shape == dense.shape else left.reshape(-1)
        is_changed |= changed.numel() > 0
        scale = changed.abs().max().item() if changed.numel() else 0.0
        difference = (left - right).abs().max().item() if left.numel() else 0.0
        if not difference <= TOLERANCE * scale:
            return f"the pruned model differs from the masked one by {difference / max(scale, 1e-300):.1e}", True
    return None, is_changed


@contextmanager
def _double_by_default() -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _real(tensor: torch.Tensor) -> torch.Tensor:
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor


def _trials(structure: Structure, names: list[str], uniform: bool) -> Iterator[Kept]:
    """Which units stay, run by run: a quarter to three quarters of each group ``names``, then the others of each.

    Groups of one size (kinds of them, with ``uniform``) get as many different widths as there are. More groups than
    that share some: these get different ones in a later run, and so on.
    """
    generator = np.random.default_rng(0)
    orders = [generator.permutation(group.size) for group in structure.groups]
    #: By size, the places of the groups among those of one size.
    places: dict[int, dict[Any, int]] = {}
    for group in structure.groups:
        if group.name in names:
            same = places.setdefault(group.size, {})
            same.setdefault((group.kind, group.size) if uniform else group.name, len(same))
    digits = max([_digits(len(same), len(_cuts(size))) for size, same in places.items()], default=1)
    are_few = any(len(same) > 1 and 0 in _cuts(size) for size, same in places.items())
    # The digit of a place that chooses its width, what is added to the place, whether the other units are removed. Of
    # groups that lose nothing, since there are few widths to choose from, others do in two more runs.
    runs = [(0, shift, others) for shift in range(1 + are_few) for others in (False, True)]
    runs += [(digit, 0, False) for digit in range(1, digits)]
    for digit, shift, others in runs:
        kept = []
        for group, order in zip(structure.groups, orders, strict=True):
            mask = np.ones(group.size, dtype=bool)
            if group.name in names:
                place = places[group.size][(group.kind, group.size) if uniform else group.name] + shift
                cuts = _cuts(group.size)
                cut = cuts[place // len(cuts) ** digit % len(cuts)]
                removed = order[cut:] if others and cut else order[:cut]
                mask[removed[: group.size - group.at_least]] = False
            kept.append(mask)
        yield kept


def _cuts(size: int) -> list[int]:
    """How many units may be removed of a group: about half first, and none too where there are few to choose from."""
    low, high = (1, size) if size <= SMALL else (round(share * size) for share in SHARES)
    cuts = sorted(range(low, min(high, size - 1) + 1), key=lambda cut: (abs(cut - size / 2), cut))
    return cuts if len(cuts) >= FEW else [*cuts, 0]


def _digits(count: int, base: int) -> int:
    """How many digits to ``base`` numbers below ``count`` have."""
    return 1 if count <= base or base < 2 else 1 + _digits(-(-count // base), base)


def _to_double(leaf: Any) -> Any:
    return leaf.double() if isinstance(leaf, torch.Tensor) and leaf.is_floating_point() else leaf


def _to_meta(leaf: Any) -> Any:
    return leaf.to("meta") if isinstance(leaf, torch.Tensor) else leaf
