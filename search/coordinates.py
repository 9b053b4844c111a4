"""Where plans lie for a surrogate: near each other where they lose the same of a layer's outputs.

A width alone says little: of one layer half of the channels are redundant, and of another none. Where the moments of
the dense model are known, the coordinate of a width is the logarithm of the share of the consumers' outputs that no fit
gives back at it; else the logarithm of the relative width.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ..spaces import Space

Array = NDArray[np.float64]

#: Added to shares of lost outputs: what is lost beside it makes no difference.
NEGLIGIBLE = 0.01


class Coordinates:
    """Tables of the coordinates of all widths, ``(criteria, dimensions, widths)``, and of their slopes."""

    def __init__(self, space: Space) -> None:
        tables = [_table(space.sizes, space.lost_outputs(name)) for name in space.criteria]
        self._values = np.stack([values for values, _ in tables])
        self._slopes = np.stack([slopes for _, slopes in tables])
        self._dimensions = np.arange(len(space.sizes))

    def of(self, widths: NDArray[np.integer], criteria: NDArray[np.int64]) -> Array:
        """``(plans, dimensions)`` of ``widths (plans, dimensions)`` and indices of ``criteria (plans,)``."""
        return np.asarray(self._values[criteria[:, None], self._dimensions, widths])

    def slopes(self, widths: NDArray[np.integer], criteria: NDArray[np.int64]) -> Array:
        """How coordinates change with the logarithms of widths, in the same shape."""
        return np.asarray(self._slopes[criteria[:, None], self._dimensions, widths])


def _table(sizes: NDArray[np.int64], lost: Sequence[Array | None]) -> tuple[Array, Array]:
    """Of one criterion: ``(dimensions, largest size + 1)`` each."""
    values, slopes = np.zeros((2, len(sizes), int(sizes.max()) + 1))
    for dimension, (size, curve) in enumerate(zip(sizes, lost, strict=True)):
        logs = np.log(np.arange(1, size + 1) / size)
        known = logs if curve is None else -np.log(curve[1:] + NEGLIGIBLE)
        values[dimension, 1 : size + 1] = known
        slopes[dimension, 1 : size + 1] = np.gradient(known, logs) if size > 1 else 0.0
    return values, slopes
