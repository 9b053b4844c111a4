"""Scale proposed widths onto a budget, so that no candidate is wasted on an infeasible plan."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..spaces import Plan, Space
from ..spaces.errors import BudgetError, PlanError
from .budget import LATENCY, Limits, check_reachable, parse_budget
from .latency import LatencyModel

#: Halvings of the range of scales, which is a factor of a thousand: it is known to one part in 40,000 afterwards.
_HALVINGS, _RANGE = 18, 1e3


def project(space: Space, budget: Mapping[str, str | float], ratios: Mapping[str, float] | None = None) -> Plan:
    """The largest plan within ``budget`` whose kept shares are proportional to ``ratios`` (uniform by default).

    ``ratios`` gives the relative share of units to keep by dimension (a group, or groups of one width); those that are
    not named have 1.

    Raises:
        BudgetError: the budget cannot be read, or no plan of the space can meet it.
        PlanError: an unknown group, or a ratio that is not a positive finite number.
    """
    ratios = dict(ratios or {})
    names = space.dimensions
    if unknown := set(ratios) - set(names):
        raise PlanError(f"unknown groups {sorted(unknown)}; this space has {', '.join(names)}")
    shares = np.array([float(ratios.get(name, 1.0)) for name in names])
    if not (np.isfinite(shares).all() and (shares > 0).all()):
        raise PlanError("ratios must be positive finite numbers")
    limits = parse_budget(budget, space.dense_cost)
    if LATENCY in budget:
        raise BudgetError("latency is measured, and not computed: search(budget={'latency': ...}, timing=...) holds it")
    check_reachable(space, budget)
    return space.plan(named_widths(space, Projector(space, limits).fill(shares)))


def named_widths(space: Space, widths: NDArray[np.integer]) -> dict[str, int]:
    return {name: int(width) for name, width in zip(space.dimensions, widths, strict=True)}


@dataclass(frozen=True)
class Projector:
    """Finds the largest widths of given proportions within ``limits``. ``latency`` predicts what they say about it."""

    space: Space
    limits: Limits
    latency: LatencyModel | None = None

    def excess(self, widths: NDArray[np.integer], criterion: str | None = None) -> NDArray[np.float64]:
        """By how much each of ``widths (plans, dimensions)`` is above the limits; see :meth:`Limits.excess`.

        ``criterion`` decides which blocks stay.
        """
        costs = self.space.cost_batch(widths, criterion, self.limits.analytic)
        if self.latency is not None:
            costs = np.column_stack([costs, self.latency.ratios(widths, criterion)])
        return self.limits.excess(costs)

    def scale(self, shares: NDArray[np.float64], criterion: str | None = None) -> NDArray[np.int64]:
        """``shares (plans, dimensions)`` to widths of the same shape: the largest feasible scale of every row."""
        space = self.space

        def at(scales: NDArray[np.float64]) -> NDArray[np.int64]:
            return space.round_widths(np.minimum(scales[:, None] * shares, 1) * space.sizes)

        high = 1 / shares.min(axis=1)
        widths = at(high)
        fits = self.excess(widths, criterion) <= 0
        widths = np.where(fits[:, None], widths, space.smallest_widths())
        low = np.where(fits, high, high / _RANGE / (shares.max(axis=1) / shares.min(axis=1)))
        for _ in range(_HALVINGS):
            middle = np.sqrt(low * high)
            proposed = at(middle)
            fits = self.excess(proposed, criterion) <= 0
            widths = np.where(fits[:, None], proposed, widths)
            low, high = np.where(fits, middle, low), np.where(fits, high, middle)
        return widths

    def fill(self, shares: NDArray[np.float64], criterion: str | None = None) -> NDArray[np.int64]:
        """Widths ``(dimensions,)`` of the largest feasible scale of ``shares (dimensions,)``, topped up.

        Rounding leaves slack: one dimension at a time grows by a step, the most behind first, while the budget holds.
        """
        space, wanted = self.space, shares * self.space.sizes
        widths = self.scale(shares[None], criterion)[0]
        while True:
            larger = np.tile(widths, (len(widths), 1))
            np.fill_diagonal(larger, space.next_widths(widths))
            grown = larger.diagonal() > widths
            fits = grown & (self.excess(larger, criterion) <= 0)
            if not fits.any():
                return widths
            candidates = np.flatnonzero(fits)
            chosen = candidates[np.argmin(widths[candidates] / wanted[candidates])]
            widths[chosen] = larger[chosen, chosen]
