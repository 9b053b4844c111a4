"""Analytic costs: sums of products of group widths, exact and in microseconds.

One multiply-accumulate (MAC) counts once, in convolutions and matrix products; normalisation, pooling and
activations multiply and accumulate nothing that is counted. This is fvcore's convention for these operators, and
half of what ``torch.utils.flop_counter`` counts.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import nn

from .groups import Layout, Structure

#: Product of group indices (sorted, with repetition) -> coefficient.
Polynomial = dict[tuple[int, ...], int]


@dataclass(frozen=True)
class Cost:
    """What a plan costs.

    ``macs``: multiply-accumulates of one forward pass on the example inputs (batch included). ``params``: number of
    parameters. ``memory_bytes``: peak of the activations alive at once in that pass, inputs included.
    ``size_bytes``: parameters and buffers.
    """

    macs: int
    params: int
    memory_bytes: int
    size_bytes: int

    @property
    def flops(self) -> int:
        """Two per multiply-accumulate."""
        return 2 * self.macs


class CostModel:
    """Evaluates costs for whole batches of widths at once."""

    def __init__(self, model: nn.Module, structure: Structure) -> None:
        parameters, size = _parameter_costs(model, structure)
        macs = _sum(_product(constant, layouts) for constant, layouts in structure.work)
        moments = _undominated([_sum(_product(n, layouts) for n, layouts in live) for live in structure.live])
        polynomials = [macs, parameters, size, *moments]
        monomials = sorted({monomial for polynomial in polynomials for monomial in polynomial})
        degree = max((len(monomial) for monomial in monomials), default=1) or 1
        one = len(structure.groups)
        self._index = np.array([[*m, *([one] * (degree - len(m)))] for m in monomials], dtype=np.intp)
        self._index = self._index.reshape(len(monomials), degree)
        position = {monomial: row for row, monomial in enumerate(monomials)}
        self._coefficients = np.zeros((len(monomials), len(polynomials)))
        for column, polynomial in enumerate(polynomials):
            for monomial, coefficient in polynomial.items():
                self._coefficients[position[monomial], column] = coefficient

    def batch(self, widths: NDArray[np.integer]) -> NDArray[np.float64]:
        """Costs of ``widths`` (plans, groups) as ``(plans, 4)``: macs, params, memory_bytes, size_bytes."""
        padded = np.ones((len(widths), widths.shape[1] + 1))
        padded[:, :-1] = widths
        values = padded[:, self._index[:, 0]]
        for column in range(1, self._index.shape[1]):
            values *= padded[:, self._index[:, column]]
        totals = values @ self._coefficients
        memory = totals[:, 3:].max(axis=1) if totals.shape[1] > 3 else np.zeros(len(widths))
        return np.column_stack([totals[:, 0], totals[:, 1], memory, totals[:, 2]])

    def __call__(self, widths: NDArray[np.integer]) -> Cost:
        macs, params, memory, size = self.batch(widths[None])[0]
        return Cost(int(macs), int(params), int(memory), int(size))


def _parameter_costs(model: nn.Module, structure: Structure) -> tuple[Polynomial, Polynomial]:
    counts = {name: _product(1, structure.tensors[name]) for name, _ in model.named_parameters()}
    tensors = dict([*model.named_parameters(), *model.named_buffers()])
    sizes = (_product(tensor.element_size(), structure.tensors[name]) for name, tensor in tensors.items())
    return _sum(counts.values()), _sum(sizes)


def _width(layout: Layout) -> Polynomial:
    """The number of elements of a dimension."""
    result: Polynomial = defaultdict(int)
    for term in layout:
        coefficient, groups = 1, []
        for factor in term:
            if factor >= 0:
                groups.append(factor)
            else:
                coefficient *= -factor
        result[tuple(sorted(groups))] += coefficient
    return result


def _product(constant: int, layouts: Iterable[Layout]) -> Polynomial:
    result: Polynomial = {(): constant}
    for layout in layouts:
        width = _width(layout)
        product: Polynomial = defaultdict(int)
        for left, a in result.items():
            for right, b in width.items():
                product[tuple(sorted(left + right))] += a * b
        result = product
    return result


def _sum(polynomials: Iterable[Polynomial]) -> Polynomial:
    total: Polynomial = defaultdict(int)
    for polynomial in polynomials:
        for monomial, coefficient in polynomial.items():
            total[monomial] += coefficient
    return dict(total)


def _undominated(polynomials: list[Polynomial]) -> list[Polynomial]:
    """Those that can be the largest for some widths: all coefficients are positive, so fewer terms never win."""
    distinct = list({tuple(sorted(p.items())): p for p in polynomials}.values())
    distinct.sort(key=lambda p: -sum(p.values()))
    kept: list[Polynomial] = []
    for polynomial in distinct:
        if not any(all(other.get(m, 0) >= c for m, c in polynomial.items()) for other in kept):
            kept.append(polynomial)
    return kept
