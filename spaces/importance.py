"""Which units of a group matter least: one score a unit, low goes first."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from .errors import ConfigError
from .groups import Group, Structure

Scores = NDArray[np.float64]


def l1(tensor: torch.Tensor) -> torch.Tensor:
    """Absolute weights (Li et al. 2016, Pruning Filters for Efficient ConvNets)."""
    return tensor.abs()


def l2(tensor: torch.Tensor) -> torch.Tensor:
    """Squared weights (He et al. 2018, Soft Filter Pruning)."""
    return tensor.square()


def unit_scores(model: nn.Module, structure: Structure, criterion: str, seed: int = 0) -> list[Scores]:
    """Importance of every unit of every group.

    Raises:
        ConfigError: ``criterion`` is not one of :data:`CRITERIA`.
    """
    if criterion not in CRITERIA:
        raise ConfigError(f"unknown importance {criterion!r}; expected one of {', '.join(CRITERIA)}")
    if criterion == "random":
        generator = np.random.default_rng(seed)
        return [generator.random(group.size) for group in structure.groups]
    tensors = {name: tensor.detach() for name, tensor in model.named_parameters()}
    if any(tensor.is_meta for tensor in tensors.values()):
        return [np.arange(group.size, 0, -1.0) for group in structure.groups]  # no numbers: the first ones stay
    scale_names = _normalisation_scales(model) if criterion == "bn_scale" else set()
    return [_score(i, g, structure, tensors, criterion, scale_names) for i, g in enumerate(structure.groups)]


def _score(
    index: int, group: Group, structure: Structure, tensors: dict[str, torch.Tensor], criterion: str, scales: set[str]
) -> Scores:
    """Mean over the group's members of each unit's weight magnitude, every member relative to its own mean.

    Of a block: the mean magnitude of its parameters.
    """
    if group.blocks:
        return np.array([_block_score(block, tensors, criterion) for block in group.blocks])
    function: Callable[[torch.Tensor], torch.Tensor] = l2 if criterion == "l2" else l1
    members = [m for m in group.members if m.tensor in tensors]
    chosen = [m for m in members if m.tensor in scales] or [m for m in members if tensors[m.tensor].dim() > 1]
    total = np.zeros(group.size)
    for member in chosen or members:
        tensor = tensors[member.tensor]
        magnitudes = function(tensor if tensor.dtype == torch.float64 else tensor.float())
        others = [dim for dim in range(tensor.dim()) if dim != member.dim]
        values = magnitudes.sum(others, dtype=torch.float64) if others else magnitudes.double()
        scores = _per_unit(values.cpu().numpy(), structure.tensors[member.tensor][member.dim], index, structure)
        total += scores / max(scores.mean(), 1e-30)
    return total


def _block_score(block: str, tensors: dict[str, torch.Tensor], criterion: str) -> float:
    function = l2 if criterion == "l2" else l1
    held = [tensor for name, tensor in tensors.items() if name.startswith(f"{block}.") and tensor.dim() > 1]
    return float(np.mean([function(tensor.float()).mean().item() for tensor in held])) if held else 0.0


def _per_unit(values: Scores, layout: tuple[tuple[int, ...], ...], index: int, structure: Structure) -> Scores:
    """Add up the elements of a dimension that belong to each unit of group ``index``."""
    total, offset = np.zeros(structure.groups[index].size), 0
    for term in layout:
        shape = [structure.groups[f].size if f >= 0 else -f for f in term]
        length = int(np.prod(shape)) if shape else 1
        if index in term:
            part = np.moveaxis(values[offset : offset + length].reshape(shape), term.index(index), 0)
            total += part.reshape(len(total), -1).sum(1)
        offset += length
    return total


def _normalisation_scales(model: nn.Module) -> set[str]:
    """Scale factors of BatchNorm layers (Liu et al. 2017, Network Slimming)."""
    norms = (nn.modules.batchnorm._BatchNorm,)
    return {f"{name}.weight" for name, m in model.named_modules() if isinstance(m, norms)}


CRITERIA = ("l1", "l2", "bn_scale", "random")
