"""Analytic costs: sums of products of group widths, exact and in microseconds.

One multiply-accumulate (MAC) counts once, in convolutions and matrix products; normalisation, pooling and
activations multiply and accumulate nothing that is counted. This is fvcore's convention for these operators, and
half of what ``torch.utils.flop_counter`` counts.
"""

from __future__ import annotations

import copy
import math
from collections import defaultdict
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray
from torch import nn

from .groups import Kept, Layout, Moment, Owner, Structure, Term
from .plan import Cost

#: Columns of :meth:`CostModel.batch`.
ALL_COSTS = (0, 1, 2, 3)
#: Product of variables (group indices, sorted, with repetition, then blocks) -> coefficient.
Polynomial = dict[tuple[int, ...], int]


class _Polynomials:
    """Evaluates many polynomials in the same variables at once."""

    def __init__(self, variables: int, polynomials: Sequence[Polynomial]) -> None:
        monomials = sorted({monomial for polynomial in polynomials for monomial in polynomial})
        degree = max((len(monomial) for monomial in monomials), default=1) or 1
        #: One more variable, which is 1, fills up monomials of lower degree.
        self.variables = variables + 1
        self._index = np.array([[*m, *([variables] * (degree - len(m)))] for m in monomials], dtype=np.intp)
        self._index = self._index.reshape(len(monomials), degree)
        position = {monomial: row for row, monomial in enumerate(monomials)}
        self._coefficients = np.zeros((len(monomials), len(polynomials)))
        for column, polynomial in enumerate(polynomials):
            for monomial, coefficient in polynomial.items():
                self._coefficients[position[monomial], column] = coefficient

    def batch(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        """``values (plans, variables)`` to ``(plans, polynomials)``."""
        products = values[:, self._index[:, 0]]
        for column in range(1, self._index.shape[1]):
            products *= values[:, self._index[:, column]]
        totals: NDArray[np.float64] = products @ self._coefficients
        return totals

    def only(self, columns: Sequence[int]) -> _Polynomials:
        """Some of the polynomials, without the monomials of the others."""
        found = copy.copy(self)
        coefficients = self._coefficients[:, columns]
        used = coefficients.any(axis=1)
        found._index, found._coefficients = self._index[used], coefficients[used]
        return found

    def one(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        """``values (variables,)`` to ``(polynomials,)``: a batch of one would waste its time."""
        totals: NDArray[np.float64] = values.take(self._index).prod(axis=1) @ self._coefficients
        return totals


class CostModel:
    """Evaluates costs for whole batches of plans at once.

    The variables of the polynomials are the widths of the groups, then for every unit of every group of blocks whether
    it stays (0 or 1).
    """

    def __init__(self, model: nn.Module, structure: Structure) -> None:
        self._groups = structure.groups
        terms = _Terms(structure)
        parameters, size = _parameter_costs(model, structure, terms)
        work = [terms.polynomial(work) for work in structure.work]
        moments = _undominated([_sum(terms.moment(moment)) for moment in structure.live])
        self._totals = _Polynomials(terms.variables, [_sum(work), parameters, size, *moments])
        #: By column of :meth:`batch`, the polynomials whose largest value it is, and these alone: memory has many.
        columns: list[Sequence[int]] = [[0], [1], range(3, 3 + len(moments)), [2]]
        self._columns = [self._totals.only(column) if column else None for column in columns]
        self._operators = _Operators(terms, structure.work)

    def batch(
        self,
        widths: NDArray[np.integer],
        blocks: Sequence[NDArray[np.floating] | NDArray[np.bool_]],
        columns: Sequence[int] = ALL_COSTS,
    ) -> NDArray[np.float64]:
        """Costs as ``(plans, 4)``: macs, params, memory_bytes, size_bytes; 0 in all but ``columns``.

        ``widths (plans, groups)``; ``blocks``: for every group of blocks in order, which units stay ``(plans, units)``.
        """
        values, costs = _values(widths, blocks), np.zeros((len(widths), len(ALL_COSTS)))
        for column in columns:
            polynomials = self._columns[column]
            if polynomials is not None:
                costs[:, column] = polynomials.batch(values).max(axis=1)
        return costs

    def operators(
        self, widths: NDArray[np.integer], blocks: Sequence[NDArray[np.floating] | NDArray[np.bool_]]
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Convolutions and matrix products in the order of the forward: factors ``(plans, operators)`` and sizes
        ``(plans, operators, dimensions)``, whose products are the MACs. The first size is that of what is summed over,
        then come the output's dimensions that widths set; 1 where widths set none.
        """
        return self._operators(_values(widths, blocks))

    def of_widths(self, widths: Sequence[int], blocks: Sequence[NDArray[np.bool_]]) -> Cost:
        """The cost of one plan: ``widths (groups,)``, and for every group of blocks in order which units stay."""
        values = np.ones(self._totals.variables)
        values[: len(widths)] = widths
        if blocks:
            values[len(widths) : -1] = np.concatenate(blocks)
        totals = self._totals.one(values)
        memory = totals[3:].max() if len(totals) > 3 else 0
        return Cost(int(totals[0]), int(totals[1]), int(memory), int(totals[2]))

    @property
    def dense(self) -> Cost:
        return self([np.ones(group.size, dtype=bool) for group in self._groups])

    def __call__(self, kept: Kept) -> Cost:
        """The cost of one plan, given the units that stay in every group."""
        blocks = [mask for mask, group in zip(kept, self._groups, strict=True) if group.blocks]
        return self.of_widths([int(np.count_nonzero(mask)) for mask in kept], blocks)


class _Operators:
    """Sizes of what every operator multiplies."""

    def __init__(self, terms: _Terms, work: Sequence[Term]) -> None:
        layouts: dict[Layout, int] = {}
        factors: list[Polynomial] = []
        rows: list[list[int | None]] = []
        for term in work:
            sizes = [_width(layout) for layout in term.layouts]
            is_fixed = [set(size) <= {()} for size in sizes]
            constant = math.prod(size[()] for size, fixed in zip(sizes, is_fixed, strict=True) if fixed)
            factors.append(terms.polynomial(Term(term.constant * constant, (), term.owners)))
            columns = [
                None if fixed else layouts.setdefault(layout, len(layouts))
                for layout, fixed in zip(term.layouts, is_fixed, strict=True)
            ]
            rows.append([columns[-1], *(column for column in columns[:-1] if column is not None)])
        self._factors = _Polynomials(terms.variables, factors)
        self._sizes = _Polynomials(terms.variables, [_width(layout) for layout in layouts])
        most = max((len(row) for row in rows), default=1)
        ones = len(layouts)
        filled = [[ones if column is None else column for column in row] + [ones] * (most - len(row)) for row in rows]
        self._columns = np.array(filled, dtype=np.intp).reshape(len(rows), most)

    def __call__(self, values: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        sizes = np.column_stack([self._sizes.batch(values), np.ones(len(values))])
        return self._factors.batch(values), sizes[:, self._columns]


def _values(
    widths: NDArray[np.integer], blocks: Sequence[NDArray[np.floating] | NDArray[np.bool_]]
) -> NDArray[np.float64]:
    return np.column_stack([widths, *blocks, np.ones(len(widths))]).astype(np.float64)


class _Terms:
    """Polynomials of terms; a term that comes often is expanded once."""

    def __init__(self, structure: Structure) -> None:
        self._known: dict[tuple[int, tuple[Layout, ...]], Polynomial] = {}
        self._first: dict[int, int] = {}
        self.variables = len(structure.groups)
        for position, group in enumerate(structure.groups):
            if group.blocks:
                self._first[position] = self.variables
                self.variables += group.size

    def polynomial(self, term: Term) -> Polynomial:
        key = (term.constant, term.layouts)
        if key not in self._known:
            self._known[key] = _product(term.constant, term.layouts)
        return self._times(self._known[key], term.owners)

    def moment(self, moment: Moment) -> list[Polynomial]:
        return [self._times(self.polynomial(storage), moment.owners) for storage in moment.storages]

    def _times(self, polynomial: Polynomial, owners: tuple[Owner, ...]) -> Polynomial:
        if not owners:
            return polynomial
        present = tuple(sorted(self._first[group] + unit for group, unit in owners))
        return {(*monomial, *present): coefficient for monomial, coefficient in polynomial.items()}


def _parameter_costs(model: nn.Module, structure: Structure, terms: _Terms) -> tuple[Polynomial, Polynomial]:
    tensors = dict([*model.named_parameters(), *model.named_buffers()])

    def polynomial(name: str, constant: int) -> Polynomial:
        return terms.polynomial(Term(constant, structure.tensors[name], structure.owners[name]))

    counts = [polynomial(name, 1) for name, _ in model.named_parameters()]
    return _sum(counts), _sum(polynomial(name, tensor.element_size()) for name, tensor in tensors.items())


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
