"""Short fine-tuning inside a trial, given up where candidates of the past were better after as many steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
import optuna
from optuna.trial import FrozenTrial
from torch import nn

from ..spaces.errors import PrunefrontError

#: The attribute of a trial with its values by step.
STEPS = "steps"
#: Trials that must have come as far before one is given up.
LEAST_TRIALS = 5

Report = Callable[[int, nn.Module], None]


class Tuning(Protocol):
    """Trains a candidate for a moment; of equal ``description`` two do the same."""

    description: str

    def __call__(self, candidate: nn.Module, report: Report) -> nn.Module:
        """The trained candidate in evaluation mode. ``report`` is called with the number of steps done and the model,
        recalibrated and in evaluation mode; what it raises must be passed on."""


class GivenUp(PrunefrontError):
    """A candidate is worse than most others were after as many steps."""

    def __init__(self, step: int, value: float) -> None:
        super().__init__(f"given up after {step} steps of fine-tuning")
        self.step, self.value = step, value


class Watch:
    """Told of one trial's steps; raises :class:`GivenUp` below the median of the others, given-up ones included (after
    the median rule of Golovin et al. 2017, which compares averages up to the step).

    ``score``: what trials are told. ``others``: finished trials; along a front those that cost no more than ``cost``.
    """

    def __init__(
        self,
        trial: optuna.Trial,
        score: Callable[[nn.Module], float],
        others: Sequence[FrozenTrial],
        cost: float | None = None,
    ) -> None:
        self.trial, self.score, self.cost = trial, score, cost
        self.others: list[dict[str, Any]] = [
            t.user_attrs[STEPS] for t in others if STEPS in t.user_attrs and (cost is None or t.values[1] <= cost)
        ]
        self.values: dict[str, float] = {}

    def __call__(self, step: int, model: nn.Module) -> None:
        value = self.score(model)
        self.values[str(step)] = value
        self.trial.set_user_attr(STEPS, dict(self.values))
        if self.cost is None:
            self.trial.report(value, step)  # Optuna has no intermediate values for studies of two objectives
        there = [values[str(step)] for values in self.others if str(step) in values]
        if len(there) >= LEAST_TRIALS and value < float(np.median(there)):
            raise GivenUp(step, value)


def unwatched(step: int, model: nn.Module) -> None:
    """For models that are kept: nothing is reported."""
