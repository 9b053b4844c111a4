"""Every group proves itself: the sliced candidate must equal the masked dense model."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map

from .groups import Structure
from .surgery import Kept, mask_model, slice_model
from .trace import evaluating

#: Largest difference relative to the largest output, in double precision: far above rounding, far below any error.
TOLERANCE = 1e-9


class Prover:
    """Compares candidates with masked models in double precision."""

    def __init__(self, model: nn.Module, example_inputs: tuple[Any, ...]) -> None:
        self._model = copy.deepcopy(model).double()
        self._inputs = tree_map(_to_double, example_inputs)

    def failure(self, structure: Structure, names: list[str]) -> str | None:
        """Why half of the units of the groups ``names`` cannot be removed together; None when they can.

        Both halves are tried, so that every unit is removed once.
        """
        for half in (0, 1):
            kept = _halved(structure, names, half)
            if reason := self._compare(structure, kept, all(g.exact for g in structure.groups if g.name in names)):
                return reason
        return None

    def _compare(self, structure: Structure, kept: Kept, exact: bool) -> str | None:
        expected = self._run(mask_model(self._model, structure, kept))
        try:
            actual = self._run(slice_model(self._model, structure, kept))
        except Exception as error:  # whatever the user's forward raises on the pruned shapes
            return f"the pruned model fails: {type(error).__name__}: {error}"
        for left, right in zip(expected, actual, strict=True):
            if left.shape != right.shape:
                return f"the pruned model's output has shape {tuple(right.shape)} instead of {tuple(left.shape)}"
            if not torch.isfinite(right).all():
                return "the pruned model's output is not finite"
            difference, scale = (left - right).abs().max().item(), left.abs().max().item()
            if exact and difference > TOLERANCE * max(scale, 1e-300):
                return f"the pruned model differs from the masked one by {difference / max(scale, 1e-300):.1e}"
        return None

    def _run(self, model: nn.Module) -> list[torch.Tensor]:
        return [leaf.double() for leaf in outputs_of(model, self._inputs)]


def outputs_of(model: nn.Module, inputs: tuple[Any, ...]) -> list[torch.Tensor]:
    """The tensors that ``model`` returns in evaluation mode, with the same random numbers every time."""
    with evaluating(model), torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        output = model(*inputs)
    return [leaf for leaf in tree_leaves(output) if isinstance(leaf, torch.Tensor)]


def _halved(structure: Structure, names: list[str], half: int) -> Kept:
    generator = np.random.default_rng(0)
    kept = []
    for group in structure.groups:
        mask = np.ones(group.size, dtype=bool)
        if group.name in names:
            order = generator.permutation(group.size)
            removed = order[: group.size // 2] if half == 0 else order[group.size - (group.size + 1) // 2 :]
            mask[removed[: group.size - 1]] = False
        kept.append(mask)
    return kept


def _to_double(leaf: Any) -> Any:
    return leaf.double() if isinstance(leaf, torch.Tensor) and leaf.is_floating_point() else leaf
