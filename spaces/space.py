"""The space of one model: its groups, and everything a plan can be turned into."""

from __future__ import annotations

import hashlib
import json
import logging
import re
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from .calibration import Calibration
from .compensation import Compensation
from .cost import ALL_COSTS, CostModel
from .criteria import CRITERIA, Evidence, unit_scores
from .devices import device_of
from .equivalents import replace
from .errors import ConfigError, EmptySpaceError, PlanError
from .groups import Frozen, Group, Kept, Structure, build_structure, freeze_groups
from .huggingface import inexpressible
from .inputs import Inputs, argument_names
from .least_squares import lost_outputs
from .options import Options, check_kinds
from .plan import Cost, Plan, Ranking
from .proof import Prover
from .residual import find_stacks
from .surgery import Slicer, mask_model, tensors_of
from .trace import Trace, record
from .wrappers import check_model

logger = logging.getLogger(__name__)

PROOFS = ("auto", "full", "shapes")
#: ``criterion="auto"`` orders groups of up to so many units by reconstruction.
RECONSTRUCTED_UNITS = 1024
#: ``proof="auto"`` proves shapes alone above this: the full proof holds three copies in double precision.
FULL_PROOF_BYTES = 4 * 2**30


class Space:
    """What may be removed from a model. Made by :func:`discover`; the model must not change shape afterwards.

    A search sets one width a *dimension*: a group, or with ``uniform`` all groups of one kind and size. Arrays of
    widths are in the order of :attr:`dimensions`.
    """

    def __init__(
        self,
        model: nn.Module,
        prepared: nn.Module,
        structure: Structure,
        options: Options,
        criteria: Sequence[str],
        evidence: Evidence,
        compensation: Compensation,
        cost: CostModel,
        seconds: Mapping[str, float],
    ) -> None:
        self._model, self._prepared, self._structure = model, prepared, structure
        self.options, self.criteria, self._evidence = options, tuple(criteria), evidence
        self._compensation = compensation
        #: Seconds that discovery took: trace, proof, criteria.
        self.seconds = dict(seconds)
        self._position = {group.name: index for index, group in enumerate(structure.groups)}
        self._ties = _ties(structure.groups, options.uniform)
        #: Names of what a search sets a width for.
        self.dimensions = tuple(self._ties)
        self._dimension_of = np.zeros(len(structure.groups), dtype=np.intp)
        for dimension, members in enumerate(self._ties.values()):
            self._dimension_of[members] = dimension
        self._tied_names = [self.dimensions[dimension] for dimension in self._dimension_of]
        tied = self.tied_groups
        self.sizes = np.array([groups[0].size for groups in tied], dtype=np.int64)
        self._steps = np.array([max(options.step(group) for group in groups) for groups in tied], dtype=np.int64)
        bounds = [[options.bounds(group) for group in groups] for groups in tied]
        self._low = np.array([max(low for low, _ in pairs) for pairs in bounds], dtype=np.int64)
        self._high = np.array([min(high for _, high in pairs) for pairs in bounds], dtype=np.int64)
        if (self._low >= self.sizes).all():
            raise EmptySpaceError(
                "no width in this space can become smaller: lower round_to or min_ratio, or raise max_ratio"
            )
        self._cost = cost
        self._slicer = Slicer(prepared, structure)
        self._block_groups = [index for index, group in enumerate(structure.groups) if group.blocks]
        names = [group.name for group in structure.groups]
        started = time.perf_counter()
        self._rankings = {name: Ranking(names, _orders(unit_scores(name, evidence))) for name in self.criteria}
        self.seconds["criteria"] = time.perf_counter() - started
        self.fingerprint = self._fingerprint()

    def __repr__(self) -> str:
        kinds = Counter(group.kind for group in self.groups)
        counts = ", ".join(f"{count} {kind}" for kind, count in kinds.items())
        cost = self.dense_cost
        return f"Space(groups: {counts}; frozen: {len(self.frozen)}; dense: {cost.macs:,} MACs, {cost.params:,} params)"

    @property
    def groups(self) -> tuple[Group, ...]:
        return self._structure.groups

    @property
    def frozen(self) -> tuple[Frozen, ...]:
        return self._structure.frozen

    @property
    def tied_groups(self) -> list[list[Group]]:
        """The groups that share a width, in the order of :attr:`dimensions`."""
        return [[self.groups[index] for index in members] for members in self._ties.values()]

    @property
    def compensation(self) -> str:
        """What :meth:`apply` does to a candidate after slicing; see :mod:`.compensation`."""
        return self._compensation.method

    @property
    def repairs_in_two_efforts(self) -> bool:
        """Whether ``effort`` makes a difference to :meth:`apply`."""
        return self.compensation == "sequential"

    @property
    def repairs_nothing_by_choice(self) -> bool:
        """Whether ``compensation="none"`` was asked for."""
        return self._compensation.requested == "none"

    @property
    def calibration(self) -> Calibration | None:
        return self._evidence.calibration

    @property
    def model(self) -> nn.Module:
        """The dense model."""
        return self._model

    def plan(self, widths: Mapping[str, int], criterion: str | None = None) -> Plan:
        """The plan that keeps the ``widths[name]`` most important units; groups that are not named stay whole.

        Names are those of groups, or of :attr:`dimensions`. ``criterion``: one of :attr:`criteria`, or the first.

        Raises:
            PlanError: an unknown group or criterion, or a width that is not in 1..size.
        """
        if unknown := widths.keys() - self._position.keys() - self._ties.keys():
            raise PlanError(f"unknown groups {sorted(unknown)}; this space has {', '.join(self._position)}")
        chosen = []
        for group, tied in zip(self.groups, self._tied_names, strict=True):
            width = widths.get(group.name, widths.get(tied, group.size))
            valid = type(width) is int or (isinstance(width, int | np.integer) and not isinstance(width, bool))
            if not valid or not group.at_least <= width <= group.size:
                raise PlanError(
                    f"width of {group.name} must be a whole number in {group.at_least}..{group.size}, not {width!r}"
                )
            if width % group.multiple_of and width != group.size:
                raise PlanError(f"width of {group.name} must be a multiple of {group.multiple_of}, not {width}")
            chosen.append(int(width))
        return Plan.first(self._ranking(criterion), chosen)

    def uniform(self, ratio: float, kinds: Iterable[str] | None = None, criterion: str | None = None) -> Plan:
        """Remove the share ``ratio`` of the units of every group (of the given ``kinds``).

        Widths are rounded to ``round_to``, at least one step, and below the full width when ``ratio`` > 0 and the
        group has more than one step.
        """
        if not 0 <= ratio < 1:
            raise PlanError(f"ratio must be in [0, 1), not {ratio!r}")
        chosen = {group.kind for group in self.groups} if kinds is None else set(kinds)
        try:
            check_kinds(sorted(chosen))
        except ConfigError as error:
            raise PlanError(str(error)) from error
        widths = self.round_widths((1 - ratio) * self.sizes.astype(np.float64))
        by_group = zip(self.groups, widths[self._dimension_of], strict=True)
        chosen_widths = {group.name: int(width) for group, width in by_group if group.kind in chosen}
        return self.plan(chosen_widths, criterion)

    def cost(self, plan: Plan) -> Cost:
        ranking, widths = self._prefix(plan)
        if ranking is None:
            return self._cost(self._kept(plan))
        return self._cost.of_widths(widths, [ranking.ranks[i] < widths[i] for i in self._block_groups])

    def cost_batch(
        self, widths: NDArray[np.integer], criterion: str | None = None, columns: Sequence[int] = ALL_COSTS
    ) -> NDArray[np.float64]:
        """Costs of many plans: ``widths (plans, dimensions)`` to ``(plans, 4)``, columns as in :class:`Cost`; 0 in all
        but ``columns``."""
        return self._cost.batch(*self._variables(widths, criterion), columns)

    def operators(
        self, widths: NDArray[np.integer], criterion: str | None = None
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """What the convolutions and matrix products of plans multiply, from ``widths (plans, dimensions)``.

        Factors ``(plans, operators)`` and sizes ``(plans, operators, dimensions)``, whose products are the MACs: first
        that of what is summed over, then the output's dimensions that widths set; 1 where widths set none.
        """
        return self._cost.operators(*self._variables(widths, criterion))

    def _variables(
        self, widths: NDArray[np.integer], criterion: str | None
    ) -> tuple[NDArray[np.integer], list[NDArray[np.bool_]]]:
        """Widths by group, and which units of every group of blocks stay."""
        by_group = widths[:, self._dimension_of]
        ranks = self._ranking(criterion).ranks
        return by_group, [ranks[i] < by_group[:, i, None] for i in self._block_groups]

    def smallest_widths(self) -> NDArray[np.int64]:
        """The smallest allowed width of every dimension, shape ``(dimensions,)``."""
        return self.round_widths(np.zeros(len(self.sizes)))

    def smallest_costs(self) -> NDArray[np.float64]:
        """What the smallest widths cost, shape ``(4,)``: the columns of :meth:`cost_batch`."""
        smallest: NDArray[np.float64] = self.cost_batch(self.smallest_widths()[None])[0]
        return smallest

    def next_widths(self, widths: NDArray[np.integer]) -> NDArray[np.int64]:
        """The next larger allowed width of every dimension; the same where it is the largest already."""
        return np.minimum((widths // self._steps + 1) * self._steps, self._high)

    def round_widths(self, widths: NDArray[np.float64]) -> NDArray[np.int64]:
        """The nearest allowed widths of arrays ``(..., dimensions)``: multiples of ``round_to``, and the full size only
        where a width reaches it."""
        sizes, step = self.sizes, self._steps
        rounded = np.maximum(step, np.round(widths / step) * step)
        below = np.maximum((sizes - 1) // step * step, 0)
        rounded = np.where(rounded >= sizes, np.where(below > 0, below, sizes), rounded)
        rounded = np.where(widths >= sizes, sizes, rounded)
        return np.clip(rounded, self._low, self._high).astype(np.int64)

    @property
    def dense_cost(self) -> Cost:
        return self._cost.dense

    def lost_outputs(self, criterion: str | None = None) -> list[NDArray[np.float64] | None]:
        """By dimension, the share of its consumers' dense outputs that least squares cannot give back at every width
        ``(size + 1,)``, see :func:`.least_squares.lost_outputs`; None where that is not known.

        It is known where moments of the dense model were taken, for a criterion or a compensation.
        """
        if not self._evidence.has_statistics:
            return [None] * len(self.dimensions)
        ranks = self._ranking(criterion).ranks
        curves = lost_outputs(self._prepared, self._structure, self._evidence.statistics, ranks)
        found: list[NDArray[np.float64] | None] = []
        for members in self._ties.values():
            known = [curve for index in members if (curve := curves[index]) is not None]
            found.append(np.mean(known, axis=0) if known else None)
        return found

    def apply(self, plan: Plan, effort: str = "thorough") -> nn.Module:
        """A really smaller model with its own parameters, ready to train: sliced, then :attr:`compensation`.

        ``effort``: ``thorough``, or ``quick`` for the many candidates that are compared only (sequential fits).
        """
        return self.repair(self.build(plan), plan, effort)

    def slice(self, plan: Plan) -> nn.Module:
        """The candidate without any repair: its shapes are right, and it equals the masked dense model."""
        return self._slicer(self._kept(plan))

    def build(self, plan: Plan) -> nn.Module:
        """The part of :meth:`apply` that runs no model: slices, and weights fitted from moments of the dense model."""
        kept, (ranking, _) = self._kept(plan), self._prefix(plan)
        return self._slicer(kept, self._compensation.weights(kept, None if ranking is None else ranking.ranks))

    def repair(self, candidate: nn.Module, plan: Plan, effort: str = "thorough") -> nn.Module:
        """The part of :meth:`apply` that runs ``candidate``, and changes it: BatchNorm statistics, sequential fits."""
        self._compensation.run(candidate, self._kept(plan), effort)
        return candidate

    def mask(self, plan: Plan) -> nn.Module:
        """A model of dense shapes in which what the plan removes is zero."""
        return mask_model(self._prepared, self._structure, self._kept(plan))

    def share_of_cost(self, group: Group) -> Cost:
        """What of the dense cost goes when ``group`` is at its smallest and all others are whole."""
        kept = [np.ones(g.size, dtype=bool) for g in self.groups]
        index = self._position[group.name]
        kept[index] = self._ranking().ranks[index] < self._low[self._dimension_of[index]]
        dense, least = self.dense_cost, self._cost(kept)
        return Cost(
            dense.macs - least.macs,
            dense.params - least.params,
            dense.memory_bytes - least.memory_bytes,
            dense.size_bytes - least.size_bytes,
        )

    def _ranking(self, criterion: str | None = None) -> Ranking:
        if criterion is not None and criterion not in self._rankings:
            raise PlanError(f"unknown criterion {criterion!r}; this space has {', '.join(self.criteria)}")
        return self._rankings[criterion or self.criteria[0]]

    def _prefix(self, plan: Plan) -> tuple[Ranking | None, list[int]]:
        """The order that ``plan`` is a prefix of, and its widths by group; None for plans from elsewhere."""
        if not isinstance(plan, Plan):
            raise PlanError(f"a plan is wanted, not a {type(plan).__name__}: space.plan({{name: width}}) makes one")
        for ranking in self._rankings.values():
            if (widths := plan.prefix_of(ranking)) is not None:
                return ranking, widths
        return None, []

    def _kept(self, plan: Plan) -> Kept:
        ranking, widths = self._prefix(plan)
        if ranking is not None:
            return ranking.first(widths)
        kept = dict(plan.kept)
        if set(kept) != set(self._position):
            raise PlanError("the plan belongs to another space: its groups differ")
        masks = []
        for group in self.groups:
            units = kept[group.name]
            if len(units) < group.at_least or units[0] < 0 or units[-1] >= group.size:
                raise PlanError(
                    f"the plan keeps units of {group.name} outside 0..{group.size - 1}, or fewer than {group.at_least}"
                )
            mask = np.zeros(group.size, dtype=bool)
            mask[list(units)] = True
            masks.append(mask)
        return masks

    def _fingerprint(self) -> str:
        layouts = sorted((name, layout) for name, layout in self._structure.tensors.items())
        groups = [(group.name, group.size) for group in self.groups]
        ties = self.dimensions if self.options.uniform else ()
        return hashlib.sha256(json.dumps([groups, layouts, *ties]).encode()).hexdigest()[:16]


def discover(
    model: nn.Module,
    example_inputs: Any,
    *,
    criterion: str | Sequence[str] = "auto",
    calibration: Iterable[Any] | Calibration | None = None,
    compensation: str = "auto",
    loss: Callable[[Any, Any], torch.Tensor] | None = None,
    autocast: torch.dtype | None = None,
    kinds: Sequence[str] | None = None,
    include: Sequence[str] = ("*",),
    exclude: Sequence[str] = (),
    min_ratio: float | Mapping[str, float] = 0.0,
    max_ratio: float | Mapping[str, float] = 1.0,
    round_to: int | Mapping[str, int] = 1,
    uniform: bool = False,
    proof: str = "auto",
    seed: int = 0,
) -> Space:
    """Find and prove what may be removed from ``model``, which is not changed.

    ``example_inputs``: a tensor, a tuple of arguments, or a mapping of keyword arguments; costs refer to these inputs,
    and of a forward that decides by its data the branch that they take is the one that is seen. ``kinds``, ``include``,
    ``exclude``, ``min_ratio``, ``max_ratio``, ``round_to``, ``uniform``: see :class:`.options.Options`.
    ``criterion``: which units stay, one of :data:`.criteria.CRITERIA` or several to choose from, or ``auto``:
    reconstruction where there is calibration data and no group has more than 1,024 units, else l1. ``calibration``:
    batches of training data, readable again and again, for criteria and compensation; ``loss(output, batch)``: for
    those that take gradients, see :class:`.calibration.Calibration`; ``autocast``: run in this type. ``compensation``:
    how candidates are repaired, one of :data:`.compensation.METHODS`, or ``auto``: sequential where there is
    calibration data, else none.
    ``proof``: ``full`` compares numbers, ``shapes`` only runs pruned shapes without numbers (for models on the meta
    device, or too large for three copies in double precision), ``auto`` chooses by the model's size and device.

    Raises:
        ModelError: the model is wrapped, quantised or parametrised; the message says what to do.
        TraceError: the model rejects the inputs or its output is not finite.
        EmptySpaceError: nothing can be pruned; the message says why.
        ConfigError: an option has an unknown name or a value out of range, or needs calibration data.
        CalibrationError: calibration data cannot be read twice, or is too little for BatchNorm.
    """
    criteria = [criterion] if isinstance(criterion, str) else list(criterion)
    if unknown := [name for name in criteria if name not in CRITERIA and criteria != ["auto"]] or not criteria:
        raise ConfigError(f"unknown criterion {unknown}; expected some of {', '.join(CRITERIA)}")
    options = Options(kinds, tuple(include), tuple(exclude), min_ratio, max_ratio, round_to, uniform)
    if proof not in PROOFS:
        raise ConfigError(f"unknown proof {proof!r}; expected one of {', '.join(PROOFS)}")
    check_model(model)
    inputs = Inputs.of(example_inputs)
    if calibration is not None and not isinstance(calibration, Calibration):
        calibration = Calibration(calibration, len(inputs.args), loss, autocast, argument_names(model))
    if (device := device_of(model)).type != "meta":
        inputs = inputs.to(device)
        calibration = None if calibration is None else calibration.on(device)
    started = time.perf_counter()
    prepared = replace(model)
    trace = record(prepared, inputs)
    trace.blocks = find_stacks(prepared, trace.calls)
    structure = build_structure(trace)
    options.check([group.name for group in structure.groups])
    structure = _leave_out(trace, structure, _unwanted(prepared, structure, options))
    traced = time.perf_counter()
    prover = Prover(prepared, inputs, _only_shapes(prepared, proof), uniform)
    tied = _ties(structure.groups, uniform).values()
    failures = prover.failures(structure, [[structure.groups[i].name for i in members] for members in tied])
    for name, reason in failures.items():
        logger.warning("group %s is left out: %s", name, reason)
    structure = _leave_out(trace, structure, {name: f"failed its proof: {why}" for name, why in failures.items()})
    seconds = {"trace": traced - started, "proof": time.perf_counter() - traced}
    if not structure.groups:
        reasons = "; ".join(f"{frozen.name}: {frozen.reason}" for frozen in structure.frozen[:5])
        raise EmptySpaceError(f"nothing in this model can be pruned ({reasons or 'no weights were used'})")
    evidence = Evidence(prepared, structure, calibration, seed)
    cost = CostModel(prepared, structure)
    samples = max(1, *(len(tensor) for tensor in inputs.tensors()[:1] if tensor.dim()))
    repair = Compensation(evidence, compensation, cost.dense.memory_bytes / samples)
    if criteria == ["auto"]:
        criteria = [_best_criterion(evidence)]
    return Space(model, prepared, structure, options, criteria, evidence, repair, cost, seconds)


def _best_criterion(evidence: Evidence) -> str:
    """What wins in docs/candidates.md, where its time (the cube of a group's size) is worth it."""
    small = max(group.size for group in evidence.structure.groups) <= RECONSTRUCTED_UNITS
    return "reconstruction" if evidence.calibration is not None and small else "l1"


def _orders(scores: Iterable[NDArray[np.float64]]) -> list[NDArray[np.intp]]:
    """Units, most important first."""
    return [np.argsort(-score, kind="stable") for score in scores]


def _unwanted(model: nn.Module, structure: Structure, options: Options) -> dict[str, str]:
    """Groups to be left alone, with the reason."""
    unwanted = {group.name: reason for group in structure.groups if (reason := options.excludes(group)) is not None}
    if options.uniform:
        unwanted |= {name: why for name, why in inexpressible(model, structure).items() if name not in unwanted}
    return unwanted


def _leave_out(trace: Trace, structure: Structure, reasons: dict[str, str]) -> Structure:
    if not reasons:
        return structure
    freeze_groups(trace, structure, reasons)
    return build_structure(trace)


def _only_shapes(model: nn.Module, proof: str) -> bool:
    tensors = tensors_of(model).values()
    if any(tensor.is_meta for tensor in tensors):
        if proof == "full":
            raise ConfigError("proof=full compares numbers, and this model is on the meta device, which has none")
        return True
    too_large = 8 * sum(tensor.numel() for tensor in tensors) > FULL_PROOF_BYTES
    if proof == "auto" and too_large:
        logger.warning("the model is large: only shapes are proven; proof=full compares numbers too")
    return proof == "shapes" or (proof == "auto" and too_large)


def _ties(groups: Sequence[Group], uniform: bool) -> dict[str, list[int]]:
    """Positions of the groups that share a width, by the name of the dimension."""
    if not uniform:
        return {group.name: [position] for position, group in enumerate(groups)}
    shared: dict[tuple[str, int], list[int]] = {}
    for position, group in enumerate(groups):
        shared.setdefault((group.kind, group.size), []).append(position)
    ties: dict[str, list[int]] = {}
    for (kind, size), members in shared.items():
        names = {re.sub(r"\d+", "*", groups[member].name) for member in members}
        name = groups[members[0]].name if len(members) == 1 else names.pop() if len(names) == 1 else f"{kind}:{size}"
        ties[name if name not in ties else f"{kind}:{size}"] = members
    return ties
