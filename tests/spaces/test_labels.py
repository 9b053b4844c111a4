"""The label algebra: alignment, splitting, freezing."""

from prunefront.spaces.labels import (
    are_always_as_long,
    concatenate,
    fixed,
    fresh,
    is_frozen,
    multiply,
    resolve,
    size,
    unify,
)


def test_merging_makes_two_dimensions_one():
    left, right = fresh(4), fresh(4)
    unify(left, right, "test")
    assert resolve(left) == resolve(right)


def test_a_factor_that_meets_a_product_or_a_sum_becomes_it():
    heads, width, whole = fresh(3), fresh(4), fresh(12)
    unify(whole, multiply([heads, width]), "test")
    assert resolve(whole) == resolve(multiply([heads, width]))
    one, two, both = fresh(5), fresh(7), fresh(12)
    unify(both, concatenate([one, two]), "test")
    assert resolve(both) == resolve(concatenate([one, two]))


def test_a_padded_dimension_freezes_the_padding_alone():
    inner, wide = fresh(4), fresh(8)
    unify(wide, concatenate([fixed(2), inner, fixed(2)]), "test")
    assert size(wide) == 8 and not is_frozen(inner)
    assert [is_frozen((term,)) for term in resolve(wide)] == [True, False, True]


def test_halves_of_a_concatenation_are_coupled_by_a_selector():
    one, two, half = fresh(6), fresh(6), fresh(6)
    unify(concatenate([one, two]), multiply([fixed(2), half]), "test")
    assert resolve(one) == resolve(two) == resolve(half)


def test_frozen_selectors_of_nesting_sizes_end():
    left, right = fresh(8), fresh(16)
    unify(multiply([fixed(4), left]), multiply([fixed(2), right]), "test")
    assert not is_frozen(left) and size(resolve(right)) == 16


def test_what_cannot_be_aligned_is_frozen_with_the_reason():
    left, right = multiply([fresh(4), fresh(6)]), multiply([fresh(6), fresh(4)])
    unify(left, right, "aten.add")
    assert is_frozen(left) and is_frozen(right)
    assert "aten.add" in str(resolve(left)[0][0].frozen)


def test_lengths_are_equal_whatever_the_order_of_factors():
    heads, width, other = fresh(4), fresh(8), fresh(32)
    assert are_always_as_long(multiply([heads, width]), multiply([width, heads]))
    assert are_always_as_long(concatenate([heads, width]), concatenate([width, heads]))
    assert not are_always_as_long(multiply([heads, width]), other)
    unify(multiply([heads, width]), other, "test")
    assert are_always_as_long(multiply([width, heads]), other)
    assert not are_always_as_long(multiply([fixed(2), heads]), multiply([fixed(4), heads]))
