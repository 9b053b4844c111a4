"""Samplers by name."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import optuna
from optuna.samplers import BaseSampler

from ..spaces.errors import ConfigError
from .allocation import AllocationSampler
from .problem import Problem
from .sampler import SurrogateSampler
from .warm_start import Earlier

SAMPLERS = ("auto", "surrogate", "allocation", "gp", "cmaes", "tpe", "nsga2", "random")
#: Of these one objective is all that they can take.
SINGLE = ("cmaes",)


def make_sampler(
    sampler: str | BaseSampler, problem: Problem, n_trials: int, seed: int, earlier: Earlier
) -> BaseSampler:
    """The sampler behind a name: ``surrogate`` (also ``auto``) and ``allocation`` are ours, the others Optuna's.

    Raises:
        ConfigError: unknown name, or a sampler that cannot serve the mode.
    """
    if isinstance(sampler, BaseSampler):
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


def check_sampler(name: str, for_front: bool) -> None:
    """Raises ConfigError for an unknown name, or a sampler that cannot serve the mode."""
    if name not in SAMPLERS:
        raise ConfigError(f"unknown sampler {name!r}; expected one of {', '.join(SAMPLERS)}, or an Optuna sampler")
    if for_front and name in SINGLE:
        raise ConfigError(
            f"sampler {name} has a single objective; with mode=front use surrogate, allocation, tpe, nsga2 or gp"
        )
