"""Measurements of latency: times of several models side by side on a target, and the conditions."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

from torch import nn

from ..spaces.inputs import Inputs
from ..spaces.trace import evaluating
from .protocol import interval

#: Other work on this many processors makes times unreliable.
BUSY = 0.3
#: Runs from which the 90th percentile is told.
P90_RUNS = 64


@dataclass(frozen=True)
class Measurement:
    """Milliseconds of one forward pass: median with its 95 % interval; ``ratio``: the same relative to the reference,
    round by round."""

    median_ms: float
    low_ms: float
    high_ms: float
    p90_ms: float | None
    runs: int
    ratio: float
    ratio_low: float
    ratio_high: float
    conditions: Mapping[str, Any] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()

    @property
    def differs(self) -> bool:
        """Whether the time differs from the reference's by more than the noise."""
        return not self.ratio_low <= 1 <= self.ratio_high

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Settings:
    """When to stop: the interval of every median ratio is within ``tolerance`` on either side, or after ``limit_s``."""

    tolerance: float = 0.01
    limit_s: float = 10.0
    warm_up_s: float = 0.3
    least_rounds: int = 12
    seed: int = 0


class Target(Protocol):
    """A machine with a runtime. ``description`` identifies both: times of equal descriptions may be compared."""

    description: Mapping[str, Any]

    def times(
        self, models: Sequence[nn.Module], inputs: Inputs, settings: Settings
    ) -> tuple[list[list[float]], dict[str, Any]]:
        """Seconds by model and round, and the conditions.

        Raises:
            TargetError: it cannot measure these models; the message says why and what to do.
        """


def measure(
    model: nn.Module | Sequence[nn.Module],
    example_inputs: Any,
    target: Target,
    reference: nn.Module | None = None,
    settings: Settings | None = None,
) -> Any:
    """Time ``model`` on ``target``, side by side with ``reference``: a :class:`Measurement`, or one a model.

    Without a reference the first model is its own. Models are put into evaluation mode and back.

    Raises:
        TargetError: see :class:`Target`.
    """
    models = [model] if isinstance(model, nn.Module) else list(model)
    every = models if reference is None else [reference, *models]
    found = side_by_side(every, Inputs.of(example_inputs), target, settings or Settings())[len(every) - len(models) :]
    return found[0] if isinstance(model, nn.Module) else found


def side_by_side(models: Sequence[nn.Module], inputs: Inputs, target: Target, settings: Settings) -> list[Measurement]:
    """Measurements of ``models``, of which the first is the reference."""
    start = time.perf_counter()
    with ExitStack() as modes:
        for model in models:
            modes.enter_context(evaluating(model))
        samples, conditions = target.times(models, inputs, settings)
    conditions["seconds"] = round(time.perf_counter() - start, 3)
    return [summary(values, samples[0], conditions) for values in samples]


def summary(samples: Sequence[float], reference: Sequence[float], conditions: Mapping[str, Any]) -> Measurement:
    """Medians, intervals, and what makes them doubtful, of seconds by round."""
    low, median, high = interval(samples)
    ratio_low, ratio, ratio_high = interval([a / b for a, b in zip(samples, reference, strict=True)])
    p90 = sorted(samples)[int(0.9 * len(samples))] if len(samples) >= P90_RUNS else None
    warnings = []
    if (conditions.get("load") or 0) > BUSY:
        warnings.append(f"other work kept {conditions['load']} processors busy: measure again on a quiet machine")
    if samples is not reference and ratio_low <= 1 <= ratio_high:
        warnings.append("the difference from the reference is inside the noise")
    return Measurement(
        1e3 * median,
        1e3 * low,
        1e3 * high,
        None if p90 is None else 1e3 * p90,
        len(samples),
        ratio,
        ratio_low,
        ratio_high,
        dict(conditions),
        tuple(warnings),
    )
