"""Scale proposed widths onto a budget, so that no candidate is wasted on an infeasible plan."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
from numpy.typing import NDArray

from ..spaces import Plan, Space
from ..spaces.errors import PlanError
from .budget import Limits, check_reachable, parse_budget
from .latency import LatencyModel

#: Scales tried at once in a round; two rounds resolve the scale to one part in a million.
_STEPS = 1024


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
    check_reachable(space, limits)
    widths = project_widths(space, limits, shares)
    return space.plan({name: int(width) for name, width in zip(names, widths, strict=True)})


def project_widths(
    space: Space,
    limits: Limits,
    shares: NDArray[np.float64],
    criterion: str | None = None,
    latency: LatencyModel | None = None,
) -> NDArray[np.int64]:
    """Widths (groups,) of the largest feasible scale of ``shares`` (groups,), topped up group by group.

    ``criterion`` decides which blocks stay; ``latency`` predicts what the limits say about it.
    """

    def excess(widths: NDArray[np.int64]) -> NDArray[np.float64]:
        costs = space.cost_batch(widths, criterion)
        if latency is not None:
            costs = np.column_stack([costs, latency.ratios(widths, criterion)])
        return limits.excess(costs)

    low, high = 0.0, 1 / shares.min()
    widths = space.smallest_widths()
    for _ in range(2):
        scales = np.linspace(low, high, _STEPS)
        proposals = space.round_widths(np.minimum(scales[:, None] * shares, 1) * space.sizes)
        feasible = np.flatnonzero(excess(proposals) <= 0)
        if not len(feasible):
            break
        best = feasible[-1]
        widths, low, high = proposals[best], scales[best], scales[min(best + 1, _STEPS - 1)]
    return _top_up(space, excess, widths, shares * space.sizes)


def _top_up(
    space: Space,
    excess: Callable[[NDArray[np.int64]], NDArray[np.float64]],
    widths: NDArray[np.int64],
    wanted: NDArray[np.float64],
) -> NDArray[np.int64]:
    """Rounding leaves slack: grow one group at a time by one step, the most behind first, while the budget holds."""
    widths = widths.copy()
    while True:
        larger = np.tile(widths, (len(widths), 1))
        np.fill_diagonal(larger, space.next_widths(widths))
        grown = larger.diagonal() > widths
        fits = grown & (excess(larger) <= 0)
        if not fits.any():
            return widths
        candidates = np.flatnonzero(fits)
        chosen = candidates[np.argmin(widths[candidates] / wanted[candidates])]
        widths[chosen] = larger[chosen, chosen]
