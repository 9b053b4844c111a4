"""Measurements of latency: times of several models side by side on a target, and the conditions."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Protocol

from torch import nn

from ..spaces.inputs import Inputs
from ..spaces.trace import evaluating
from .protocol import BUSY, interval
from .shapes import check_inputs, inputs_at, shape_of

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
    batch_size: int | None = None,
    input_shapes: Sequence[Sequence[int]] = (),
) -> Any:
    """Time ``model`` on ``target``, side by side with ``reference``: a :class:`Measurement`, or one a model.

    Without a reference the first model is its own. Models are put into evaluation mode and back. ``batch_size``,
    ``input_shapes``: see :func:`.shapes.inputs_at`; of several shapes, times are those of one pass at each.

    Raises:
        TargetError: see :class:`Target`.
        ConfigError: shapes that are none of the model's.
    """
    models = [model] if isinstance(model, nn.Module) else list(model)
    every = models if reference is None else [reference, *models]
    inputs = inputs_at(Inputs.of(example_inputs), batch_size, input_shapes)
    check_inputs(every[0], inputs)
    found = side_by_side(every, inputs, target, settings or Settings())[len(every) - len(models) :]
    return found[0] if isinstance(model, nn.Module) else found


def side_by_side(
    models: Sequence[nn.Module], inputs: Sequence[Inputs], target: Target, settings: Settings
) -> list[Measurement]:
    """Measurements of ``models``, of which the first is the reference: one pass on each of ``inputs`` together.

    Conditions hold the milliseconds of every shape.
    """
    start = time.perf_counter()
    shared = replace(settings, limit_s=settings.limit_s / len(inputs))
    with ExitStack() as modes:
        for model in models:
            modes.enter_context(evaluating(model))
        found = [target.times(models, one, shared) for one in inputs]
    conditions = dict(found[0][1])
    loads = [facts["load"] for _, facts in found if facts.get("load") is not None]
    conditions |= {"load": max(loads, default=None), "seconds": round(time.perf_counter() - start, 3)}
    totals = []
    for rows in zip(*(samples for samples, _ in found), strict=True):  # of one model, by shape
        # Rounds are paired as they come: the shape with the fewest decides how many there are.
        total = [sum(values) for values in zip(*rows, strict=False)]
        by_shape = {shape_of(one): 1e3 * statistics.median(row) for one, row in zip(inputs, rows, strict=True)}
        totals.append((total, {**conditions, "shapes_ms": by_shape}))
    return [summary(total, totals[0][0], facts) for total, facts in totals]


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
