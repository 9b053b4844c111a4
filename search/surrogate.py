"""What scored plans tell about others: a Gaussian process over the coordinates of their widths (:mod:`.coordinates`).

Scores of plans are additive in these to first order, with curvature, and interactions on top: the kernel is the sum of
a linear one, one on squares, and a squared exponential (Rasmussen and Williams 2006, chapters 2 and 5). All three
have one scale for all dimensions, so that a few dozen plans are enough for a hundred dimensions.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import solve_triangular

Array = NDArray[np.float64]

#: Prior of the hyperparameters, logarithms of: weight of the linear, square and smooth kernel, the length scale of the
#: last, and the standard deviation of the noise, for standardised values; and the variances of that.
PRIOR = np.log([1.0, 0.3, 0.5, 1.5, 0.1])
VARIANCES = np.array([4.0, 4.0, 4.0, 1.0, 2.0])
_TRIES, _JITTER = 24, 1e-6
#: Losses below this share of the median are taken as that.
LEAST_LOSS = 1e-3


class Surrogate:
    """Fitted to ``values (plans,)`` of plans at ``points (plans, dimensions)``.

    Values are transformed first so that of bad plans it does not matter how bad they are; predictions are in the
    transformed scale. ``start``: hyperparameters of an earlier fit.
    """

    def __init__(self, points: Array, values: Array, rng: np.random.Generator, start: Array | None = None) -> None:
        values = transformed(values)
        self._mean, self._spread = float(values.mean()), float(values.std()) + 1e-12
        self._values = (values - self._mean) / self._spread
        self._scale = float(np.sqrt((points**2).mean())) + 1e-12
        self._points = points / self._scale
        grams = self._grams(self._points)
        tried = [PRIOR] if start is None else [PRIOR, start]
        for _ in range(_TRIES):
            is_near = start is not None and rng.random() < 0.7
            centre, step = (start, 0.3) if is_near and start is not None else (PRIOR, 0.8)
            tried.append(centre + step * rng.standard_normal(len(PRIOR)))
        self.hyperparameters = min(tried, key=lambda h: self._loss(grams, h))
        self._cholesky = np.linalg.cholesky(self._covariance(grams, self.hyperparameters))
        self._weights = self._solved(self._solved(self._values), transposed=True)

    def predict(self, points: Array) -> tuple[Array, Array]:
        """Mean and standard deviation ``(plans,)`` at ``points (plans, dimensions)``."""
        scaled = points / self._scale
        linear, square, smooth = np.exp(self.hyperparameters[:3])
        cross = _kernel(self._grams(scaled), self.hyperparameters)
        squares = scaled**2
        own = linear * squares.mean(1) + square * (squares**2).mean(1) + smooth
        variance = own - (self._solved(cross.T) ** 2).sum(0)
        return cross @ self._weights * self._spread + self._mean, np.sqrt(np.maximum(variance, 1e-9)) * self._spread

    def slopes(self, points: Array) -> Array:
        """Gradient of the mean ``(plans, dimensions)`` at ``points (plans, dimensions)``."""
        scaled, known = points / self._scale, self._points
        linear, square, smooth, length, _ = np.exp(self.hyperparameters)
        weights = self._weights
        near = smooth * np.exp(-self._grams(scaled)[2] / (2 * length**2)) * weights
        slopes = linear * (weights @ known) + 2 * square * scaled * (weights @ known**2)
        slopes = slopes + (near @ known - near.sum(1)[:, None] * scaled) / length**2
        return np.asarray(slopes * self._spread / (self._scale * points.shape[1]))

    def _grams(self, points: Array) -> tuple[Array, Array, Array]:
        """Inner products, those of squares, and squared distances of ``points`` to the fitted ones, a dimension."""
        known, dimensions = self._points, points.shape[1]
        inner = points @ known.T
        distances = (points**2).sum(1)[:, None] + (known**2).sum(1)[None] - 2 * inner
        return inner / dimensions, points**2 @ (known**2).T / dimensions, np.maximum(distances, 0) / dimensions

    def _covariance(self, grams: tuple[Array, Array, Array], hyperparameters: Array) -> Array:
        covariance = _kernel(grams, hyperparameters)
        np.fill_diagonal(covariance, covariance.diagonal() + np.exp(2 * hyperparameters[4]) + _JITTER)
        return covariance

    def _loss(self, grams: tuple[Array, Array, Array], hyperparameters: Array) -> float:
        """Minus the logarithm of the posterior of the hyperparameters, up to a constant."""
        try:
            cholesky = np.linalg.cholesky(self._covariance(grams, hyperparameters))
        except np.linalg.LinAlgError:
            return np.inf
        solved = solve_triangular(cholesky, self._values, lower=True)
        prior = 0.5 * ((hyperparameters - PRIOR) ** 2 / VARIANCES).sum()
        return float(0.5 * solved @ solved + np.log(cholesky.diagonal()).sum() + prior)

    def _solved(self, values: Array, transposed: bool = False) -> Array:
        return np.asarray(solve_triangular(self._cholesky, values, lower=True, trans="T" if transposed else "N"))


def _kernel(grams: tuple[Array, Array, Array], hyperparameters: Array) -> Array:
    inner, squares, distances = grams
    linear, square, smooth, length, _ = np.exp(hyperparameters)
    covariance: Array = linear * inner + square * squares + smooth * np.exp(-distances / (2 * length**2))
    return covariance


def transformed(values: Array) -> Array:
    """Rising with ``values (plans,)``: the logarithm of losses, whose factors add up, above :data:`LEAST_LOSS` (nothing
    is lost by the whole model); of other scores what is far below the median is raised, since it does not matter how
    bad a bad plan is."""
    median = float(np.median(values))
    if (values <= 0).all() and median < 0:
        return -np.log(np.maximum(-values, -LEAST_LOSS * median))
    return np.maximum(values, median - 2 * (float(values.max()) - median))
