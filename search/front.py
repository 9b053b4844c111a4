"""The Pareto front of score (higher is better) against cost (lower is better), and what is read off it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Values = Sequence[float] | NDArray[np.float64]


def non_dominated(scores: Values, costs: Values) -> list[int]:
    """Positions of the points that no other point beats, cheapest first; of equal points the first one."""
    score, cost = np.asarray(scores, dtype=float), np.asarray(costs, dtype=float)
    order = np.lexsort((np.arange(len(score)), -score, cost))
    best, front = -np.inf, []
    for position in order:
        if score[position] > best:
            best = score[position]
            front.append(int(position))
    return front


def hypervolume(scores: Values, costs: Values, reference: tuple[float, float]) -> float:
    """The area that the points dominate up to ``reference``, a (score, cost) that is worse than all points of interest.

    Zitzler and Thiele 1999, "Multiobjective evolutionary algorithms". Points beyond the reference add nothing.
    """
    worst_score, worst_cost = reference
    area, level = 0.0, worst_score
    for position in non_dominated(scores, costs):
        if costs[position] < worst_cost and scores[position] > level:
            area += (worst_cost - costs[position]) * (scores[position] - level)
            level = scores[position]
    return float(area)


class GrowingFront:
    """The front of points that come one by one: ``points`` (score, cost), and ``volume``, their :func:`hypervolume`."""

    def __init__(self, reference: tuple[float, float]) -> None:
        self.reference = reference
        self.points: list[tuple[float, float]] = []
        self.volume = 0.0

    def add(self, score: float, cost: float) -> float:
        """The hypervolume with the new point."""
        if all(known < score or price > cost for known, price in self.points):
            self.points = [(known, price) for known, price in self.points if known > score or price < cost]
            self.points.append((score, cost))
            scores, costs = zip(*self.points, strict=True)
            self.volume = hypervolume(scores, costs, self.reference)
        return self.volume


def hypervolumes(scores: Values, costs: Values, reference: tuple[float, float]) -> list[float]:
    """The :func:`hypervolume` of the first point, the first two, and so on."""
    front = GrowingFront(reference)
    return [front.add(float(score), float(cost)) for score, cost in zip(scores, costs, strict=True)]


def thinned(costs: Values, most: int) -> list[int]:
    """Positions of at most ``most`` points, cheapest first, spread over the range of costs.

    Of more, the one whose neighbours are nearest to each other goes, again and again; both ends stay.
    """
    kept = [int(place) for place in np.argsort(costs, kind="stable")]
    while len(kept) > max(most, 2):
        gaps = [costs[after] - costs[before] for before, after in zip(kept, kept[2:], strict=False)]
        del kept[1 + int(np.argmin(gaps))]
    return kept


def knee(scores: Values, costs: Values) -> int:
    """Position of the point of a front (cheapest first) farthest above the line that joins its two ends.

    Both axes count from 0 to 1 over the front (Das 1999, "On characterizing the knee of the Pareto curve").
    """
    score, cost = np.asarray(scores, dtype=float), np.asarray(costs, dtype=float)
    if len(score) < 3:
        return len(score) - 1
    gain = (score - score[0]) / (score[-1] - score[0])
    price = (cost - cost[0]) / (cost[-1] - cost[0])
    return int(np.argmax(gain - price))


def picked_by(has_budget: bool, models: int) -> str:
    """How the best of a front of so many ``models`` is chosen, in words."""
    if has_budget:
        return "the best score within the budget"
    if models > 2:
        return "the knee, where the front bends most"
    return "the higher score" if models == 2 else "the only one"
