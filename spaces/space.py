"""The space of one model: its groups, and everything a plan can be turned into."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from .cost import Cost, CostModel
from .errors import ConfigError, EmptySpaceError, PlanError
from .groups import Frozen, Group, Structure, build_structure, freeze_group
from .importance import unit_scores
from .plan import Plan
from .proof import Prover
from .surgery import Kept, mask_model, slice_model
from .trace import Trace, record

logger = logging.getLogger(__name__)


class Space:
    """What may be removed from a model. Made by :func:`discover`; the model must not change shape afterwards."""

    def __init__(self, model: nn.Module, structure: Structure, importance: str, round_to: int, seed: int) -> None:
        self._model = model
        self._structure = structure
        self.importance, self.round_to, self.seed = importance, round_to, seed
        self._position = {group.name: index for index, group in enumerate(structure.groups)}
        self.sizes = np.array([group.size for group in structure.groups], dtype=np.int64)
        self._cost = CostModel(model, structure)
        scores = unit_scores(model, structure, importance, seed)
        self._order = [np.argsort(-score, kind="stable") for score in scores]
        self.fingerprint = self._fingerprint()

    @property
    def groups(self) -> tuple[Group, ...]:
        return self._structure.groups

    @property
    def frozen(self) -> tuple[Frozen, ...]:
        return self._structure.frozen

    @property
    def model(self) -> nn.Module:
        """The dense model."""
        return self._model

    def plan(self, widths: Mapping[str, int]) -> Plan:
        """The plan that keeps the ``widths[name]`` most important units; groups that are not named stay whole.

        Raises:
            PlanError: an unknown group, or a width that is not in 1..size.
        """
        if unknown := set(widths) - set(self._position):
            raise PlanError(f"unknown groups {sorted(unknown)}; this space has {', '.join(self._position)}")
        kept = {}
        for group, order in zip(self.groups, self._order, strict=True):
            width = widths.get(group.name, group.size)
            if isinstance(width, bool) or not isinstance(width, int | np.integer) or not 1 <= width <= group.size:
                raise PlanError(f"width of {group.name} must be a whole number in 1..{group.size}, not {width!r}")
            kept[group.name] = order[:width]
        return Plan.of(kept)

    def uniform(self, ratio: float, kinds: Iterable[str] | None = None) -> Plan:
        """Remove the share ``ratio`` of the units of every group (of the given ``kinds``).

        Widths are rounded to ``round_to``, at least one step, and below the full width when ``ratio`` > 0 and the
        group has more than one step.
        """
        if not 0 <= ratio < 1:
            raise PlanError(f"ratio must be in [0, 1), not {ratio!r}")
        chosen = {group.kind for group in self.groups} if kinds is None else set(kinds)
        if unknown := chosen - {"channel", "neuron"}:
            raise PlanError(f"unknown kinds {sorted(unknown)}; expected channel, neuron")
        return self.plan({g.name: self.round_width(g, (1 - ratio) * g.size) for g in self.groups if g.kind in chosen})

    def round_width(self, group: Group, width: float) -> int:
        """The nearest allowed width: a multiple of ``round_to`` (or the full size only when ``width`` reaches it)."""
        position = self._position[group.name]
        widths = self.sizes.astype(float)
        widths[position] = width
        return int(self.round_widths(widths)[position])

    def cost(self, plan: Plan) -> Cost:
        return self._cost(np.array([len(units) for units in self._units(plan)]))

    def cost_batch(self, widths: NDArray[np.integer]) -> NDArray[np.float64]:
        """Costs of many plans at once: ``widths (plans, groups)`` to ``(plans, 4)``, columns as in :class:`Cost`."""
        return self._cost.batch(widths)

    def smallest_widths(self) -> NDArray[np.int64]:
        """The smallest allowed width of every group, shape ``(groups,)``."""
        return self.round_widths(np.zeros(len(self.groups)))

    def next_widths(self, widths: NDArray[np.integer]) -> NDArray[np.int64]:
        """The next larger allowed width of every group; the same where it is whole already."""
        return np.minimum((widths // self.round_to + 1) * self.round_to, self.sizes)

    def round_widths(self, widths: NDArray[np.float64]) -> NDArray[np.int64]:
        """:meth:`round_width` of arrays ``(..., groups)``."""
        sizes = self.sizes
        step = np.minimum(self.round_to, sizes)
        rounded = np.maximum(step, np.round(widths / step) * step)
        below = np.maximum((sizes - 1) // step * step, 0)
        rounded = np.where(rounded >= sizes, np.where(below > 0, below, sizes), rounded)
        return np.where(widths >= sizes, sizes, rounded).astype(np.int64)

    @property
    def dense_cost(self) -> Cost:
        return self._cost(self.sizes)

    def apply(self, plan: Plan) -> nn.Module:
        """A really smaller model with its own parameters, ready to train."""
        return slice_model(self._model, self._structure, self._kept(plan))

    def mask(self, plan: Plan) -> nn.Module:
        """A model of dense shapes in which what the plan removes is zero."""
        return mask_model(self._model, self._structure, self._kept(plan))

    def _units(self, plan: Plan) -> list[tuple[int, ...]]:
        kept = dict(plan.kept)
        if set(kept) != set(self._position):
            raise PlanError("the plan belongs to another space: its groups differ")
        for group in self.groups:
            units = kept[group.name]
            if not units or units[-1] >= group.size:
                raise PlanError(f"the plan keeps units of {group.name} outside 0..{group.size - 1}, or none")
        return [kept[group.name] for group in self.groups]

    def _kept(self, plan: Plan) -> Kept:
        masks = [np.zeros(group.size, dtype=bool) for group in self.groups]
        for mask, units in zip(masks, self._units(plan), strict=True):
            mask[list(units)] = True
        return masks

    def _fingerprint(self) -> str:
        layouts = sorted((name, layout) for name, layout in self._structure.tensors.items())
        groups = [(group.name, group.size) for group in self.groups]
        return hashlib.sha256(json.dumps([groups, layouts]).encode()).hexdigest()[:16]


def discover(
    model: nn.Module, example_inputs: Any, *, importance: str = "l1", round_to: int = 1, seed: int = 0
) -> Space:
    """Find and prove what may be removed from ``model``, which is not changed.

    ``example_inputs`` is a tensor or the tuple of arguments of one forward pass; costs refer to these inputs.

    Raises:
        TraceError: the model rejects the inputs or its output is not finite.
        EmptySpaceError: nothing can be pruned; the message says why.
        ConfigError: unknown importance, or round_to below 1.
    """
    if round_to < 1:
        raise ConfigError(f"round_to must be at least 1, not {round_to}")
    inputs = example_inputs if isinstance(example_inputs, tuple) else (example_inputs,)
    trace = record(model, inputs)
    structure = _prove(model, inputs, trace)
    if not structure.groups:
        reasons = "; ".join(f"{frozen.name}: {frozen.reason}" for frozen in structure.frozen[:5])
        raise EmptySpaceError(f"nothing in this model can be pruned ({reasons or 'no weights were used'})")
    return Space(model, structure, importance, round_to, seed)


def _prove(model: nn.Module, inputs: tuple[Any, ...], trace: Trace) -> Structure:
    """Try all exact groups together, then each alone if that fails; inexact groups each alone."""
    prover = Prover(model, inputs)
    structure = build_structure(trace)
    exact = [group.name for group in structure.groups if group.exact]
    suspects = [group.name for group in structure.groups if not group.exact]
    if prover.failure(structure, exact) is not None:
        suspects += exact
    failures = {name: reason for name in suspects if (reason := prover.failure(structure, [name]))}
    # Positions shift as groups freeze: freeze by name from the last to the first.
    for name in sorted(failures, key=[group.name for group in structure.groups].index, reverse=True):
        logger.warning("group %s is left out: %s", name, failures[name])
        freeze_group(trace, structure, name, f"failed its proof: {failures[name]}")
    structure = build_structure(trace)
    names = [group.name for group in structure.groups if group.exact]
    if failures and prover.failure(structure, names) is not None:
        raise EmptySpaceError(f"the groups of this model hold alone but not together: {', '.join(names)}")
    return structure
