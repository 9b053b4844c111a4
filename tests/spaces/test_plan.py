"""Plans of one space are compared by their widths, and are what plans of listed units are."""

import hashlib
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from prunefront.spaces.plan import Plan, Ranking

SIZES = {"b": 5, "a": 3, "c": 8}


def ranking(seed: int) -> Ranking:
    generator = np.random.default_rng(seed)
    return Ranking(list(SIZES), [generator.permutation(size) for size in SIZES.values()])


WIDTHS = st.tuples(*(st.integers(1, size) for size in SIZES.values()))


@given(WIDTHS, st.integers(0, 3))
def test_a_prefix_is_the_plan_of_its_units(widths, seed):
    ranked = ranking(seed)
    plan = Plan.first(ranked, widths)
    listed = Plan.of({n: o[:w] for n, o, w in zip(SIZES, ranked.orders, widths, strict=True)})
    assert plan == listed and hash(plan) == hash(listed) and plan.kept == listed.kept
    assert plan.widths == listed.widths == dict(sorted(zip(SIZES, widths, strict=True)))
    assert list(plan.widths) == sorted(SIZES)
    assert plan.fingerprint == listed.fingerprint and plan.to_json() == listed.to_json()
    text = json.dumps({name: sorted(map(int, units)) for name, units in listed.kept}, sort_keys=True)
    assert plan.fingerprint == hashlib.sha256(text.encode()).hexdigest()[:16]
    assert plan.prefix_of(ranked) == list(widths) and listed.prefix_of(ranked) is None
    assert repr(plan) == repr(listed) and eval(repr(plan)) == plan
    for units, mask in zip(ranked.orders, ranked.first(widths), strict=True):
        assert set(np.flatnonzero(mask)) == set(units[: mask.sum()])


@given(WIDTHS, WIDTHS)
def test_plans_differ_where_their_units_do(left, right):
    first, second = ranking(0), ranking(1)
    assert (Plan.first(first, left) == Plan.first(first, right)) == (left == right)
    assert (Plan.first(first, left) == Plan.first(second, right)) == (
        Plan.first(first, left).kept == Plan.first(second, right).kept
    )
    assert Plan.first(first, left) != "a plan"


def test_a_plan_cannot_be_changed():
    plan = Plan.of({"a": [2, 0]})
    assert plan.kept == (("a", (0, 2)),)
    with pytest.raises(AttributeError):
        plan.kept = ()
    with pytest.raises(AttributeError):
        plan.other = 1
