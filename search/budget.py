"""Budgets: upper limits on costs, absolute with a unit or relative to the dense model."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..spaces import Cost
from ..spaces.errors import BudgetError

if TYPE_CHECKING:
    from ..spaces import Space

#: Budget key -> column of ``CostModel.batch`` and how much of that cost one unit of the key is.
KEYS = {"macs": (0, 1.0), "flops": (0, 0.5), "params": (1, 1.0), "memory": (2, 1.0), "size": (3, 1.0)}
#: The budget key of latency; its column follows those of the analytic costs and holds ratios to the dense model.
LATENCY, LATENCY_COLUMN = "latency", 4
_SECONDS = {"ms": 1.0, "s": 1e3, "us": 1e-3}
_COUNTS = {"": 1, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}
_BYTES = {"": 1, "B": 1, "kB": 1e3, "MB": 1e6, "GB": 1e9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
_NUMBER = re.compile(r"\s*([0-9]*\.?[0-9]+(?:[eE][+-]?[0-9]+)?)\s*([A-Za-z%]*)\s*")
#: What people write for two ends: 30%..70%, 30-70%.
_RANGE = re.compile(r"\s*([0-9]*\.?[0-9]+)\s*([A-Za-z%]*?)\s*(?:\.\.+|-|:|to)\s*([0-9]*\.?[0-9]+)\s*([A-Za-z%]*)\s*")


@dataclass(frozen=True)
class Limits:
    """Upper limits in the order macs, params, memory_bytes, size_bytes, latency as a ratio to the dense model's;
    infinite where nothing is limited."""

    values: tuple[float, ...]

    @property
    def analytic(self) -> tuple[int, ...]:
        """Columns of the limited costs that are computed and not measured."""
        return tuple(column for column, limit in enumerate(self.values[:LATENCY_COLUMN]) if math.isfinite(limit))

    def excess(self, costs: NDArray[np.float64]) -> NDArray[np.float64]:
        """Largest share by which each row of ``costs`` (plans, 4 or 5) is above its limits; feasible when <= 0."""
        limits = np.array(self.values[: costs.shape[1]])
        limited = np.isfinite(limits)
        shares: NDArray[np.float64] = (costs[:, limited] / limits[limited] - 1).max(axis=1, initial=-1.0)
        return shares

    def holds(self, costs: Sequence[float]) -> bool:
        """Whether one plan's costs (4 or 5) are within the limits."""
        return bool(self.excess(np.array([costs], dtype=float))[0] <= 0)

    def replace(self, column: int, limit: float) -> Limits:
        """The same limits with another one in ``column``."""
        values = list(self.values)
        values[column] = limit
        return Limits(tuple(values))


def parse_budget(
    budget: Mapping[str, str | float], dense: Cost, may_be_empty: bool = False, dense_ms: float | None = None
) -> Limits:
    """Read ``{"macs": "50%", "params": "200k", "size": "1MB", "latency": "5ms"}``.

    ``dense_ms``: latency of the dense model, where it is known: a latency in milliseconds is not checked without.

    Raises:
        BudgetError: no budget, an unknown key or unit, or a limit that is not positive.
    """
    if budget is not None and not isinstance(budget, Mapping):
        raise BudgetError(f'the budget must be a dictionary such as {{"macs": "50%"}}, not {budget!r}')
    if not budget and not may_be_empty:
        raise BudgetError(f"the budget is empty; give at least one of {', '.join(KEYS)}, such as macs=50%")
    totals = (dense.macs, dense.params, dense.memory_bytes, dense.size_bytes)
    limits = [math.inf] * (len(totals) + 1)
    for key, text in budget.items():
        _check_one_end(key, text)
        if key == LATENCY:
            limits[LATENCY_COLUMN] = _latency_ratio(text, dense_ms)
            continue
        if key not in KEYS:
            raise BudgetError(f"unknown budget {key!r}; expected one of {', '.join([*KEYS, LATENCY])}")
        column, scale = KEYS[key]
        limits[column] = min(limits[column], _limit(key, text, totals[column], scale))
    return Limits(tuple(limits))


def _check_one_end(key: str, text: str | float) -> None:
    ends = None if _NUMBER.fullmatch(str(text)) else _RANGE.fullmatch(str(text))
    if ends is not None:
        low, high = ends[1] + (ends[2] or ends[4]), ends[3] + ends[4]
        raise BudgetError(
            f"budget {key}={text!r} has two ends: that is mode=front with the budget {key}={high} and lowest={low}"
        )


def first_key(budget: Mapping[str, Any]) -> str:
    """Of the cost that a front trades against the score: macs without a budget."""
    return next(iter(budget), "macs")


