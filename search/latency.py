"""Latency of any plan, predicted from a few dozen that were measured on the target.

The time of a model is additive over its operators to first order. Features of a plan are the MACs of every operator
and the total costs, all relative to the dense model, and the relative widths. Kernels work in blocks of so many
channels, and take a slower path where a size is no multiple of some number: MACs of whole blocks, and of such
operators, are features too, where that predicts better in cross-validation.
A Gaussian process with a linear kernel on all of them learns what each one costs, drawn towards equal costs of all
operators by a strong prior on their sum; a smooth kernel is added where that predicts better.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..spaces import Space
from ..spaces.errors import BudgetError, PlanError
from .budget import Limits
from .pace import SLOWER, steady

#: Folds of cross-validation, and the fewest plans that a model can be made of.
FOLDS, LEAST = 8, 4
#: Plans that are predicted this share off a budget's tightest limit, either way, are near it; the last few of them tell
#: the error there.
NEAR, LAST = 0.1, 8
#: What sizes of operators may have to be multiples of to be fast; of the blocks that kernels work in.
EVEN, BLOCKS = (1, 2, 4, 8, 16), (1, 8, 16, 32)
_RIDGES = np.logspace(-8, 0, 9)
_SMOOTH = (0.0, 0.01, 0.1)


@dataclass(frozen=True)
class Measured:
    """A measured plan: its widths ``(dimensions,)`` and its time relative to the dense model's, which took ``dense_ms``
    beside it; ``predicted``: what the model of the plans before said about it."""

    widths: tuple[int, ...]
    ratio: float
    dense_ms: float
    predicted: float | None = None


@dataclass(frozen=True)
class Failed:
    """A plan that the target cannot measure, and why."""

    widths: tuple[int, ...]
    reason: str


@dataclass(frozen=True)
class Measurements:
    """What is known of the plans of a space on a target."""

    measured: tuple[Measured, ...] = ()
    failed: tuple[Failed, ...] = ()
    #: By how much the dense model's time may vary at the machine's usual pace.
    slower: float = SLOWER

    @property
    def dense_ms(self) -> float:
        return statistics.median(plan.dense_ms for plan in self.steady)

    @property
    def steady(self) -> tuple[Measured, ...]:
        """What was measured at the machine's usual pace, see :mod:`.pace`."""
        if not self.measured:
            return ()
        usual = steady([plan.dense_ms for plan in self.measured], self.slower)
        return tuple(itertools.compress(self.measured, usual))

    @property
    def seen(self) -> set[tuple[int, ...]]:
        return {plan.widths for plan in self.measured} | {plan.widths for plan in self.failed}

    def to_json(self) -> dict[str, Any]:
        return {
            "measured": [[list(plan.widths), plan.ratio, plan.dense_ms, plan.predicted] for plan in self.measured],
            "failed": [[list(plan.widths), plan.reason] for plan in self.failed],
            "slower": self.slower,
        }

    @classmethod
    def from_json(cls, held: Mapping[str, Any], dimensions: int) -> Measurements:
        """Raises KeyError, TypeError or ValueError for what is not of a space with so many dimensions."""
        measured = [
            Measured(
                _widths(widths, dimensions),
                float(ratio),
                float(dense_ms),
                None if predicted is None else float(predicted),
            )
            for widths, ratio, dense_ms, predicted in held["measured"]
        ]
        failed = [Failed(_widths(widths, dimensions), str(reason)) for widths, reason in held["failed"]]
        if not all(plan.ratio > 0 and plan.dense_ms > 0 for plan in measured):
            raise ValueError("a time must be positive")
        return cls(tuple(measured), tuple(failed), float(held.get("slower", SLOWER)))


def _widths(widths: Sequence[Any], dimensions: int) -> tuple[int, ...]:
    if len(widths) != dimensions:
        raise ValueError(f"{len(widths)} widths for {dimensions} dimensions")
    return tuple(int(width) for width in widths)


class LatencyModel:
    """Predicts relative latency, ``(plans, dimensions)`` widths to ``(plans,)`` ratios to the dense model.

    ``error``: mean absolute percentage error in cross-validation, by which the features were chosen too; ``tau``:
    Kendall's rank correlation there; ``error_ahead``: that of the last plans, as they were predicted before they were
    measured, and ``error_near`` of those near ``limits``; None with too few of them.
    """

    def __init__(self, space: Space, known: Measurements, limits: Limits | None = None) -> None:
        measured = known.steady
        if len(measured) < LEAST:
            raise PlanError(f"a latency model needs at least {LEAST} measured plans, not {len(measured)}")
        self.space, self.known, self.measured, self.dense_ms = space, known, measured, known.dense_ms
        widths, y = np.array([m.widths for m in measured]), np.array([m.ratio for m in measured])
        self._features = _Features(space)
        best, held_out, tried = (Steps(), 0.0, 1.0), np.ones_like(y), math.inf
        for steps in STEPS:
            x = self._features(widths, steps)
            for smooth in _SMOOTH:
                kernel = _kernel(x, x, smooth)
                for ridge in _RIDGES:
                    predicted = _held_out(kernel, y, ridge)
                    if (error := float(np.abs(predicted / y - 1).mean())) < tried:
                        best, held_out, tried = (steps, smooth, ridge), predicted, error
        self.steps, smooth, ridge = best
        self.error, self.tau = tried, _tau(held_out, y)
        self._fit = _fit(self._features(widths, self.steps), y, smooth, ridge)
        self.error_ahead = self._error_ahead(None)
        self.error_near = None if limits is None else self._error_ahead(limits)

    def ratios(self, widths: NDArray[np.integer], criterion: str | None = None) -> NDArray[np.float64]:
        return self._fit(self._features(widths, self.steps, criterion))

    def _error_ahead(self, limits: Limits | None) -> float | None:
        """Projection picks what is predicted too fast, so only what was predicted before it was measured counts."""
        told = [plan for plan in self.measured if plan.predicted is not None]
        if not told:
            return None
        widths = np.array([plan.widths for plan in told])
        predicted, ratios = (np.array([getattr(plan, name) for plan in told]) for name in ("predicted", "ratio"))
        errors = np.abs(predicted / ratios - 1)
        if limits is not None:
            costs = np.column_stack([self.space.cost_batch(widths), predicted])
            errors = errors[np.abs(limits.excess(costs)) <= NEAR]
        errors = errors[-LAST:]
        return float(errors.mean()) if len(errors) >= LEAST else None

    def to_json(self) -> dict[str, Any]:
        return {
            "dense_ms": self.dense_ms,
            "error": self.error,
            "error_ahead": self.error_ahead,
            "error_near": self.error_near,
            "tau": self.tau,
            **self.known.to_json(),
        }


