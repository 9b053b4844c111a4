"""Widths from sensitivities: what each group's width gains alone, and the best combination of them within a budget."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import optuna
from numpy.typing import NDArray
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler
from optuna.trial import FrozenTrial
from scipy.optimize import Bounds, LinearConstraint, milp

from .problem import SHARES, Problem
from .sampler import Scored

Array = NDArray[np.float64]

#: What a dimension's share is multiplied by when its sensitivity is taken.
LEVELS = (0.5, 0.7, 1.4, 2.0)
#: Widths between the least and the largest that an allocation chooses from.
CHOICES = 24
#: Rounds of linearising costs that are products of widths.
_ROUNDS = 4


def choose(gains: Sequence[Array], costs: Sequence[Array], limits: Array) -> list[int]:
    """The index of one choice an item, so that the sum of gains is largest and no sum of costs exceeds its limit.

    The multiple-choice knapsack problem, solved exactly by branch and bound (HiGHS). ``gains``: ``(choices,)`` of every
    item; ``costs``: ``(choices, limits)``; ``limits (limits,)``.

    Raises:
        ValueError: no choice holds the limits.
    """
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


class AllocationSampler(BaseSampler):
    """Sensitivities and a knapsack: the baseline that interactions between groups defeat (docs/search.md).

    Around the uniform plan, every share is multiplied by each of :data:`LEVELS`, and all plans are projected onto the
    budget: each is a candidate of its own. Gains are taken as additive and interpolated between these widths, and the
    best combination is tried next; then the same starts again around the best plan so far.
    """

    def __init__(self, problem: Problem, seed: int) -> None:
        self.problem = problem
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
        return distribution.choices[0] if hasattr(distribution, "choices") else np.sqrt(distribution.low)

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        done = [t for t in study.get_trials(deepcopy=False) if t.values is not None and "plan" in t.user_attrs]
        number, space = trial.number, self.problem.space
        first = (number - 1) // self._round * self._round
        before = [t for t in done if t.number <= first]
        if not before:
            shares = np.ones(len(space.dimensions))
        else:
            centre = max(before, key=lambda t: t.values[0])
            shares = Scored.of(self.problem, [centre]).widths[0] / space.sizes
            place = (number - 1) % self._round
            if place < len(self._probes):
                dimension, level = self._probes[place]
                shares[dimension] *= level
            else:
                probes = [t for t in done if t.number == centre.number or first < t.number < number]
                shares = self._allocated(shares, probes)
        shares = np.clip(shares / shares.max(), *SHARES)
        return dict(zip(space.dimensions, shares.tolist(), strict=True))

    def _allocated(self, centre: Array, probes: Sequence[FrozenTrial]) -> Array:
        """Shares of the best combination of what ``probes`` gained, each of which changed one share of ``centre``."""
        space, scored = self.problem.space, Scored.of(self.problem, probes)
        changes = np.log(scored.widths / space.sizes / centre)
        level = np.median(changes, axis=1, keepdims=True)  # all others were scaled alike by the projection
        moved = np.abs(changes - level).argmax(axis=1)
        base = scored.values[np.abs(changes).max(axis=1).argmin()]
        choices, gains = [], []
        for dimension in range(len(space.dimensions)):
            own = moved == dimension
            x = np.concatenate([[0.0], (changes - level)[own, dimension]])
            y = np.concatenate([[0.0], scored.values[own] - base])
            order = np.argsort(x)
            widths = self._choices(dimension, centre, x)
            choices.append(widths)
            gains.append(np.interp(np.log(widths / space.sizes[dimension] / centre[dimension]), x[order], y[order]))
        return self._best(choices, gains, centre)

    def _choices(self, dimension: int, centre: Array, reached: Array) -> NDArray[np.int64]:
        """Widths of one dimension within what its probes ``reached`` (logarithms)."""
        space = self.problem.space
        shares = centre[dimension] * np.exp(np.linspace(reached.min(), reached.max(), CHOICES))
        rows = np.tile(centre, (CHOICES, 1))
        rows[:, dimension] = np.minimum(shares, 1)
        return np.unique(space.round_widths(rows * space.sizes)[:, dimension])

    def _best(self, choices: Sequence[NDArray[np.int64]], gains: Sequence[Array], centre: Array) -> Array:
        space, projector = self.problem.space, self.problem.projector()
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
