"""The sampler that knows the budget: it compares plans on its surface, by their real widths."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import optuna
from numpy.typing import NDArray
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler, RandomSampler
from optuna.trial import FrozenTrial, TrialState
from scipy.special import ndtr

from .problem import COST_SHARE, CRITERION, Problem
from .projection import Projector
from .surrogate import Surrogate

Array = NDArray[np.float64]

#: Trials before the first fit, one more for so many dimensions, and the spread of the logarithms of their shares around
#: equal ones.
FIRST_TRIALS, DIMENSIONS_A_TRIAL, FIRST_SPREAD = 4, 8, 0.3
#: Plans that a fit takes in: the nearest in cost, the best and the latest ones.
MOST_TRIALS = 400
#: Proposals compared in a round: changed at random, and along the slopes of the surrogate.
POOL, CLIMBED = 256, 128
#: Plans that the next round starts from, and that are filled up until one is new.
CENTRES, MOST_FILLS = 5, 16
#: Spreads of the changes of a round, and how many of the dimensions are changed.
_ROUNDS = ((0.03, 0.08, 0.2, 0.4), (0.02, 0.05, 0.1), (0.02, 0.05, 0.1))
_CHANGED = (0.1, 0.3, 1.0)
#: Within a tight budget the best plans give up most of some layers for others, which small steps take many trials to
#: find. So first trials have up to half of their dimensions at a fifth, and so many of the proposals leap: a few
#: dimensions, as many as these on average, by one of these logarithms.
STARVED, STARVED_SHARE = 0.5, 0.2
LEAPING, _LEAPERS, _LEAPS = POOL // 3, (1, 2, 3), (-1.5, -0.8, 0.8, 1.5)
#: Lengths of steps along the slopes, and how many of the dimensions take part.
_CLIMBS, _CLIMBING = (0.01, 0.5), (0.3, 1.0, 1.0)


@dataclass(frozen=True)
class Scored:
    """Plans with their ``values (plans,)``: ``widths (plans, dimensions)``, ``criteria (plans,)`` as indices."""

    widths: NDArray[np.int64]
    criteria: NDArray[np.int64]
    values: Array

    @classmethod
    def of(cls, problem: Problem, trials: Iterable[FrozenTrial]) -> Scored:
        names = [groups[0].name for groups in problem.space.tied_groups]
        rows, criteria, values = [], [], []
        for trial in trials:
            plan = trial.user_attrs["plan"]
            rows.append([plan["widths"][name] for name in names])
            criteria.append(problem.space.criteria.index(plan["criterion"]))
            values.append(trial.values[0] if trial.values else np.nan)
        widths = np.array(rows, dtype=np.int64).reshape(len(rows), len(problem.space.dimensions))
        return cls(widths, np.array(criteria, dtype=np.int64), np.array(values, dtype=float))

    def __len__(self) -> int:
        return len(self.values)

    def __add__(self, other: Scored) -> Scored:
        return Scored(
            np.concatenate([self.widths, other.widths]),
            np.concatenate([self.criteria, other.criteria]),
            np.concatenate([self.values, other.values]),
        )

    def __getitem__(self, chosen: Any) -> Scored:
        return Scored(self.widths[chosen], self.criteria[chosen], self.values[chosen])


class SurrogateSampler(BaseSampler):
    """Bayesian optimisation on the surface of the budget.

    Other samplers see shares, which are projected onto the budget only afterwards, so that many of their proposals are
    one plan. This one fits a :class:`.surrogate.Surrogate` to the widths of the scored plans, changes the best ones at
    random or along its slopes, projects these proposals onto the budget, and asks for the one of the highest expected
    improvement (Jones et al. 1998; changing few dimensions at a time is from Regis and Shoemaker 2013). Along a front
    the share of the cost to aim at follows a sequence that fills its range, and all trials inform each.

    ``earlier``: plans that other runs have scored.
    """

    def __init__(self, problem: Problem, seed: int, earlier: Scored | None = None) -> None:
        self.problem, self.seed, self.earlier = problem, seed, earlier
        self._independent = RandomSampler(seed=seed)
        self._start: Array | None = None

    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        return self.problem.distributions

    def sample_independent(self, study: Any, trial: FrozenTrial, name: str, distribution: BaseDistribution) -> Any:
        return self._independent.sample_independent(study, trial, name, distribution)

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        rng = np.random.default_rng([self.seed, trial.number])
        states = (TrialState.COMPLETE, TrialState.RUNNING)
        trials = [t for t in study.get_trials(deepcopy=False, states=states) if "plan" in t.user_attrs]
        scored = Scored.of(self.problem, [t for t in trials if t.state == TrialState.COMPLETE])
        scored = scored if self.earlier is None else scored + self.earlier
        taken = Scored.of(self.problem, trials)
        cost_share = self.problem.spread_cost_share(self.seed + trial.number) if self.problem.for_front else None
        projector = self.problem.projector(cost_share)
        if len(scored) < FIRST_TRIALS + len(self.problem.space.dimensions) // DIMENSIONS_A_TRIAL:
            widths, criterion = self._random(projector, trial.number, rng)
        else:
            widths, criterion = self._best(projector, scored, taken, rng)
        shares = widths / self.problem.space.sizes
        shares = np.clip(shares / shares.max(), *self.problem.shares)
        parameters: dict[str, Any] = dict(zip(self.problem.space.dimensions, shares.tolist(), strict=True))
        if cost_share is not None:
            parameters[COST_SHARE] = cost_share
        if CRITERION in search_space:
            parameters[CRITERION] = self.problem.space.criteria[criterion]
        return parameters

    def _random(self, projector: Projector, number: int, rng: np.random.Generator) -> tuple[NDArray[np.int64], int]:
        criterion = number % len(self.problem.space.criteria)
        count = len(self.problem.space.dimensions)
        shares = np.exp(FIRST_SPREAD * rng.standard_normal(count))
        shares[rng.random(count) < rng.uniform(0, STARVED)] *= STARVED_SHARE
        return projector.fill(shares, self.problem.space.criteria[criterion]), criterion

    def _best(
        self, projector: Projector, scored: Scored, taken: Scored, rng: np.random.Generator
    ) -> tuple[NDArray[np.int64], int]:
        space = self.problem.space
        scored = self._relevant(projector, scored)
        on_budget = self._projected(projector, scored.widths / space.sizes, scored.criteria)
        top = int(np.argmax(scored.values))
        origin = self.problem.coordinates.of(on_budget[[top]], scored.criteria[[top]])[0]
        surrogate = Surrogate(self._points(scored.widths, scored.criteria, origin), scored.values, rng, self._start)
        self._start = surrogate.hyperparameters
        means, _ = surrogate.predict(self._points(on_budget, scored.criteria, origin))
        best = np.argsort(-means)[:CENTRES]
        incumbent, pool = float(means.max()), Scored(on_budget[best], scored.criteria[best], means[best])
        known = {(*row, criterion) for row, criterion in zip(taken.widths.tolist(), taken.criteria, strict=True)}
        centres = pool
        for spreads in _ROUNDS:
            steps = [
                self._changed(centres, spreads, rng),
                self._climbed(centres, self._slopes(projector, surrogate, centres, origin), rng),
            ]
            shares, criteria = (np.concatenate(parts) for parts in zip(*steps, strict=True))
            widths = self._projected(projector, shares, criteria)
            gains = expected_improvement(*surrogate.predict(self._points(widths, criteria, origin)), incumbent)
            pool = Scored(widths, criteria, gains) if centres is pool else pool + Scored(widths, criteria, gains)
            pool = pool[np.argsort(-pool.values)]
            centres = pool[:CENTRES]
        found = self._first_unknown(projector, pool, known)
        # Where all that look good are known, the search has converged: chance may find what the surrogate does not see.
        return found or self._random(projector, int(rng.integers(len(space.criteria))), rng)

    def _first_unknown(
        self, projector: Projector, pool: Scored, known: set[tuple[int, ...]]
    ) -> tuple[NDArray[np.int64], int] | None:
        """The first plan of ``pool`` that is not ``known`` when it is filled up, of so many."""
        rows = zip(pool.widths.tolist(), pool.criteria.tolist(), strict=True)
        for *row, criterion in itertools.islice(dict.fromkeys((*row, name) for row, name in rows), MOST_FILLS):
            widths = projector.fill(np.array(row) / self.problem.space.sizes, self.problem.space.criteria[criterion])
            if (*widths.tolist(), criterion) not in known:
                return widths, criterion
        return None

    def _relevant(self, projector: Projector, scored: Scored) -> Scored:
        if len(scored) <= MOST_TRIALS:
            return scored
        far = np.abs(projector.excess(scored.widths)) if self.problem.for_front else np.zeros(len(scored))
        latest = np.arange(len(scored))[::-1]
        ranks = np.minimum(np.argsort(np.argsort(-scored.values)), latest)
        return scored[np.sort(np.lexsort([ranks, far])[:MOST_TRIALS])]

    def _points(self, widths: NDArray[np.integer], criteria: NDArray[np.int64], origin: Array) -> Array:
        """What the surrogate sees: coordinates of the widths from ``origin``, and which criterion it is."""
        points = self.problem.coordinates.of(widths, criteria) - origin
        count = len(self.problem.space.criteria)
        return points if count == 1 else np.hstack([points, FIRST_SPREAD * np.eye(count)[criteria]])

    def _changed(
        self, centres: Scored, spreads: tuple[float, ...], rng: np.random.Generator
    ) -> tuple[Array, NDArray[np.int64]]:
        """Shares ``(POOL, dimensions)`` near ``centres``, changed at random, and criteria."""
        space = self.problem.space
        chosen = centres[rng.integers(len(centres), size=POOL)]
        size = chosen.widths.shape
        is_changed = rng.random(size) < rng.choice(_CHANGED, size=(POOL, 1))
        steps = rng.choice(spreads, size=(POOL, 1)) * rng.standard_normal(size) * is_changed
        is_leaping = rng.random(size) < rng.choice(_LEAPERS, size=(POOL, 1)) / size[1]
        is_leaping[LEAPING:] = False
        steps += rng.choice(_LEAPS, size=size) * is_leaping
        criteria = chosen.criteria
        if len(space.criteria) > 1:
            anew = rng.random(POOL) < 1 / len(space.criteria)
            criteria = np.where(anew, rng.integers(len(space.criteria), size=POOL), criteria)
        return chosen.widths / space.sizes * np.exp(steps), criteria

    def _climbed(self, centres: Scored, slopes: Array, rng: np.random.Generator) -> tuple[Array, NDArray[np.int64]]:
        """Shares ``(CLIMBED, dimensions)``: steps from ``centres`` along ``slopes``, one a centre, and criteria."""
        chosen = rng.integers(len(centres), size=CLIMBED)
        lengths = np.exp(rng.uniform(np.log(_CLIMBS[0]), np.log(_CLIMBS[1]), (CLIMBED, 1)))
        is_climbing = rng.random((CLIMBED, slopes.shape[1])) < rng.choice(_CLIMBING, size=(CLIMBED, 1))
        shares = centres.widths[chosen] / self.problem.space.sizes * np.exp(lengths * slopes[chosen] * is_climbing)
        return shares, centres.criteria[chosen]

    def _slopes(self, projector: Projector, surrogate: Surrogate, centres: Scored, origin: Array) -> Array:
        """Directions ``(centres, dimensions)`` in which the surrogate rises most at equal cost, of mean square one."""
        dimensions = centres.widths.shape[1]
        slopes = surrogate.slopes(self._points(centres.widths, centres.criteria, origin))[:, :dimensions]
        slopes = slopes * self.problem.coordinates.slopes(centres.widths, centres.criteria)
        names = [self.problem.space.criteria[criterion] for criterion in centres.criteria]
        costs = np.array([self._cost_slopes(projector, *each) for each in zip(centres.widths, names, strict=True)])
        along = (slopes * costs).sum(1, keepdims=True) / np.maximum((costs**2).sum(1, keepdims=True), 1e-12)
        slopes = slopes - along * costs
        return np.asarray(slopes / (np.sqrt((slopes**2).mean(1, keepdims=True)) + 1e-12))

    def _cost_slopes(self, projector: Projector, widths: NDArray[np.int64], criterion: str) -> Array:
        """How the tightest limit rises with the logarithm of each width ``(dimensions,)``; 0 where one is the least."""
        fewer = self.problem.space.round_widths(0.75 * widths.astype(np.float64))
        rows = np.vstack([np.where(np.eye(len(widths), dtype=bool), fewer, widths), widths])
        excess = projector.excess(rows, criterion)
        changes = np.log(fewer / widths)
        is_fewer = changes < 0
        return np.where(is_fewer, (excess[:-1] - excess[-1]) / np.where(is_fewer, changes, 1.0), 0.0)

    def _projected(self, projector: Projector, shares: Array, criteria: NDArray[np.int64]) -> NDArray[np.int64]:
        widths = np.empty(shares.shape, dtype=np.int64)
        for index, name in enumerate(self.problem.space.criteria):
            chosen = criteria == index
            if chosen.any():
                widths[chosen] = projector.scale(shares[chosen], name)
        return widths


def expected_improvement(means: Array, deviations: Array, incumbent: float) -> Array:
    """Of normal variables over ``incumbent``, in the units of ``means``."""
    z = (means - incumbent) / deviations
    density = np.exp(-z * z / 2) / math.sqrt(2 * math.pi)
    gain: Array = deviations * (z * ndtr(z) + density)
    return gain
