"""From a plan to a scored candidate, with the time of every part."""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from ..spaces import Plan, Space
from ..spaces.calibration import precision
from ..spaces.errors import ConfigError
from ..spaces.trace import evaluating
from .racing import Raced, race
from .scores import SampleScore
from .tuning import Report, Tuning, unwatched

Score = Callable[[nn.Module], float]


class Timer:
    """Seconds by part."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] += time.perf_counter() - start


class Candidates:
    """Builds, repairs, perhaps trains, and scores the candidates of one space."""

    def __init__(self, space: Space, autocast: torch.dtype | None, tuning: Tuning | None = None) -> None:
        self.space, self.autocast, self.tuning = space, autocast, tuning
        self.timer = Timer()

    def prepare(self, plan: Plan, effort: str, report: Report = unwatched) -> nn.Module:
        """The candidate in evaluation mode, repaired, and trained where there is a tuning, which ``report`` watches."""
        with self.timer.part("build"):
            candidate = self.space.build(plan).eval()
        with self.timer.part("recalibrate"):
            candidate = self.space.repair(candidate, plan, effort)
        if self.tuning is None:
            return candidate
        with self.timer.part("finetune"):
            return self.tuning(candidate, report)

    def race(self, model: nn.Module, guide: SampleScore, rival: NDArray[np.float64] | None) -> Raced:
        """Raises ValueError where the score is not finite."""
        with self.timer.part("score"), precision(model, self.autocast):
            raced = race(model, guide, rival)
        checked_score(raced.score, "score")
        return raced

    def score(self, model: nn.Module, function: Score, name: str) -> float:
        """Raises TypeError or ValueError unless ``function`` returns a finite number."""
        with self.timer.part(name), precision(model, self.autocast):
            return checked_score(function(model), name)

    def score_dense(self, function: Score, name: str) -> float:
        """Of the dense model, see :func:`score_dense`."""
        with self.timer.part(name):
            return score_dense(self.space.model, function, name, self.autocast)


def score_dense(model: nn.Module, function: Score, name: str, autocast: torch.dtype | None) -> float:
    """What ``function`` gives for the dense model, in evaluation mode.

    Raises:
        ConfigError: it fails; ``name`` says what that is.
    """
    try:
        with evaluating(model), precision(model, autocast):
            return checked_score(function(model), name)
    except Exception as error:
        raise ConfigError(f"{name} fails on the dense model: {type(error).__name__}: {error}") from error


def checked_score(value: Any, name: str) -> float:
    """``value``, a number or a tensor without dimensions, as a finite float."""
    if isinstance(value, torch.Tensor | np.ndarray) and value.ndim == 0:
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, int | float | np.floating | np.integer):
        raise TypeError(f"{name} must return one number, not {type(value).__name__}")
    if not math.isfinite(value):
        raise ValueError(f"{name} returned {value}")
    return float(value)
