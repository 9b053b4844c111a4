"""Slice a model along a plan, in a copy: the user's model is never changed."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from .groups import Layout, Structure

Kept = list[NDArray[np.bool_]]


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
    for name, tensor in tensors_of(model).items():
        part = tensor.detach()
        for dim, layout in enumerate(structure.tensors[name]):
            mask = elements(layout, kept)
            if not mask.all():
                part = part.index_select(dim, torch.from_numpy(np.flatnonzero(mask)).to(part.device))
        memo[id(tensor)] = _owned(part, tensor)
    candidate = copy.deepcopy(model, memo)
    _set_integers(candidate, structure, kept)
    return candidate


def mask_model(model: nn.Module, structure: Structure, kept: Kept) -> nn.Module:
    """A copy of ``model`` of dense shapes in which the removed slices are zero."""
    masked = copy.deepcopy(model)
    with torch.no_grad():
        for name, tensor in tensors_of(masked).items():
            for dim, layout in enumerate(structure.tensors[name]):
                gone = torch.from_numpy(np.flatnonzero(~elements(layout, kept))).to(tensor.device)
                if len(gone):
                    tensor.index_fill_(dim, gone, 0)
    return masked


def tensors_of(model: nn.Module) -> dict[str, torch.Tensor]:
    """Every parameter and buffer once, by its first name, persistent or not."""
    return dict([*model.named_parameters(), *model.named_buffers()])


def _owned(part: torch.Tensor, original: torch.Tensor) -> torch.Tensor:
    part = part.clone() if part.data_ptr() == original.data_ptr() else part
    if isinstance(original, nn.Parameter):
        return nn.Parameter(part, requires_grad=original.requires_grad)
    return part


def _set_integers(candidate: nn.Module, structure: Structure, kept: Kept) -> None:
    modules = dict(candidate.named_modules())
    for name, attribute, layout in structure.sites:
        setattr(modules[name], attribute, int(elements(layout, kept).sum()))
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
    elif isinstance(module, nn.LayerNorm):
        module.normalized_shape = tuple(weight.shape)
    elif isinstance(module, nn.Embedding):
        module.embedding_dim = weight.shape[1]
    elif isinstance(module, nn.PReLU):
        module.num_parameters = len(weight)
