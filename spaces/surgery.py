"""Slice a model along a plan, in a copy: the user's model is never changed."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from .copying import copy_model
from .groups import Kept, Layout, Owner, Structure
from .huggingface import follow_config
from .sizes import set_size


def elements(layout: Layout, kept: Kept) -> NDArray[np.bool_]:
    """Which elements of a dimension stay: an element of a product goes when any of its factors' units goes."""
    parts = []
    for term in layout:
        mask = np.ones(1, dtype=bool)
        for factor in term:
            units = kept[factor] if factor >= 0 else np.ones(-factor, dtype=bool)
            mask = np.logical_and.outer(mask, units).reshape(-1)
        parts.append(mask)
    return np.concatenate(parts)


def slice_model(model: nn.Module, structure: Structure, kept: Kept) -> nn.Module:
    """A copy of ``model`` that owns only the kept slices, with every size attribute set."""
    memo: dict[int, Any] = {}
    factors = _scale_factors(structure, kept)
    for name, tensor in tensors_of(model).items():
        if any(_is_gone(owner, kept) for owner in structure.owners[name]):
            memo[id(tensor)] = tensor  # its module is about to be taken out
            continue
        part = tensor.detach()
        for dim, layout in enumerate(structure.tensors[name]):
            mask = elements(layout, kept)
            rows = torch.from_numpy(np.flatnonzero(mask)).to(part.device)
            if not mask.all():
                part = part.index_select(dim, rows)
            if (name, dim) in factors:
                shape = [-1 if d == dim else 1 for d in range(part.dim())]
                part = part * torch.from_numpy(factors[name, dim][mask]).to(part).view(shape)
        memo[id(tensor)] = _owned(part, tensor)
    candidate = copy_model(model, memo)
    _set_integers(candidate, structure, kept)
    _take_out(candidate, structure, kept)
    follow_config(model, candidate, structure, kept)
    return candidate


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


def _scale_factors(structure: Structure, kept: Kept) -> dict[tuple[str, int], NDArray[np.float64]]:
    """What the rows of parameter dimensions are multiplied with, where an attention's scale would change."""
    factors: dict[tuple[str, int], NDArray[np.float64]] = {}
    for scale in structure.scales:
        mask = elements(scale.head_dim, kept)
        if mask.all():
            continue
        for tensor, dim in scale.parameters:
            length = sum(int(np.prod([_size(structure, f) for f in t])) for t in structure.tensors[tensor][dim])
            held = factors.setdefault((tensor, dim), np.ones(length))
            held[list(scale.rows)] = np.sqrt(mask.mean())
    return factors


def _size(structure: Structure, factor: int) -> int:
    return structure.groups[factor].size if factor >= 0 else -factor


def _take_out(candidate: nn.Module, structure: Structure, kept: Kept) -> None:
    """Remove layers from their containers, and put substitutes in the place of parts of layers."""
    modules = dict(candidate.named_modules())
    for group, mask in zip(structure.groups, kept, strict=True):
        gone = [unit for unit in range(group.size) if not mask[unit]] if group.blocks else []
        for unit in gone:
            parent, _, key = group.blocks[unit].rpartition(".")
            if group.substitutes is not None:
                modules[parent]._modules[key] = copy.deepcopy(group.substitutes[unit]).train(candidate.training)
            else:
                del modules[parent]._modules[key]
        if gone and group.substitutes is None:
            _renumber(modules[group.blocks[0].rpartition(".")[0]])


def _renumber(container: nn.Module) -> None:
    """Containers count their modules; Hugging Face layers know their place for the cache of keys and values."""
    remaining = list(container._modules.items())
    if all(key.isdigit() for key, _ in remaining):
        container._modules.clear()
        container._modules.update({str(place): module for place, (_, module) in enumerate(remaining)})
    for place, module in enumerate(container._modules.values()):
        for part in module.modules() if module is not None else ():
            if type(getattr(part, "layer_idx", None)) is int:
                part.layer_idx = place  # type: ignore[assignment]


def _set_integers(candidate: nn.Module, structure: Structure, kept: Kept) -> None:
    modules = dict(candidate.named_modules())
    for name, attribute, layout in structure.sites:
        set_size(modules[name], attribute, int(elements(layout, kept).sum()))
    for module in modules.values():
        _follow_weight(module)


def _follow_weight(module: nn.Module) -> None:
    """Set the sizes that standard modules keep beside their weights."""
    weight = getattr(module, "weight", None)
    if isinstance(module, nn.modules.batchnorm._NormBase):
        reference = weight if weight is not None else module.running_mean
        module.num_features = len(reference) if reference is not None else module.num_features
    elif weight is None:
        return
    elif isinstance(module, nn.modules.conv._ConvTransposeNd):
        module.in_channels, module.out_channels = weight.shape[0], weight.shape[1] * module.groups
    elif isinstance(module, nn.modules.conv._ConvNd):
        module.out_channels, module.in_channels = weight.shape[0], weight.shape[1] * module.groups
    elif isinstance(module, nn.Linear):
        module.out_features, module.in_features = weight.shape
    elif isinstance(module, nn.GroupNorm):
        module.num_channels = len(weight)
    elif isinstance(module, nn.LayerNorm | nn.RMSNorm):
        module.normalized_shape = tuple(weight.shape)
    elif isinstance(module, nn.Embedding):
        module.embedding_dim = weight.shape[1]
    elif isinstance(module, nn.PReLU):
        module.num_parameters = len(weight)