def parse_lowest(
    lowest: str | float, budget: Mapping[str, str | float], dense: Cost, dense_ms: float | None = None
) -> Limits:
    """The lower end of a front, ``lowest``, given as the first key of ``budget`` is.

    Raises:
        BudgetError: it cannot be read, or is not below the budget.
    """
    key = first_key(budget)
    highest = budget.get(key, "100%")
    low = _read_lowest(lowest, key, dense, dense_ms)
    high = parse_budget({key: highest}, dense, dense_ms=dense_ms)
    if min(low.values) >= min(high.values):  # one value of each is finite
        raise BudgetError(f"lowest={lowest} is not below the budget {key}={highest}")
    return low


def check_lowest(lowest: str | float, budget: Mapping[str, str | float]) -> None:
    """What can be said of the lower end of a front without a model. Raises BudgetError."""
    key, of_one = first_key(budget), Cost(1, 1, 1, 1)
    if _is_share(lowest) == _is_share(budget.get(key, "100%")):
        parse_lowest(lowest, budget, of_one, dense_ms=1.0)
    else:
        _read_lowest(lowest, key, of_one, dense_ms=1.0)


def _read_lowest(lowest: str | float, key: str, dense: Cost, dense_ms: float | None) -> Limits:
    try:
        return parse_budget({key: lowest}, dense, dense_ms=dense_ms)
    except BudgetError as error:
        raise BudgetError(f"lowest={lowest}: {error}") from None


def check_lowest_reachable(space: Space, lowest: str | float, key: str, low: Limits) -> None:
    """Raises BudgetError for a number, alone or with a unit, below whatever the space has: mostly a share was meant."""
    if key == LATENCY or _is_share(lowest):
        return
    column, scale = KEYS[key]
    smallest = space.smallest_costs()[column]
    if low.values[column] < smallest:
        raise BudgetError(
            f"lowest={lowest}: the smallest candidate in this space has {smallest / scale:,.0f} {key}"
            + ("; was a share meant, with %?" if re.fullmatch(r"[\d.]+", str(lowest)) else "")
        )


def _is_share(text: str | float) -> bool:
    return "%" in str(text)


def _latency_ratio(text: str | float, dense_ms: float | None) -> float:
    match = None if isinstance(text, bool) else _NUMBER.fullmatch(str(text))
    if match is None or (match[2] != "%" and match[2] not in _SECONDS):
        raise BudgetError(f"cannot read budget latency={text!r}; expected a number with ms, s, us or %, such as 5ms")
    number = float(match[1])
    if number <= 0:
        raise BudgetError(f"budget latency={text!r} must be positive")
    if match[2] == "%":
        return number / 100
    return math.inf if dense_ms is None else number * _SECONDS[match[2]] / dense_ms


def _limit(key: str, text: str | float, dense: float, scale: float) -> float:
    units = _BYTES if key in ("memory", "size") else _COUNTS
    match = None if isinstance(text, bool) else _NUMBER.fullmatch(str(text))
    if match is None or (match[2] != "%" and match[2] not in units):
        expected = ", ".join(unit for unit in units if unit)
        raise BudgetError(f"cannot read budget {key}={text!r}; expected a number, alone or with {expected} or %")
    number = float(match[1])
    if 0 < number < 1 and not match[2]:
        share = f"{100 * number:g}%"
        raise BudgetError(
            f"budget {key}={text!r} is less than one; write {key}={share} for a share of the dense model's"
        )
    if match[2] == "%" and number > 100:
        raise BudgetError(f"budget {key}={text!r} is more than the dense model has; give at most 100%")
    limit = number / 100 * dense if match[2] == "%" else number * units[match[2]] * scale
    if limit <= 0:
        raise BudgetError(f"budget {key}={text!r} must be positive")
    return limit


def check_reachable(space: Space, budget: Mapping[str, str | float]) -> None:
    """Raises BudgetError, naming the smallest cost that can be reached, when no plan of ``space`` holds ``budget``."""
    smallest, dense = space.smallest_costs(), space.dense_cost
    for key, text in budget.items():
        if key == LATENCY:
            continue
        column, unit = KEYS[key]
        least = float(smallest[column])
        if least <= parse_budget({key: text}, dense).values[column]:
            continue
        share = math.ceil(1e4 * least / parse_budget({key: "100%"}, dense).values[column]) / 100
        if parse_budget({key: f"{share}%"}, dense).values[column] < least:  # as a budget it must be held
            share += 0.01
        is_bare = re.fullmatch(r"[\d.]+", str(text)) and float(text) <= 100
        advice = f"was {text}% meant?" if is_bare else "raise the budget, or widen the space with its options"
        raise BudgetError(
            f"budget {key}={text}: the smallest candidate in this space has {least / unit:,.0f}, {share:g}% of the "
            f"dense model's; {advice}"
        )
