"""Samplers on synthetic spaces with a known landscape: no models, only the question which plan to try next.

Run: python -m benchmarks.sampling [--groups 30,100,300] [--losses growing,bounded] [--budget 0.5] [--trials 100]
     [--seeds 3] [--samplers ...] [--out FILE]

A space has groups of 16, 32 or 64 units, costs that are products of widths (as of neighbouring layers), and a loss with
sensitivities that differ a hundredfold, and pairwise interactions. ``growing``: it grows exponentially with the
logarithm of what a group loses. ``bounded``: a group without units loses no more than its sensitivity, as a residual
block does, and fits tell samplers what is lost of each alone. Values are minus the logarithm of the loss, with noise.
Regret: how far the best plan so far is behind the best one that an evolution strategy of 800,000 evaluations finds.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import optuna
from numpy.typing import NDArray

from prunefront.search.budget import Limits
from prunefront.search.problem import Problem
from prunefront.search.samplers import make_sampler, shares_for
from prunefront.search.warm_start import Earlier
from prunefront.spaces import Cost

NOISE = 0.02
SHOWN = (10, 30, 60, 100, 200)


class SyntheticSpace:
    """What :class:`prunefront.search.problem.Problem` asks of a space."""

    criteria = ("synthetic",)

    def __init__(self, groups: int, seed: int) -> None:
        rng = np.random.default_rng(seed)
        self.dimensions = tuple(f"g{index}" for index in range(groups))
        self.tied_groups = [[SimpleNamespace(name=name)] for name in self.dimensions]
        self.sizes = rng.choice([16, 32, 64], groups)
        self._unit = np.exp(rng.normal(0, 0.5, groups)) / self.sizes
        self._neighbour = rng.integers(0, groups, groups)
        self._sensitivity, self._power = np.exp(rng.normal(0, 1, groups)), np.exp(rng.normal(0, 0.3, groups))
        self._pairs = rng.integers(0, groups, (2, 2 * groups))
        strengths = np.sqrt(self._sensitivity[self._pairs]).prod(0)
        self._interaction = 0.5 * rng.normal(0, 1, 2 * groups) * strengths

    @property
    def dense_cost(self) -> Cost:
        return Cost(*self.cost_batch(self.sizes[None])[0])

    def lost_outputs(self, criterion: str) -> list[None]:
        return [None] * len(self.sizes)

    def cost_batch(
        self, widths: NDArray[np.integer], criterion: str | None = None, columns: Sequence[int] = ()
    ) -> NDArray[np.float64]:
        """All columns are the same, and are computed at once."""
        shares = widths / self.sizes
        macs = (self._unit * widths * (0.5 + 0.5 * shares[:, self._neighbour])).sum(1)
        return np.column_stack([macs, macs, macs, macs])

    def smallest_widths(self) -> NDArray[np.int64]:
        return np.ones(len(self.sizes), dtype=np.int64)

    def smallest_costs(self) -> NDArray[np.float64]:
        return self.cost_batch(self.smallest_widths()[None])[0]

    def next_widths(self, widths: NDArray[np.integer]) -> NDArray[np.int64]:
        return np.minimum(widths + 1, self.sizes)

    def round_widths(self, widths: NDArray[np.float64]) -> NDArray[np.int64]:
        return np.clip(np.round(widths), 1, self.sizes).astype(np.int64)

    def value(self, widths: NDArray[np.integer]) -> NDArray[np.float64]:
        """Minus the logarithm of the loss of plans ``(plans, groups)``."""
        removed = np.log(self.sizes / widths)
        loss = (self._sensitivity * np.expm1(self._power * removed)).sum(1)
        loss += (self._interaction * removed[:, self._pairs[0]] * removed[:, self._pairs[1]]).sum(1)
        whole = self._sensitivity.sum()
        return -np.log(np.maximum(loss, 0.02 * whole) / whole)


class BoundedSpace(SyntheticSpace):
    """Losses of groups are powers of the share of units that is gone."""

    def __init__(self, groups: int, seed: int) -> None:
        super().__init__(groups, seed)
        self._power = np.exp(np.random.default_rng([seed, 1]).normal(0.5, 0.5, groups))

    def lost_outputs(self, criterion: str) -> list[Any]:
        return [(1 - np.arange(size + 1) / size) ** power for size, power in zip(self.sizes, self._power, strict=True)]

    def value(self, widths: NDArray[np.integer]) -> NDArray[np.float64]:
        gone = 1 - widths / self.sizes
        loss = (self._sensitivity * gone**self._power).sum(1)
        loss += (self._interaction * gone[:, self._pairs[0]] * gone[:, self._pairs[1]]).sum(1)
        whole = self._sensitivity.sum()
        return np.asarray(-np.log(np.maximum(loss, 0.02 * whole) / whole))


SPACES = {"growing": SyntheticSpace, "bounded": BoundedSpace}


@dataclass(frozen=True)
class Outcome:
    regret: list[float]
    seconds: float


def best_known(problem: Problem, space: SyntheticSpace, seed: int, rounds: int = 400, pool: int = 512) -> float:
    """By an evolution strategy on the noiseless value, many times longer than any search here, from several starts."""
    rng = np.random.default_rng(seed)
    projector, size = problem.projector(), (pool, len(space.sizes))
    tops = []
    for spread, step in ((0.0, 0.3), (0.3, 1.0), (1.0, 1.0), (1.0, 1.0)):
        centre, best = np.exp(spread * rng.standard_normal(len(space.sizes))), -np.inf
        for _ in range(rounds):
            is_changed = rng.random(size) < rng.choice([0.05, 0.3])
            widths = projector.scale(centre * np.exp(step * rng.standard_normal(size) * is_changed))
            values = space.value(widths)
            if values.max() > best:
                best, centre = float(values.max()), widths[values.argmax()] / space.sizes
            else:
                step = max(0.02, 0.97 * step)
        tops.append(best)
    return max(tops)


@lru_cache
def posed(losses: str, budget: float, groups: int, seed: int) -> tuple[SyntheticSpace, Problem, float]:
    """The same for all samplers: space, problem, and the best value that is known."""
    space = SPACES[losses](groups, seed)
    dense = float(space.cost_batch(space.sizes[None])[0, 0])
    problem = Problem(cast(Any, space), Limits((budget * dense, *[np.inf] * 4)), "macs")
    return space, problem, best_known(problem, space, seed)


def run(sampler: str, losses: str, budget: float, groups: int, seed: int, trials: int) -> Outcome:
    space, problem, top = posed(losses, budget, groups, seed)
    rng = np.random.default_rng(seed)
    study = optuna.create_study(direction="maximize")
    problem = replace(problem, shares=shares_for(sampler, study))
    study.sampler = make_sampler(sampler, problem, trials, seed, Earlier())
    study.enqueue_trial(problem.starts()[0])
    values, started = [], time.perf_counter()
    for _ in range(trials):
        trial = study.ask(problem.distributions)
        shares = np.array([trial.params[name] for name in space.dimensions])
        widths = problem.projector().fill(shares)
        named = dict(zip(space.dimensions, widths.tolist(), strict=True))
        trial.set_user_attr("plan", {"widths": named, "criterion": "synthetic"})
        values.append(float(space.value(widths[None])[0]))
        study.tell(trial, values[-1] + NOISE * rng.standard_normal())
    regret = top - np.maximum.accumulate(values)
    return Outcome([float(regret[min(n, trials) - 1]) for n in SHOWN if n <= trials], time.perf_counter() - started)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--groups", default="30,100,300")
    parser.add_argument("--losses", default=",".join(SPACES))
    parser.add_argument("--budget", type=float, default=0.5, help="of the dense cost")
    parser.add_argument("--trials", type=int, default=100)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--samplers", default="surrogate,allocation,gp,cmaes,tpe,random")
    parser.add_argument("--out")
    options = parser.parse_args()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    warnings.simplefilter("ignore")
    shown = [n for n in SHOWN if n <= options.trials]
    print(f"| losses | groups | sampler | {' | '.join(f'regret after {n}' for n in shown)} | ms a trial |")
    print("| --- " * (len(shown) + 4) + "|")
    rows = []
    several = (options.losses.split(","), map(int, options.groups.split(",")), options.samplers.split(","))
    for losses, groups, sampler in itertools.product(*several):
        outcomes = [run(sampler, losses, options.budget, groups, s, options.trials) for s in range(options.seeds)]
        regret = np.mean([outcome.regret for outcome in outcomes], axis=0)
        ms = 1e3 * np.mean([outcome.seconds for outcome in outcomes]) / options.trials
        row = {"losses": losses, "groups": groups, "sampler": sampler, "regret": regret.tolist(), "trial_ms": ms}
        rows.append(row)
        cells = " | ".join(f"{value:.2f}" for value in regret)
        print(f"| {losses} | {groups} | {sampler} | {cells} | {ms:.0f} |", flush=True)
    if options.out:
        with open(options.out, "w", encoding="utf-8") as file:
            json.dump({"trials": shown, "seeds": options.seeds, "budget": options.budget, "rows": rows}, file, indent=1)


if __name__ == "__main__":
    main()
