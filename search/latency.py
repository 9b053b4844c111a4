"""Latency of any plan, predicted from a few dozen that were measured on the target.

The time of a model is additive over its operators to first order. Features of a plan are the MACs of every operator
and the total costs, all relative to the dense model, and the relative widths. A Gaussian process with a linear kernel
on them learns what each one costs, drawn towards equal costs of all operators by a strong prior on their sum; a smooth
kernel is added where that predicts better in cross-validation.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..spaces import Space
from ..spaces.errors import BudgetError, PlanError
from .budget import Limits

#: Folds of cross-validation, and the fewest plans that a model can be made of.
FOLDS, LEAST = 8, 4
#: Plans whose nearest limit is this share off, either way, are near a budget.
NEAR = 0.1
_RIDGES = np.logspace(-8, 0, 9)
_SMOOTH = (0.0, 0.01, 0.1)


@dataclass(frozen=True)
class Measured:
    """A measured plan: its widths ``(dimensions,)`` and its time relative to the dense model's."""

    widths: tuple[int, ...]
    ratio: float


@dataclass(frozen=True)
class Failed:
    """A plan that the target cannot measure, and why."""

    widths: tuple[int, ...]
    reason: str


@dataclass(frozen=True)
class Measurements:
    """What is known of the plans of a space on a target. ``dense_times_ms``: of the dense model, beside every few."""

    measured: tuple[Measured, ...] = ()
    failed: tuple[Failed, ...] = ()
    dense_times_ms: tuple[float, ...] = ()

    @property
    def dense_ms(self) -> float:
        return statistics.median(self.dense_times_ms)

    @property
    def seen(self) -> set[tuple[int, ...]]:
        return {plan.widths for plan in self.measured} | {plan.widths for plan in self.failed}

    def to_json(self) -> dict[str, Any]:
        return {
            "dense_times_ms": list(self.dense_times_ms),
            "measured": [[list(plan.widths), plan.ratio] for plan in self.measured],
            "failed": [[list(plan.widths), plan.reason] for plan in self.failed],
        }

    @classmethod
    def from_json(cls, held: Mapping[str, Any], dimensions: int) -> Measurements:
        """Raises KeyError, TypeError or ValueError for what is not of a space with so many dimensions."""
        measured = [Measured(_widths(widths, dimensions), float(ratio)) for widths, ratio in held["measured"]]
        failed = [Failed(_widths(widths, dimensions), str(reason)) for widths, reason in held["failed"]]
        times = tuple(float(value) for value in held["dense_times_ms"])
        if not all(value > 0 for value in (*times, *(plan.ratio for plan in measured))) or (measured and not times):
            raise ValueError("a time must be positive")
        return cls(tuple(measured), tuple(failed), times)


def _widths(widths: Sequence[Any], dimensions: int) -> tuple[int, ...]:
    if len(widths) != dimensions:
        raise ValueError(f"{len(widths)} widths for {dimensions} dimensions")
    return tuple(int(width) for width in widths)


class LatencyModel:
    """Predicts relative latency, ``(plans, dimensions)`` widths to ``(plans,)`` ratios to the dense model.

    ``error``: mean absolute percentage error in cross-validation; ``tau``: Kendall's rank correlation there.
    """

    def __init__(self, space: Space, known: Measurements) -> None:
        measured = known.measured
        if len(measured) < LEAST:
            raise PlanError(f"a latency model needs at least {LEAST} measured plans, not {len(measured)}")
        self.space, self.known, self.measured, self.dense_ms = space, known, measured, known.dense_ms
        dense = space.sizes[None]
        self._dense_costs, self._dense_macs = space.cost_batch(dense), max(float(space.operator_macs(dense).sum()), 1.0)
        x, y = self._features(np.array([m.widths for m in measured])), np.array([m.ratio for m in measured])
        tried = {(smooth, ridge): _held_out(x, y, smooth, ridge) for smooth in _SMOOTH for ridge in _RIDGES}
        best = min(tried, key=lambda key: float(np.abs(tried[key] / y - 1).mean()))
        self._errors = np.abs(tried[best] / y - 1)
        self.error = float(self._errors.mean())
        self.tau = _tau(tried[best], y)
        self._fit = _fit(x, y, *best)

    def ratios(self, widths: NDArray[np.integer], criterion: str | None = None) -> NDArray[np.float64]:
        return self._fit(self._features(widths, criterion))

    def _features(self, widths: NDArray[np.integer], criterion: str | None = None) -> NDArray[np.float64]:
        space = self.space
        shares = space.operator_macs(widths, criterion) / self._dense_macs
        costs = space.cost_batch(widths, criterion) / self._dense_costs
        relative = widths / space.sizes
        count = np.sqrt(relative.shape[1])
        # Weights are drawn towards zero: the larger a feature, the freer its weight.
        return np.column_stack([np.full(len(widths), 3.0), 3 * costs, 3 * shares, 0.3 * relative / count])

    def error_near(self, limits: Limits) -> float | None:
        """The error on plans near a budget, None where fewer than four were measured."""
        widths = np.array([plan.widths for plan in self.measured])
        ratios = [plan.ratio for plan in self.measured]
        near = np.abs(limits.excess(np.column_stack([self.space.cost_batch(widths), ratios]))) <= NEAR
        return float(self._errors[near].mean()) if near.sum() >= 4 else None

    def to_json(self) -> dict[str, Any]:
        return {"dense_ms": self.dense_ms, "error": self.error, "tau": self.tau, **self.known.to_json()}


def _kernel(a: NDArray[np.float64], b: NDArray[np.float64], smooth: float) -> NDArray[np.float64]:
    linear: NDArray[np.float64] = a @ b.T
    if not smooth:
        return linear
    distances = (a**2).sum(1)[:, None] + (b**2).sum(1)[None] - 2 * linear
    return linear + smooth * np.exp(-np.maximum(distances, 0) / 2)


def _fit(
    x: NDArray[np.float64], y: NDArray[np.float64], smooth: float, ridge: float
) -> Callable[[NDArray[np.float64]], NDArray[np.float64]]:
    # Relative errors count: residuals are divided by the time.
    weights = np.linalg.solve(_kernel(x, x, smooth) + ridge * np.diag(y**2), y)

    def predict(new: NDArray[np.float64]) -> NDArray[np.float64]:
        predicted: NDArray[np.float64] = _kernel(new, x, smooth) @ weights
        return np.maximum(predicted, 1e-6)

    return predict


def _held_out(x: NDArray[np.float64], y: NDArray[np.float64], smooth: float, ridge: float) -> NDArray[np.float64]:
    """Predictions of every plan by a fit without its fold."""
    folds = np.arange(len(y)) % FOLDS
    predicted = np.empty_like(y)
    for fold in np.unique(folds):
        inside = folds != fold
        predicted[~inside] = _fit(x[inside], y[inside], smooth, ridge)(x[~inside])
    return predicted


def _tau(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
    from scipy.stats import kendalltau

    return float(kendalltau(a, b).statistic)


def check_latency(model: LatencyModel, limit_ratio: float) -> None:
    """Raises BudgetError, naming the floor, when no plan is predicted to be that fast."""
    floor = float(model.ratios(model.space.smallest_widths()[None])[0])
    if floor > limit_ratio:
        raise BudgetError(
            f"budget latency<={limit_ratio * model.dense_ms:.3g} ms ({limit_ratio:.0%} of the dense model): the "
            f"smallest candidate in this space takes {floor * model.dense_ms:.3g} ms on the target; raise the limit"
        )
