"""Samplers by name."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import optuna
from optuna.distributions import FloatDistribution
from optuna.samplers import BaseSampler

from ..spaces.errors import ConfigError
from .allocation import AllocationSampler
from .problem import ALL_SHARES, COST_SHARE, CRITERION, SHARES, Problem
from .sampler import SurrogateSampler
from .warm_start import Earlier

SAMPLERS = ("auto", "surrogate", "allocation", "gp", "cmaes", "tpe", "nsga2", "random")
#: Of these, ours: they choose widths, and the others shares.
OURS = ("auto", "surrogate", "allocation")
#: Of these one objective is all that they can take.
SINGLE = ("cmaes",)


def make_sampler(
    sampler: str | BaseSampler, problem: Problem, n_trials: int, seed: int, earlier: Earlier, is_fresh: bool = True
) -> BaseSampler:
    """The sampler behind a name: ``surrogate`` (also ``auto``) and ``allocation`` are ours, the others Optuna's.

    ``is_fresh``: whether no other process has drawn numbers for this study, which an object that is given would repeat.

    Raises:
        ConfigError: unknown name, or a sampler that cannot serve the mode.
    """
    if isinstance(sampler, BaseSampler):
        if not is_fresh:
            sampler.reseed_rng()
        return sampler
    check_sampler(sampler, problem.for_front)
    surrogate = partial(SurrogateSampler, problem, seed, earlier.scored)
    makers: dict[str, Callable[[], BaseSampler]] = {
        "auto": surrogate,
        "surrogate": surrogate,
        "allocation": lambda: AllocationSampler(problem, seed),
        "gp": lambda: optuna.samplers.GPSampler(seed=seed),
        "cmaes": lambda: optuna.samplers.CmaEsSampler(seed=seed),
        "tpe": lambda: optuna.samplers.TPESampler(seed=seed),
        # A generation of Optuna's default 50 would leave two generations to a search of 100 trials.
        "nsga2": lambda: optuna.samplers.NSGAIISampler(population_size=max(8, min(50, n_trials // 6)), seed=seed),
        "random": lambda: optuna.samplers.RandomSampler(seed=seed),
    }
    return makers[sampler]()


def shares_for(sampler: str | BaseSampler, study: optuna.Study) -> tuple[float, float]:
    """The range of shares in which ``sampler`` searches; of a study that has trials, theirs, since Optuna's samplers
    leave out parameters whose ranges change."""
    for trial in study.get_trials(deepcopy=False):
        for name, distribution in trial.distributions.items():
            if name not in (COST_SHARE, CRITERION) and isinstance(distribution, FloatDistribution):
                return distribution.low, distribution.high
    return ALL_SHARES if sampler in OURS else SHARES


def check_sampler(name: str, for_front: bool) -> None:
    """Raises ConfigError for an unknown name, or a sampler that cannot serve the mode."""
    if name not in SAMPLERS:
        raise ConfigError(f"unknown sampler {name!r}; expected one of {', '.join(SAMPLERS)}, or an Optuna sampler")
    if for_front and name in SINGLE:
        raise ConfigError(
            f"sampler {name} has a single objective; with mode=front use surrogate, allocation, tpe, nsga2 or gp"
        )
