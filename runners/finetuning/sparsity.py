"""Training that makes units small together, so that a search afterwards finds more to remove.

``groups``: the group lasso on what is removed together with every unit, whole filters and the columns that they feed
(Wen et al. 2016, Learning Structured Sparsity; over coupled layers as in Fang et al. 2023, DepGraph). ``bn_scale``: the
l1 norm of the scales of BatchNorm (Liu et al. 2017, Network Slimming). Both as subgradients, added after the loss's
gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from ...spaces import discover
from ...spaces.calibration import batch_norms
from ...spaces.errors import ConfigError, EmptySpaceError
from ...spaces.inputs import Inputs
from ...spaces.units import positions

KINDS = ("groups", "bn_scale")
#: Units whose norm is below this have no direction left to shrink in.
GONE = 1e-8


def make_penalty(model: nn.Module, kind: str, weight: float, inputs: Inputs) -> Callable[[], None]:
    """A function that adds the gradient of the penalty, times ``weight``, to those of the parameters of ``model``.

    Raises:
        ConfigError: there is nothing to make sparse.
    """
    if kind == "bn_scale":
        scales = [norm.weight for norm in batch_norms(model) if norm.weight is not None and norm.weight.requires_grad]
        if not scales:
            raise ConfigError("finetune.sparsity_kind=bn_scale: the model has no BatchNorm with scales; use groups")
        return lambda: _shrink_scales(scales, weight)
    units = units_of(model, inputs)
    return lambda: _shrink_units(units, weight)


@dataclass(frozen=True)
class Part:
    """Elements of dimension ``dim`` of a parameter by unit: ``places (units, elements of a unit)``."""

    parameter: nn.Parameter
    dim: int
    places: torch.Tensor


def units_of(model: nn.Module, inputs: Inputs) -> list[list[Part]]:
    """By group, the kernels and matrices that its units are parts of.

    Raises:
        ConfigError: nothing in the model can be removed.
    """
    try:
        space = discover(model, inputs.args if not inputs.kwargs else dict(inputs.kwargs), proof="shapes")
    except EmptySpaceError as error:
        raise ConfigError(f"finetune.sparsity_kind=groups: {error}") from error
    parameters = dict(model.named_parameters())
    found = []
    for index, group in enumerate(space.groups):
        parts = [
            Part(
                parameter,
                member.dim,
                positions(space._structure, member.tensor, member.dim, index).to(parameter.device),
            )
            for member in group.members
            if (parameter := parameters.get(member.tensor)) is not None
            and parameter.dim() > 1
            and parameter.requires_grad
        ]
        if parts:
            found.append(parts)
    return found


def unit_norms(parts: list[Part]) -> torch.Tensor:
    """Euclidean norm of every unit, ``(units,)``."""
    return torch.stack([_elements(part)[part.places].sum(1) for part in parts]).sum(0).sqrt()


def _elements(part: Part) -> torch.Tensor:
    """Sums of squares of every element of the dimension."""
    return part.parameter.detach().movedim(part.dim, 0).flatten(1).float().square().sum(1)


@torch.no_grad()
def _shrink_units(groups: list[list[Part]], weight: float) -> None:
    for parts in groups:
        norms = unit_norms(parts)
        pull = torch.where(norms > GONE, weight / norms.clamp_min(GONE), torch.zeros_like(norms))
        for part in parts:
            parameter, dim = part.parameter, part.dim
            by_element = torch.zeros(parameter.shape[dim], device=parameter.device)
            by_element.index_add_(0, part.places.flatten(), pull.repeat_interleave(part.places.shape[1]))
            shape = [-1 if position == dim else 1 for position in range(parameter.dim())]
            if parameter.grad is not None:
                parameter.grad.add_((by_element.view(shape) * parameter).to(parameter.grad.dtype))


@torch.no_grad()
def _shrink_scales(scales: list[nn.Parameter], weight: float) -> None:
    for scale in scales:
        if scale.grad is not None:
            scale.grad.add_(weight * scale.sign())
