"""Criteria that look at weights alone."""

from __future__ import annotations

from collections.abc import Callable, Collection

import numpy as np
import torch
from torch import nn

from ..groups import Group, Member
from ..units import by_unit, positions
from .evidence import Evidence, Scores

#: Rows of a matrix of distances that are held at once.
CHUNK = 1024

_Tensors = dict[str, torch.Tensor]
_Magnitude = Callable[[torch.Tensor], torch.Tensor]


def random(evidence: Evidence) -> list[Scores]:
    """Drawn with the seed: the baseline that any other criterion has to beat."""
    generator = np.random.default_rng(evidence.seed)
    return [generator.random(group.size) for group in evidence.structure.groups]


def l1(evidence: Evidence) -> list[Scores]:
    """Sum of absolute weights (Li et al. 2016, Pruning Filters for Efficient ConvNets)."""
    return [_magnitudes(evidence, index, torch.abs) for index in range(len(evidence.structure.groups))]


def l2(evidence: Evidence) -> list[Scores]:
    """Sum of squared weights (He et al. 2018, Soft Filter Pruning)."""
    return [l2_of(evidence, index) for index in range(len(evidence.structure.groups))]


def l2_of(evidence: Evidence, index: int) -> Scores:
    """:func:`l2` of the group ``index``."""
    return _magnitudes(evidence, index, torch.square)


def bn_scale(evidence: Evidence) -> list[Scores]:
    """Absolute scale factors of BatchNorm layers (Liu et al. 2017, Network Slimming); ``l1`` of groups without any."""
    norms = nn.modules.batchnorm._BatchNorm
    scales = {f"{name}.weight" for name, m in evidence.model.named_modules() if isinstance(m, norms)}
    return [_magnitudes(evidence, index, torch.abs, scales) for index in range(len(evidence.structure.groups))]


def fpgm(evidence: Evidence) -> list[Scores]:
    """Sum of Euclidean distances to the weights of all other units.

    What is near the geometric median can be replaced by the others (He et al. 2019, Filter Pruning via Geometric
    Median). ``l2`` of blocks, which have no common shape, and of two units, which are equally far from each other.
    """
    return [
        l2_of(evidence, index) if group.blocks or group.size < 3 else _distances(evidence, index)
        for index, group in enumerate(evidence.structure.groups)
    ]


def _magnitudes(evidence: Evidence, index: int, magnitude: _Magnitude, preferred: Collection[str] = ()) -> Scores:
    """Sum over the group's members of each unit's magnitude, every member relative to its own mean.

    Of a block: the mean magnitude of its parameters. Members in ``preferred`` alone are taken where there are any.
    """
    group, tensors = evidence.structure.groups[index], _parameters(evidence.model)
    if group.blocks:
        return np.array([_of_block(block, tensors, magnitude) for block in group.blocks])
    total = np.zeros(group.size)
    for member in _members(group, tensors, preferred):
        tensor = tensors[member.tensor]
        values = magnitude(tensor if tensor.dtype == torch.float64 else tensor.float())
        others = [dim for dim in range(tensor.dim()) if dim != member.dim]
        sums = values.sum(others, dtype=torch.float64) if others else values.double()
        total += _relative(by_unit(sums.cpu(), positions(evidence.structure, member.tensor, member.dim, index)))
    return total


def _distances(evidence: Evidence, index: int) -> Scores:
    group, tensors = evidence.structure.groups[index], _parameters(evidence.model)
    total = np.zeros(group.size)
    for member in _members(group, tensors):
        tensor = tensors[member.tensor]
        places = positions(evidence.structure, member.tensor, member.dim, index).to(tensor.device)
        vectors = tensor.movedim(member.dim, 0)[places].reshape(group.size, -1)
        vectors = vectors if tensor.dtype == torch.float64 else vectors.float()
        sums = [torch.cdist(part, vectors).sum(1, dtype=torch.float64) for part in vectors.split(CHUNK)]
        total += _relative(torch.cat(sums).cpu())
    return total


def _members(group: Group, tensors: _Tensors, preferred: Collection[str] = ()) -> list[Member]:
    """Parameters with more than one dimension where there are any: a bias says little about what its unit does."""
    members = [member for member in group.members if member.tensor in tensors]
    chosen = [member for member in members if member.tensor in preferred]
    return chosen or [member for member in members if tensors[member.tensor].dim() > 1] or members


def _of_block(block: str, tensors: _Tensors, magnitude: _Magnitude) -> float:
    held = [tensor for name, tensor in tensors.items() if name.startswith(f"{block}.") and tensor.dim() > 1]
    return float(np.mean([magnitude(tensor.float()).mean().item() for tensor in held])) if held else 0.0


def _parameters(model: nn.Module) -> _Tensors:
    return {name: tensor.detach() for name, tensor in model.named_parameters()}


def _relative(scores: torch.Tensor) -> Scores:
    values: Scores = scores.numpy()
    return values / max(values.mean(), 1e-30)
