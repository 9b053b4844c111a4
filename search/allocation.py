"""Widths from sensitivities: what each group's width gains alone, and the best combination of them within a budget."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import optuna
from numpy.typing import NDArray
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler
from optuna.trial import FrozenTrial

from .problem import COST_SHARE, Problem
from .projection import Projector
from .sampler import Scored

Array = NDArray[np.float64]

#: What a dimension's share is multiplied by when its sensitivity is taken.
LEVELS = (0.5, 0.7, 1.4, 2.0)
#: Widths between the least and the largest that an allocation chooses from.
CHOICES = 24
#: Optuna's mark of trials whose parameters were given to the study (``enqueue_trial``).
GIVEN = "fixed_params"
#: Rounds of linearising costs that are products of widths.
_ROUNDS = 4


def choose(gains: Sequence[Array], costs: Sequence[Array], limits: Array) -> list[int]:
    """The index of one choice an item, so that the sum of gains is largest and no sum of costs exceeds its limit.

    The multiple-choice knapsack problem, solved exactly by branch and bound (HiGHS). ``gains``: ``(choices,)`` of every
    item; ``costs``: ``(choices, limits)``; ``limits (limits,)``.

    Raises:
        ValueError: no choice holds the limits.
    """
    from scipy.optimize import Bounds, LinearConstraint, milp  # slow to import, as scikit-learn is

    sizes = [len(values) for values in gains]
    starts = np.cumsum([0, *sizes])
    one_each = np.zeros((len(sizes), starts[-1]))
    for item, (start, size) in enumerate(zip(starts, sizes, strict=False)):
        one_each[item, start : start + size] = 1
    scale = np.maximum(np.abs(limits), 1e-12)
    constraints = [
        LinearConstraint(one_each, 1, 1),
        LinearConstraint(np.concatenate(costs).T / scale[:, None], ub=limits / scale),
    ]
    found = milp(-np.concatenate(gains), integrality=np.ones(starts[-1]), bounds=Bounds(0, 1), constraints=constraints)
    if found.x is None:
        raise ValueError("no choice holds the limits")
    return [int(np.argmax(found.x[start : start + size])) for start, size in zip(starts, sizes, strict=False)]


def rising(x: Array, y: Array, at: Array) -> Array:
    """The values ``y`` at ``x``, repaired so that none falls as ``x`` grows, between these and beyond them ``at``.

    The repair is the nearest rising sequence in the squares (isotonic regression; Barlow et al. 1972). Beyond its ends
    the values go on as between the last two.
    """
    from sklearn.isotonic import IsotonicRegression

    order = np.argsort(x, kind="stable")
    x, y = x[order], IsotonicRegression().fit_transform(x[order], y[order])
    found = np.interp(at, x, y)
    if len(x) > 1 and x[0] < x[-1]:
        for inner, end, outside in ((1, 0, at < x[0]), (-2, -1, at > x[-1])):
            slope = (y[end] - y[inner]) / (x[end] - x[inner]) if x[end] != x[inner] else 0.0
            found = np.where(outside, y[end] + slope * (at - x[end]), found)
    return np.asarray(found)


class AllocationSampler(BaseSampler):
    """Sensitivities and a knapsack: the baseline that interactions between groups defeat (docs/search.md).

    Around the uniform plan, every share is multiplied by each of :data:`LEVELS`, and all plans are projected onto the
    budget: each is a candidate of its own. Gains are taken as additive, never falling with a width, and interpolated
    between these widths, and the best combination is tried next; then the same starts again around the best plan so
    far. Along a front, the sensitivities are those around one plan in its middle, and are followed by the best
    combination for one budget after another.
    """

    def __init__(self, problem: Problem, seed: int) -> None:
        self.problem, self.seed = problem, seed
        pairs = [(dimension, level) for dimension in range(len(problem.space.dimensions)) for level in LEVELS]
        order = np.random.default_rng(seed).permutation(len(pairs))
        self._probes = [pairs[index] for index in order]

    @property
    def _round(self) -> int:
        """Trials of a round: the centre, the probes around it, the allocation."""
        return len(self._probes) + 1

    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        return self.problem.distributions

    def sample_independent(self, study: Any, trial: FrozenTrial, name: str, distribution: Any) -> Any:
        if name == COST_SHARE:
            return self._middle
        return distribution.choices[0] if hasattr(distribution, "choices") else np.sqrt(distribution.low)

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        trials = study.get_trials(deepcopy=False)
        places = self._places(trials)
        scored = [t for t in trials if t.values is not None and "plan" in t.user_attrs]
        done = {places[t.number]: t for t in scored if t.number in places}
        place = places.get(trial.number, 0)
        cost_share = self._cost_share(place) if self.problem.for_front else None
        shares = self._shares(place, done, cost_share)
        shares = np.clip(shares / shares.max(), *self.problem.shares)
        parameters: dict[str, Any] = dict(zip(self.problem.space.dimensions, shares.tolist(), strict=True))
        return parameters if cost_share is None else {**parameters, COST_SHARE: cost_share}

    @property
    def _middle(self) -> float:
        """Of the front, as a share of the dense cost."""
        return float(np.sqrt(np.prod(self.problem.cost_shares)))

    def _places(self, trials: Sequence[FrozenTrial]) -> dict[int, int]:
        """Where trials are in the rounds, by number: 0 is the first centre, a plan that the study was given, if any.

        Other plans that were given have no place; along a front none has, since their costs are others.
        """
        own = [t.number for t in trials if GIVEN not in t.system_attrs]
        is_centre_given = not self.problem.for_front and GIVEN in trials[0].system_attrs
        places = {number: place for place, number in enumerate(own, int(is_centre_given))}
        if not is_centre_given:
            return places
        # One whose process was killed has been given again.
        centre = next((t for t in trials if GIVEN in t.system_attrs and t.values is not None), trials[0])
        return {centre.number: 0} | places

    def _cost_share(self, place: int) -> float:
        return self._middle if place < self._round else self.problem.spread_cost_share(self.seed + place)

    def _shares(self, place: int, done: Mapping[int, FrozenTrial], cost_share: float | None) -> Array:
        first = 0 if cost_share is not None else (place - 1) // self._round * self._round
        before = [other for other in done if other <= first] or [*done]
        if not before:
            return np.ones(len(self.problem.space.dimensions))
        centre = max(before, key=lambda other: done[other].values[0])
        shares = Scored.of(self.problem, [done[centre]]).widths[0] / self.problem.space.sizes
        probe = place - 1 - first
        if probe < len(self._probes):
            dimension, level = self._probes[probe]
            shares[dimension] *= level
            return np.asarray(shares)
        probes = [t for other, t in done.items() if other == centre or first < other < first + self._round]
        return self._allocated(shares, probes, cost_share)

    def _allocated(self, centre: Array, probes: Sequence[FrozenTrial], cost_share: float | None) -> Array:
        """Shares of the best combination of what ``probes`` gained, each of which changed one share of ``centre``."""
        space, scored = self.problem.space, Scored.of(self.problem, probes)
        changes = np.log(scored.widths / space.sizes / centre)
        level = np.median(changes, axis=1, keepdims=True)  # all others were scaled alike by the projection
        moved = np.abs(changes - level).argmax(axis=1)
        base = scored.values[np.abs(changes).max(axis=1).argmin()]
        wider = 0.0 if cost_share is None else np.log(max(cost_share / self._middle, self._middle / cost_share))
        choices, gains = [], []
        for dimension in range(len(space.dimensions)):
            own = moved == dimension
            x = np.concatenate([[0.0], (changes - level)[own, dimension]])
            y = np.concatenate([[0.0], scored.values[own] - base])
            widths = self._choices(dimension, centre, x, wider)
            choices.append(widths)
            gains.append(rising(x, y, np.log(widths / space.sizes[dimension] / centre[dimension])))
        return self._best(choices, gains, centre, self.problem.projector(cost_share))

    def _choices(self, dimension: int, centre: Array, reached: Array, wider: float) -> NDArray[np.int64]:
        """Widths of one dimension within what its probes ``reached`` (logarithms), and ``wider`` on either side."""
        space = self.problem.space
        shares = centre[dimension] * np.exp(np.linspace(reached.min() - wider, reached.max() + wider, CHOICES))
        rows = np.tile(centre, (CHOICES, 1))
        rows[:, dimension] = np.minimum(shares, 1)
        return np.unique(space.round_widths(rows * space.sizes)[:, dimension])

    def _best(
        self, choices: Sequence[NDArray[np.int64]], gains: Sequence[Array], centre: Array, projector: Projector
    ) -> Array:
        space = self.problem.space
        limited = np.isfinite(projector.limits.values)
        limits = np.array(projector.limits.values)[limited]
        widths = space.round_widths(centre * space.sizes)
        for _ in range(_ROUNDS):
            base = self._costs(widths[None])[0, limited]
            costs = []
            for dimension, options in enumerate(choices):
                rows = np.tile(widths, (len(options), 1))
                rows[:, dimension] = options
                costs.append(self._costs(rows)[:, limited] - base)
            try:
                chosen = choose(gains, costs, limits - base)
            except ValueError:
                break
            widths = np.array([options[index] for options, index in zip(choices, chosen, strict=True)])
        return np.asarray(widths / space.sizes)

    def _costs(self, widths: NDArray[np.integer]) -> Array:
        costs = self.problem.space.cost_batch(widths)
        latency = self.problem.latency
        ratios = np.zeros(len(widths)) if latency is None else latency.ratios(widths)
        return np.column_stack([costs, ratios])
