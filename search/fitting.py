"""Which plans are measured for a latency model: some that fill the space, then some near the budget of the search."""

from __future__ import annotations

import itertools
import logging
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..spaces import Plan, Space
from ..spaces.errors import TargetError
from .budget import Limits, parse_budget
from .latency import LEAST, Failed, LatencyModel, Measured, Measurements
from .pace import SLOWER
from .projection import Projector

logger = logging.getLogger(__name__)

#: Measures plans: for each its ratio to the dense model or why it has none, and milliseconds of the dense model.
Measure = Callable[[Sequence[Plan]], tuple[list[float | str], float | None]]

#: Plans measured before the model is fitted for the first time, and in every later round.
FIRST, STEP = 16, 8
#: Models that are timed side by side: more would wait for each other, fewer repeat the dense one for nothing.
TOGETHER = 4
#: Plans near a budget have relative shares between this and 1, as proposals of a search have.
SMALLEST_SHARE = 0.3


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


def near_plans(space: Space, limits: Limits, model: LatencyModel, count: int, seed: int) -> NDArray[np.int64]:
    """Widths ``(count, dimensions)`` of random shares, projected onto the budget."""
    low = np.log(SMALLEST_SHARE)
    shares = np.exp(np.random.default_rng(seed).uniform(low, 0, (count, len(space.dimensions))))
    return Projector(space, limits, model).scale(shares)


def fit_latency(
    space: Space,
    measure: Measure,
    *,
    error: float = 0.05,
    most: int = 64,
    limit_s: float | None = None,
    slower: float = SLOWER,
    seed: int = 0,
    budget: Mapping[str, Any] | None = None,
    known: Measurements | None = None,
    keep: Callable[[Measurements], None] | None = None,
) -> LatencyModel:
    """Measure plans until the error is at most ``error``, in cross-validation and of the last plans as they were
    predicted before they were measured, or ``most`` plans or ``limit_s`` are used up.

    With a ``budget`` two rounds of three are of plans near it, which must be predicted as well; one such round is
    measured beyond ``most``, since ``known`` plans may all be far from it. ``slower``: see
    :class:`.latency.Measurements`. ``known``: what was measured before; ``keep`` is called with everything that is
    known after every few plans.

    Raises:
        TargetError: too few plans can be measured.
    """
    deadline = math.inf if limit_s is None else time.monotonic() + limit_s
    held = replace(known or Measurements(), slower=slower)
    # In a small space many points are one plan.
    spread = list(dict.fromkeys(map(tuple, spread_plans(space, 4 * most, seed).tolist())))[:most]

    def measured(rows: Sequence[tuple[int, ...]], model: LatencyModel | None = None) -> Measurements:
        now = held
        for start in range(0, len(rows), TOGETHER):
            now = _with(now, space, measure, rows[start : start + TOGETHER], model)
            if keep is not None:
                keep(now)
        return now

    while (len(held.measured) < FIRST or len(held.steady) < LEAST) and (rows := _unseen(spread, held)):
        if not held.measured and len(held.failed) >= FIRST:
            break
        missing = FIRST - len(held.measured)
        held = measured(rows[: missing if missing > 0 else STEP])
    model, limits = _fitted(space, held, budget)
    for number in itertools.count():
        if _is_good(model, limits, error) or time.monotonic() > deadline:
            break
        left = most - len(held.seen)
        rows = []
        if limits is not None and number % 3 != 2 and (left > 0 or (number == 0 and model.error_near is None)):
            rows = _unseen(map(tuple, near_plans(space, limits, model, STEP, seed + len(held.seen)).tolist()), held)
        if not rows and left > 0:
            rows = _unseen(spread, held)
        if not rows:
            break
        held = measured(rows[: min(STEP, left) if left > 0 else STEP], model)
        model, limits = _fitted(space, held, budget)
    if not _is_good(model, limits, error):
        told = f"the latency model errs by {described_error(model)} after {len(held.measured)} measured plans"
        if unsteady := len(held.measured) - len(held.steady):
            told += f", of which {unsteady} are left out, since the machine was slower meanwhile"
        if max(model.error, model.error_ahead or 0.0, model.error_near or 0.0) <= error:  # too few to tell
            where = "on new plans" if limits is None else "near the budget"
            knob = "latency.limit_s" if time.monotonic() > deadline else "latency.most"
            logger.warning("%s, and how far off it is %s is not known; raise %s", told, where, knob)
        else:
            logger.warning("%s, more than the wanted %.1f %%", told, 100 * error)
    return model


def described_error(model: LatencyModel) -> str:
    parts = {"of new plans": model.error_ahead, "near the budget": model.error_near}
    told = ", ".join(f"{100 * error:.1f} % {where}" for where, error in parts.items() if error is not None)
    return f"{100 * model.error:.1f} %" + (f" ({told})" if told else "")


def _is_good(model: LatencyModel, limits: Limits | None, error: float) -> bool:
    ahead = model.error_ahead if limits is None else model.error_near
    return ahead is not None and max(ahead, model.error) <= error


def _fitted(space: Space, held: Measurements, budget: Mapping[str, Any] | None) -> tuple[LatencyModel, Limits | None]:
    if held.failed and len(held.steady) < LEAST:
        raise TargetError(
            f"of {len(held.seen)} candidates only {len(held.measured)} could be measured; the last one that failed: "
            f"{held.failed[-1].reason}"
        )
    if len(held.steady) < LEAST:
        raise TargetError(
            f"of {len(held.measured)} measured candidates only {len(held.steady)} were measured while the dense model "
            f"took its usual time, and {LEAST} are needed; measure on a quieter machine, or raise latency.most"
        )
    limits = parse_budget(budget, space.dense_cost, dense_ms=held.dense_ms) if budget else None
    model = LatencyModel(space, held, limits)
    logger.info("latency model: %d plans, error %s, tau %.2f", len(held.measured), described_error(model), model.tau)
    return model, limits


def _with(
    held: Measurements,
    space: Space,
    measure: Measure,
    rows: Sequence[tuple[int, ...]],
    model: LatencyModel | None,
) -> Measurements:
    """``held`` and what is measured of ``rows``, beside what ``model`` says about them."""
    outcomes, dense_ms = measure([space.plan(dict(zip(space.dimensions, row, strict=True))) for row in rows])
    told = [None] * len(rows) if model is None else model.ratios(np.array(rows)).tolist()
    measured, failed = list(held.measured), list(held.failed)
    for row, outcome, predicted in zip(rows, outcomes, told, strict=True):
        if isinstance(outcome, str):
            failed.append(Failed(row, outcome))
        elif dense_ms is not None:
            measured.append(Measured(row, outcome, dense_ms, predicted))
    return replace(held, measured=tuple(measured), failed=tuple(failed))


def _unseen(rows: Iterable[tuple[int, ...]], held: Measurements) -> list[tuple[int, ...]]:
    """In order, each once."""
    seen = held.seen
    return [row for row in dict.fromkeys(rows) if row not in seen]
