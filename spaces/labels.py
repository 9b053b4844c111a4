"""The algebra of labels: what every tensor dimension is made of.

A *factor* is a vector of removable units. A *term* is a product of factors, outermost first, and a
*dimension* is a sum of terms, first offset first. ``((heads, head_dim),)`` is a merged attention dimension,
``((a,), (b,))`` the concatenation of two.

Factors that operators align are merged by union-find, or one is *defined* as an expression of others. Labels are
resolved lazily, so a definition takes effect everywhere at once. A frozen factor keeps all its units; its
reason says why. What cannot be aligned is frozen, so that a gap in the rules makes the space smaller and never
the model wrong.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass

#: Copying a sum more often than this (a sum inside a long product) is given up: everything is frozen.
MAX_COPIES = 64

#: Reason of factors whose size is fixed by nature (batch, spatial, kernel); never shown to the user.
STRUCTURAL = "fixed size"


#: Reason of factors that count the equal parts of a split; beside free units they take nothing from the user.
SELECTOR = "counts the parts of a split"


@dataclass(eq=False)
class Factor:
    """A vector of ``size`` units that live and die one by one."""

    size: int
    frozen: str | None = None
    parent: Factor | None = None
    definition: Dimension | None = None


Term = tuple[Factor, ...]
Dimension = tuple[Term, ...]


def fresh(size: int) -> Dimension:
    """A dimension of ``size`` new, unfrozen units."""
    return ((Factor(size),),)


def fixed(size: int, reason: str = STRUCTURAL) -> Dimension:
    """A dimension that can never change."""
    return ((Factor(size, frozen=reason),),)


def find(factor: Factor) -> Factor:
    """The representative of everything that ``factor`` was merged with."""
    root = factor
    while root.parent is not None:
        root = root.parent
    while factor.parent is not None:
        factor.parent, factor = root, factor.parent
    return root


def term_size(term: Term) -> int:
    return math.prod(factor.size for factor in term)


def size(dimension: Dimension) -> int:
    return sum(term_size(term) for term in dimension)


def resolve(dimension: Dimension) -> Dimension:
    """``dimension`` in normal form: representatives only, no size-1 factors, no nested sums, frozen neighbours
    merged. The same expression always gives the same tuple of the same factor objects, but for merged frozen ones."""
    terms: list[Term] = []
    for term in dimension:
        terms.extend(_resolve_term(term))
    return _as_selector(_merge_frozen_terms([_merge_frozen_factors(term) for term in terms]))


def _as_selector(terms: Dimension) -> Dimension:
    """A sum of the same term again and again is a product with a frozen selector, which other factors can multiply."""
    if len(terms) < 2 or not terms[0] or any(term != terms[0] for term in terms):
        return terms
    return (_merge_frozen_factors((Factor(len(terms), SELECTOR), *terms[0])),)


def is_frozen(dimension: Dimension) -> bool:
    return all(factor.frozen for term in resolve(dimension) for factor in term)


def concatenate(dimensions: list[Dimension]) -> Dimension:
    return tuple(term for dimension in dimensions for term in dimension)


def multiply(dimensions: list[Dimension]) -> Dimension:
    """The dimension that a view makes when it merges ``dimensions``, outermost first."""
    product: list[Term] = [()]
    for dimension in dimensions:
        product = _times(product, list(resolve(dimension)))
    return tuple(product)


def freeze(dimension: Dimension, reason: str) -> None:
    for term in resolve(dimension):
        for factor in term:
            if factor.frozen is None or factor.frozen == STRUCTURAL:
                factor.frozen = reason


def are_always_as_long(left: Dimension, right: Dimension) -> bool:
    """Whether both have as many elements whatever is removed, though perhaps in another order."""
    return _lengths(left) == _lengths(right)


def _lengths(dimension: Dimension) -> Counter[tuple[int, ...]]:
    """The terms of the sum, as the units that they multiply and a constant."""
    return Counter(
        (math.prod(f.size for f in term if f.frozen), *sorted(id(f) for f in term if not f.frozen))
        for term in resolve(dimension)
    )


def unify(left: Dimension, right: Dimension, why: str) -> None:
    """Make the two dimensions one: their elements are removed together.

    Both must have the same size. ``why`` names the operator, for the reason of what has to be frozen.
    """
    while True:
        left, right = resolve(left), resolve(right)
        if left == right or (is_frozen(left) and is_frozen(right)):
            return
        if size(left) != size(right):
            reason = f"sizes {size(left)} and {size(right)} are combined by {why}"
            freeze(left, reason)
            freeze(right, reason)
            return
        step = _refine(left, right, why)
        if step is None:
            return
        if not step:
            reason = f"cannot be aligned in {why}"
            freeze(left, reason)
            freeze(right, reason)
            return


def _refine(left: Dimension, right: Dimension, why: str) -> bool | None:
    """Take one step towards equality. True: look again; None: they are equal now; False: they cannot be."""
    if len(left) == 1 and len(right) == 1:
        return _refine_products(left[0], right[0], why)
    for single, other in ((left, right), (right, left)):
        if len(single) == 1 and len(single[0]) == 1:
            return _define(single[0][0], other, why)
    return _refine_sums(left, right, why)


def _define(factor: Factor, dimension: Dimension, why: str) -> bool:
    if factor.frozen:
        freeze(dimension, _passed_on(factor, why))
    else:
        factor.definition = dimension
    return True


def _passed_on(frozen: Factor, why: str) -> str:
    if frozen.frozen == SELECTOR:
        return SELECTOR
    if frozen.frozen is None or frozen.frozen == STRUCTURAL:
        return f"meets a dimension of fixed size {frozen.size} in {why}"
    return frozen.frozen


def _refine_products(left: Term, right: Term, why: str) -> bool | None:
    """Align two products from the left."""
    for position, (one, other) in enumerate(zip(left, right, strict=False)):
        if one is other or (one.frozen and other.frozen and one.size == other.size):
            continue
        if one.size == other.size:
            _merge(one, other, why)
            return True
        if one.size < other.size:
            one, other, left, right = other, one, right, left
        if one.size % other.size:
            return False
        if not one.frozen:
            _split_product(one, other.size)
            return True
        # A frozen factor has no parts to define: take the smaller one out of it and go on with the remainder.
        if not other.frozen:
            other.frozen = _passed_on(one, why)
        remainder = Factor(one.size // other.size, one.frozen)
        unify(((remainder, *left[position + 1 :]),), (right[position + 1 :],), why)
        return None
    return None


def _merge(one: Factor, other: Factor, why: str) -> None:
    if one.frozen and not other.frozen:
        other.frozen = _passed_on(one, why)
    if other.frozen and not one.frozen:
        one.frozen = _passed_on(other, why)
    other.parent = one


def _split_product(factor: Factor, outer: int) -> None:
    factor.definition = ((Factor(outer, factor.frozen), Factor(factor.size // outer, factor.frozen)),)


def _refine_sums(left: Dimension, right: Dimension, why: str) -> bool | None:
    """Align two sums at their boundaries: unify the first terms of equal size, or split the larger one."""
    ones, others = list(left), list(right)
    while ones and others:
        if term_size(ones[0]) < term_size(others[0]):
            ones, others = others, ones
        if term_size(ones[0]) > term_size(others[0]):
            parts = _split_term(ones[0], term_size(others[0]))
            if parts is None:
                return False
            ones[:1] = parts
        unify((ones.pop(0),), (others.pop(0),), why)
    return None


def _split_term(term: Term, boundary: int) -> list[Term] | None:
    """Cut a term in two at ``boundary`` by defining its outermost factor as a sum; None if it falls inside one."""
    outer, inner = term[0], term_size(term[1:])
    if boundary % inner:
        return None
    first = Factor(boundary // inner, outer.frozen)
    second = Factor(outer.size - first.size, outer.frozen)
    if not outer.frozen:
        outer.definition = ((first,), (second,))
    return [(first, *term[1:]), (second, *term[1:])]


def _resolve_term(term: Term) -> list[Term]:
    product: list[Term] = [()]
    for factor in term:
        root = find(factor)
        if root.definition is not None:
            product = _times(product, list(resolve(root.definition)))
        elif root.size != 1:
            product = [(*left, root) for left in product]
    return product


def _times(left: list[Term], right: list[Term]) -> list[Term]:
    """The product of two sums as a sum. An outer product that repeats an inner sum becomes a frozen selector."""
    if len(right) == 1:
        return [term + right[0] for term in left]
    copies = sum(term_size(term) for term in left)
    if copies == 1 or len(left) == copies:
        return [term for _ in left for term in right]
    reason = "parts lie side by side inside of what repeats them"
    if not is_frozen(tuple(left)):  # heads of several parts: the outer units can still go one by one
        freeze(tuple(right), reason)
        return [(*term, Factor(size(tuple(right)), reason)) for term in left]
    if copies > MAX_COPIES:
        freeze(tuple(right), reason)
        return [(Factor(copies * size(tuple(right)), reason),)]
    return [term for _ in range(copies) for term in right]


def _merge_frozen_factors(term: Term) -> Term:
    merged: list[Factor] = []
    for factor in term:
        if merged and factor.frozen and merged[-1].frozen:
            merged[-1] = _join(merged[-1], factor, merged[-1].size * factor.size)
        else:
            merged.append(factor)
    return tuple(merged)


def _merge_frozen_terms(terms: list[Term]) -> Dimension:
    merged: list[Term] = []
    for term in terms:
        if merged and _is_lone_frozen(term) and _is_lone_frozen(merged[-1]):
            before, after = merged[-1], term
            total = term_size(before) + term_size(after)
            merged[-1] = (_join(_first(before), _first(after), total),)
        else:
            merged.append(term)
    return tuple(merged)


def _is_lone_frozen(term: Term) -> bool:
    return not term or (len(term) == 1 and term[0].frozen is not None)


def _first(term: Term) -> Factor:
    return term[0] if term else Factor(1, STRUCTURAL)


def _join(one: Factor, other: Factor, total: int) -> Factor:
    reason = one.frozen if one.frozen != STRUCTURAL else other.frozen
    return Factor(total, reason)
