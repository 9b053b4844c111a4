"""The front against brute force."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from prunefront.search.front import hypervolume, knee, non_dominated, thinned

POINTS = st.lists(st.tuples(st.integers(0, 8), st.integers(0, 8)), min_size=1, max_size=12)


def beats(one, other):
    return one[0] >= other[0] and one[1] <= other[1] and one != other


@given(POINTS)
def test_the_front_is_what_no_point_beats(points):
    front = non_dominated(*zip(*points, strict=True))
    kept = [points[i] for i in front]
    assert sorted(set(kept), key=lambda p: p[1]) == kept
    assert set(kept) == {p for p in points if not any(beats(q, p) for q in points)}


@given(POINTS)
def test_hypervolume_is_the_number_of_dominated_cells(points):
    cells = {(s, c) for score, cost in points for s in range(min(score, 9)) for c in range(cost, 6) if score > s}
    assert hypervolume(*zip(*points, strict=True), reference=(0, 6)) == len(cells)


def test_the_knee_is_where_more_cost_stops_paying():
    assert knee([0.1, 0.8, 0.9, 0.92], [10, 20, 50, 100]) == 1
    assert knee([0.5], [1]) == 0 and knee([0.5, 0.6], [1, 2]) == 1
    assert knee(np.array([0.0, 0.5, 1.0]), np.array([0, 50, 100])) == 0


@given(st.lists(st.floats(0, 1), min_size=1, max_size=30), st.integers(2, 12))
def test_a_thinned_front_keeps_its_ends_and_leaves_no_hole(costs, most):
    kept = thinned(costs, most)
    values = [costs[place] for place in kept]
    assert values == sorted(values) and len(kept) == min(most, len(costs)) == len(set(kept))
    assert (min(values), max(values)) == (min(costs), max(costs))


def test_a_crowd_is_thinned_before_what_stands_alone():
    costs = [0.5, 0.11, 0.1, 0.9, 0.12, 0.13, 0.7]
    assert [costs[place] for place in thinned(costs, 5)] == [0.1, 0.13, 0.5, 0.7, 0.9]
