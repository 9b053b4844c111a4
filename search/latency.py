"""Latency of any plan, predicted from a few dozen that were measured on the target.

The time of a model is additive over its operators to first order. Features of a plan are the MACs of every operator
and the total costs, all relative to the dense model, and the relative widths. A Gaussian process with a linear kernel
on them learns what each one costs, drawn towards equal costs of all operators by a strong prior on their sum; a smooth
kernel is added where that predicts better in cross-validation.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..spaces import Plan, Space
from ..spaces.errors import BudgetError, PlanError

logger = logging.getLogger(__name__)

#: Measures plans on the target: ``(ratios to the dense model, milliseconds of the dense model)``.
Measure = Callable[[Sequence[Plan]], tuple[list[float], float]]

FOLDS = 8
#: Plans measured before the model is fitted for the first time, and in every later round.
FIRST, STEP = 16, 8
_RIDGES = np.logspace(-8, 0, 9)
_SMOOTH = (0.0, 0.01, 0.1)


@dataclass(frozen=True)
class Measured:
    """A measured plan: its widths ``(dimensions,)`` and its time relative to the dense model's."""

    widths: tuple[int, ...]
    ratio: float


class LatencyModel:
    """Predicts relative latency, ``(plans, dimensions)`` widths to ``(plans,)`` ratios to the dense model.

    ``error``: mean absolute percentage error in cross-validation; ``tau``: Kendall's rank correlation there.
    """

    def __init__(self, space: Space, measured: Sequence[Measured], dense_ms: float) -> None:
        if len(measured) < FOLDS:
            raise PlanError(f"a latency model needs at least {FOLDS} measured plans, not {len(measured)}")
        self.space, self.measured, self.dense_ms = space, tuple(measured), dense_ms
        dense = space.sizes[None]
        self._dense_costs, self._dense_macs = space.cost_batch(dense), max(float(space.operator_macs(dense).sum()), 1.0)
        x, y = self._features(np.array([m.widths for m in measured])), np.array([m.ratio for m in measured])
        tried = {(smooth, ridge): _held_out(x, y, smooth, ridge) for smooth in _SMOOTH for ridge in _RIDGES}
        best = min(tried, key=lambda key: float(np.abs(tried[key] / y - 1).mean()))
        self.error = float(np.abs(tried[best] / y - 1).mean())
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

    def to_json(self) -> dict[str, Any]:
        return {
            "dense_ms": self.dense_ms,
            "error": self.error,
            "tau": self.tau,
            "measured": [[list(m.widths), m.ratio] for m in self.measured],
        }


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
    for fold in range(FOLDS):
        inside = folds != fold
        predicted[~inside] = _fit(x[inside], y[inside], smooth, ridge)(x[~inside])
    return predicted


def _tau(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
    from scipy.stats import kendalltau

    return float(kendalltau(a, b).statistic)


def spread_plans(space: Space, count: int, seed: int, smallest: float = 0.1) -> NDArray[np.int64]:
    """Widths ``(count, dimensions)`` that fill the space: a Sobol sequence of an overall share and the others."""
    from scipy.stats import qmc

    dims = len(space.dimensions)
    points = qmc.Sobol(dims + 1, seed=seed).random_base2(max(1, int(np.ceil(np.log2(max(count, 2))))))[:count]
    overall = smallest + (1 - smallest) * points[:, :1]
    shares = np.clip(overall * (1 + 0.8 * (points[:, 1:] - 0.5)), 0.02, 1)
    widths = space.round_widths(shares * space.sizes)
    widths[0] = space.smallest_widths()  # the floor of the target decides which budgets are possible
    return widths


def fit_latency(
    space: Space,
    measure: Measure,
    *,
    error: float = 0.05,
    most: int = 64,
    limit_s: float | None = None,
    seed: int = 0,
    known: Sequence[Measured] = (),
    known_ms: float = 0.0,
    keep: Callable[[LatencyModel], None] | None = None,
) -> LatencyModel:
    """Measure plans until the cross-validated error is at most ``error``, or ``most`` plans or ``limit_s`` are used up.

    ``known``: plans that were measured before, beside a dense model that took ``known_ms``. ``keep`` is called with the
    model after every round.
    """
    started = time.monotonic()
    widths = spread_plans(space, most, seed)
    measured = list(known)
    done = {m.widths for m in measured}
    todo = [row for row in map(tuple, widths.tolist()) if row not in done]
    dense_ms = known_ms
    model = LatencyModel(space, measured, dense_ms) if len(measured) >= FIRST else None
    while model is None or model.error > error:
        if model is not None and (not todo or (limit_s is not None and time.monotonic() - started > limit_s)):
            break
        wanted = min(most, FIRST if len(measured) < FIRST else len(measured) + STEP)
        batch = todo[: max(0, wanted - len(measured))]
        todo = todo[len(batch) :]
        plans = [space.plan(dict(zip(space.dimensions, row, strict=True))) for row in batch]
        ratios, dense_ms = measure(plans)
        measured += [Measured(row, ratio) for row, ratio in zip(batch, ratios, strict=True) if np.isfinite(ratio)]
        model = LatencyModel(space, measured, dense_ms)
        logger.info("latency model: %d plans, error %.1f %%, tau %.2f", len(measured), 100 * model.error, model.tau)
        if keep is not None:
            keep(model)
    if model.error > error:
        logger.warning(
            "the latency model errs by %.1f %% after %d measured plans, more than the wanted %.1f %%",
            100 * model.error,
            len(model.measured),
            100 * error,
        )
    return model


def check_latency(model: LatencyModel, limit_ratio: float) -> None:
    """Raises BudgetError, naming the floor, when no plan is predicted to be that fast."""
    floor = float(model.ratios(model.space.smallest_widths()[None])[0])
    if floor > limit_ratio:
        raise BudgetError(
            f"budget latency<={limit_ratio * model.dense_ms:.3g} ms ({limit_ratio:.0%} of the dense model): the "
            f"smallest candidate in this space takes {floor * model.dense_ms:.3g} ms on the target; raise the limit"
        )
