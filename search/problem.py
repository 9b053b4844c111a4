"""What a study searches: its parameters, and the plan that stands for their values."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import numpy as np
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution

from ..spaces import Plan, Space
from .budget import KEYS, LATENCY, LATENCY_COLUMN, Limits, first_key
from .coordinates import Coordinates
from .latency import LatencyModel
from .projection import Projector, named_widths

#: Proposals are relative keep shares in a range; only their proportions matter, since they are projected. Samplers that
#: know nothing of widths draw from the first one; those that choose widths need one in which every plan has a place.
SHARES, ALL_SHARES = (0.1, 1.0), (1e-4, 1.0)
#: In front mode, the name of the dimension that says which share of the dense cost to aim at, and its usual lower end.
COST_SHARE, SMALLEST_SHARE = "cost_share", 0.05
#: Plans of equal shares that a search of the front starts with.
EQUAL_ON_FRONT = 5
#: The name of the dimension that chooses among several criteria.
CRITERION = "criterion"
_GOLDEN = (np.sqrt(5) - 1) / 2
#: Latency as a cost: predicted by a model until it is measured.
LATENCY_MS = "latency_ms"
#: The entries of ``Cost`` in the order of the columns of ``Space.cost_batch``.
COLUMNS = ("macs", "params", "memory_bytes", "size_bytes", LATENCY_MS)


@dataclass(frozen=True)
class Problem:
    """One share a dimension of ``space``, projected onto ``limits``.

    ``for_front``: the share of the dense ``objective`` (one of :data:`COLUMNS`) to aim at, ``lowest`` or
    :data:`SMALLEST_SHARE` at least, is one more parameter, and so is the criterion where the space has several.
    ``shares``: the range of the parameters.
    """

    space: Space
    limits: Limits
    objective: str
    for_front: bool = False
    latency: LatencyModel | None = None
    lowest: Limits | None = None
    shares: tuple[float, float] = SHARES

    @cached_property
    def distributions(self) -> dict[str, BaseDistribution]:
        found: dict[str, BaseDistribution] = {
            name: FloatDistribution(*self.shares, log=True) for name in self.space.dimensions
        }
        if self.for_front:
            low, high = self.cost_shares
            found[COST_SHARE] = FloatDistribution(low, high, log=True)
        if len(self.space.criteria) > 1:
            found[CRITERION] = CategoricalDistribution(self.space.criteria)
        return found

    @cached_property
    def coordinates(self) -> Coordinates:
        return Coordinates(self.space)

    def plan(self, parameters: Mapping[str, Any]) -> tuple[Plan, dict[str, float]]:
        """The plan of the values of the parameters, and its costs."""
        shares = np.array([float(parameters[name]) for name in self.space.dimensions])
        criterion = str(parameters.get(CRITERION, self.space.criteria[0]))
        widths = self.projector(parameters.get(COST_SHARE)).fill(shares, criterion)
        plan = self.space.plan(named_widths(self.space, widths), criterion)
        cost: dict[str, float] = asdict(self.space.cost(plan))
        if self.latency is not None:
            cost[LATENCY_MS] = float(self.latency.ratios(widths[None], criterion)[0]) * self.latency.dense_ms
        return plan, cost

    def excesses(self, costs: Mapping[str, float]) -> dict[str, float]:
        """By limited cost the share by which a plan's is above its limit: at most 0, as Optuna's constraints are."""
        dense_ms = 1.0 if self.latency is None else self.latency.dense_ms
        scales = {LATENCY_MS: dense_ms}
        limits = zip(COLUMNS, self.limits.values, strict=True)
        return {key: costs[key] / (limit * scales.get(key, 1.0)) - 1 for key, limit in limits if np.isfinite(limit)}

    def projector(self, cost_share: float | None = None) -> Projector:
        """Onto the limits, with that of the objective at ``cost_share`` of the dense cost."""
        limits = self.limits
        if cost_share is not None:
            _, dense, smallest = self._bounds
            # The exact bound where the share is at its end: a product may fall a rounding error short of it.
            limits = limits.replace(self._column, max(cost_share * dense, smallest))
        return Projector(self.space, limits, self.latency)

    @cached_property
    def cost_shares(self) -> tuple[float, float]:
        """The range of the share of the dense cost."""
        column, dense, smallest = self._bounds
        highest = min(1.0, self.limits.values[column] / dense)
        lowest = SMALLEST_SHARE if self.lowest is None else self.lowest.values[column] / dense
        return min(max(lowest, smallest / dense), highest), highest

    def spread_cost_share(self, number: int) -> float:
        """Numbers that fill the range of the share, however many: a golden section sequence on its logarithm."""
        return self._cost_share(number * _GOLDEN % 1)

    def starts(self) -> list[dict[str, float]]:
        """Parameters of plans that no search shall be behind: equal shares; along a front, at costs from end to end."""
        equal = dict.fromkeys(self.space.dimensions, math.sqrt(math.prod(self.shares)))
        if not self.for_front:
            return [equal]
        return [{**equal, COST_SHARE: self._cost_share(float(place))} for place in np.linspace(1, 0, EQUAL_ON_FRONT)]

    def _cost_share(self, place: float) -> float:
        """At ``place`` between the ends (0, 1) of the range, on its logarithm."""
        low, high = self.cost_shares
        return float(np.clip(low * (high / low) ** place, low, high))

    @property
    def _column(self) -> int:
        return COLUMNS.index(self.objective)

    @cached_property
    def _bounds(self) -> tuple[int, float, float]:
        """The column of the objective, and its dense and smallest values; those of latency are ratios."""
        column = self._column
        if column == LATENCY_COLUMN:
            assert self.latency is not None
            return column, 1.0, float(self.latency.ratios(self.space.smallest_widths()[None])[0])
        return column, asdict(self.space.dense_cost)[self.objective], float(self.space.smallest_costs()[column])


def objective_of(budget: Mapping[str, Any] | None) -> str:
    """The cost that the front trades against the score: that of the first budget, macs without one."""
    first = first_key(budget or {})
    return LATENCY_MS if first == LATENCY else COLUMNS[KEYS[first][0]]