@dataclass(frozen=True)
class Steps:
    """How kernels take sizes that suit them badly: as the next multiple of ``block``; and slowly where what is summed
    over is no multiple of ``inputs``, or ``any`` dimension is none of that."""

    block: int = 1
    inputs: int = 1
    any: int = 1


class _Features:
    """Features of plans, ``(plans, dimensions)`` widths to ``(plans, features)``."""

    def __init__(self, space: Space) -> None:
        self._space = space
        self._dense_costs = space.cost_batch(space.sizes[None])
        self._dense_macs = max(float(self._dense_costs[0, 0]), 1.0)

    def __call__(self, widths: NDArray[np.integer], steps: Steps, criterion: str | None = None) -> NDArray[np.float64]:
        space = self._space
        factors, sizes = space.operators(widths, criterion)
        shares = factors * sizes.prod(2) / self._dense_macs
        costs = space.cost_batch(widths, criterion) / self._dense_costs
        # Weights are drawn towards zero: the larger a feature, the freer its weight.
        parts = [np.full((len(widths), 1), 3.0), 3 * costs, 3 * shares]
        if steps.block > 1:
            whole = np.where(sizes > 1, np.ceil(sizes / steps.block) * steps.block, 1)
            shares = factors * whole.prod(2) / self._dense_macs
            parts += [3 * shares, 3 * shares.sum(1, keepdims=True)]
        for even, part in ((steps.inputs, sizes[:, :, :1]), (steps.any, sizes)):
            if even > 1:
                slow = shares * ((part % even != 0) & (part > 1)).any(2)
                parts += [3 * slow, 3 * slow.sum(1, keepdims=True)]
        parts.append(0.3 * widths / (space.sizes * np.sqrt(widths.shape[1])))
        return np.concatenate(parts, axis=1)


#: Those that are tried.
STEPS = [
    *(Steps(block=block) for block in BLOCKS),
    *(Steps(block, even, 1) for block in BLOCKS for even in EVEN[1:]),
    *(Steps(block, even, even) for block in BLOCKS for even in EVEN[1:]),
]


def _kernel(a: NDArray[np.float64], b: NDArray[np.float64], smooth: float) -> NDArray[np.float64]:
    return a @ b.T + (smooth * _near(a, b) if smooth else 0.0)


def _near(a: NDArray[np.float64], b: NDArray[np.float64]) -> NDArray[np.float64]:
    distances = (a**2).sum(1)[:, None] + (b**2).sum(1)[None] - 2 * a @ b.T
    return np.asarray(np.exp(-np.maximum(distances, 0) / 2))


def _fit(
    x: NDArray[np.float64], y: NDArray[np.float64], smooth: float, ridge: float
) -> Callable[[NDArray[np.float64]], NDArray[np.float64]]:
    weights = _weights(_kernel(x, x, smooth), y, ridge)
    linear = x.T @ weights

    def predict(new: NDArray[np.float64]) -> NDArray[np.float64]:
        predicted: NDArray[np.float64] = new @ linear
        if smooth:
            predicted += smooth * (_near(new, x) @ weights)
        return np.maximum(predicted, 1e-6)

    return predict


def _weights(kernel: NDArray[np.float64], y: NDArray[np.float64], ridge: float) -> NDArray[np.float64]:
    # Relative errors count: residuals are divided by the time.
    return np.asarray(np.linalg.solve(kernel + ridge * np.diag(y**2), y))


def _held_out(kernel: NDArray[np.float64], y: NDArray[np.float64], ridge: float) -> NDArray[np.float64]:
    """Predictions of every plan by a fit without its fold."""
    folds = np.arange(len(y)) % FOLDS
    predicted = np.empty_like(y)
    for fold in np.unique(folds):
        inside = folds != fold
        weights = _weights(kernel[inside][:, inside], y[inside], ridge)
        predicted[~inside] = np.maximum(kernel[~inside][:, inside] @ weights, 1e-6)
    return predicted


def _tau(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
    from scipy.stats import kendalltau

    found = float(kendalltau(a, b).statistic)
    return found if math.isfinite(found) else 0.0  # all are alike


def check_latency(model: LatencyModel, limit_ratio: float) -> None:
    """Raises BudgetError, naming the floor, when no plan is predicted to be that fast."""
    floor = float(model.ratios(model.space.smallest_widths()[None])[0])
    if floor > limit_ratio:
        raise BudgetError(
            f"budget latency<={limit_ratio * model.dense_ms:.3g} ms ({limit_ratio:.0%} of the dense model): the "
            f"smallest candidate in this space takes {floor * model.dense_ms:.3g} ms on the target; raise the limit"
        )
