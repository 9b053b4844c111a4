"""Whether latency rises in steps of the width, so that widths between two steps cost accuracy and save no time.

Of every kind of group the most expensive one is measured at consecutive widths while all others are whole. A period
``p`` explains a stair-case: times are ``a + b * ceil(width / p)``. It is believed where it predicts held-out times
clearly better than the straight line does.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..spaces import Space
from ..spaces.groups import Group

PERIODS = (1, 2, 4, 8, 16, 32)
#: Widths that are measured at most: two steps of the largest period. With fewer than the least nothing is told apart.
MOST_WIDTHS, LEAST_WIDTHS = 64, 12
#: A stair-case is believed where its held-out error is at most this share of the straight line's, and less by at least
#: this share of the dense model's time.
CLEAR, MATTERS = 0.8, 1e-4
_FOLDS = 5


@dataclass(frozen=True)
class Stairs:
    """Latency against the width of one dimension. ``ratios``: to the dense model, by ``widths``; ``errors``: mean
    absolute error of held-out ratios, by period, where 1 is the straight line."""

    kind: str
    dimension: str
    size: int
    widths: tuple[int, ...]
    ratios: tuple[float, ...]
    errors: Mapping[int, float]

    @classmethod
    def of(cls, kind: str, dimension: str, size: int, widths: Sequence[int], ratios: Sequence[float]) -> Stairs:
        x, y = np.array(widths, dtype=np.float64), np.array(ratios)
        errors = {period: _held_out_error(np.ceil(x / period), y) for period in PERIODS}
        return cls(kind, dimension, size, tuple(widths), tuple(ratios), errors)

    @property
    def round_to(self) -> int:
        """The period of the steps, 1 without any."""
        best = min(self.errors, key=lambda period: self.errors[period])
        error, line = self.errors[best], self.errors[1]
        return best if error <= CLEAR * line and line - error >= MATTERS else 1

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "round_to": self.round_to}


def stair_widths(space: Space) -> dict[str, list[int]]:
    """By dimension the widths to measure: of every kind the dimension with most of the MACs among those with enough
    widths. Blocks are no widths."""
    smallest = np.tile(space.sizes, (len(space.sizes), 1))
    np.fill_diagonal(smallest, space.smallest_widths())
    macs = space.cost_batch(smallest)[:, 0]
    chosen: dict[str, tuple[float, str, list[int]]] = {}
    for name, groups, left in zip(space.dimensions, space.tied_groups, macs, strict=True):
        widths, kind = _widths(groups), groups[0].kind
        if kind != "block" and len(widths) >= LEAST_WIDTHS and left < chosen.get(kind, (math.inf,))[0]:
            chosen[kind] = left, name, widths
    return {name: widths for _, name, widths in chosen.values()}


def override(found: Sequence[Stairs]) -> str:
    """What makes a search keep to the steps."""
    kinds = ", ".join(f"{stairs.kind}: {stairs.round_to}" for stairs in found if stairs.round_to > 1)
    return f"space.round_to={{{kinds}}}" if kinds else "space.round_to=1"


def _widths(groups: Sequence[Group]) -> list[int]:
    """The largest widths of groups that share one, smallest first."""
    size, step = groups[0].size, math.lcm(*(group.multiple_of for group in groups))
    least = max(group.at_least for group in groups)
    return sorted({*range(math.ceil(least / step) * step, size, step), size})[-MOST_WIDTHS:]


def _held_out_error(x: NDArray[np.float64], y: NDArray[np.float64]) -> float:
    """Of straight lines through all but a fifth of the points."""
    folds, errors = np.arange(len(y)) % _FOLDS, np.empty_like(y)
    terms = np.column_stack([np.ones_like(x), x])
    for fold in range(_FOLDS):
        held_out = folds == fold
        line = np.linalg.lstsq(terms[~held_out], y[~held_out], rcond=None)[0]
        errors[held_out] = terms[held_out] @ line - y[held_out]
    return float(np.abs(errors).mean())
