"""Which elements of a tensor's dimension the units of a group are made of."""

from __future__ import annotations

import numpy as np
import torch

from .groups import Structure


def positions(structure: Structure, tensor: str, dim: int, group: int) -> torch.Tensor:
    """Elements of dimension ``dim`` of ``tensor`` by unit of ``group``: ``(units, elements of a unit)``."""
    parts, offset = [np.empty((structure.groups[group].size, 0), dtype=np.int64)], 0
    for term in structure.tensors[tensor][dim]:
        shape = [structure.groups[factor].size if factor >= 0 else -factor for factor in term]
        length = int(np.prod(shape))
        if group in term:
            places = offset + np.arange(length).reshape(shape)
            parts.append(np.moveaxis(places, term.index(group), 0).reshape(structure.groups[group].size, -1))
        offset += length
    return torch.from_numpy(np.concatenate(parts, axis=1))


def columns(places: torch.Tensor, kernel: int) -> torch.Tensor:
    """Columns of a consumer by unit, for inputs at ``places (units, elements)`` with ``kernel`` columns each."""
    return (places[:, :, None] * kernel + torch.arange(kernel, device=places.device)).flatten(1)


def by_unit(values: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """Sums of ``values (..., elements)`` over the elements of each unit: ``(..., units)``."""
    return values[..., places.to(values.device)].sum(-1)
