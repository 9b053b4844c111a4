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


def test_a_thinned_front_loses_least():
    """Against all ways to leave points out; the ends stay."""
    rng = np.random.default_rng(3)
    costs, scores = np.sort(rng.random(7)), np.sort(rng.random(7))
    reference = (float(scores[0]), float(costs[-1]))
    kept = thinned(scores, costs, 6)
    areas = {
        left_out: hypervolume(np.delete(scores, left_out), np.delete(costs, left_out), reference)
        for left_out in range(1, 6)
    }
    assert set(range(7)) - set(kept) == {max(areas, key=lambda place: areas[place])}
    assert thinned(scores, costs, 2) == [0, 6] and thinned(scores, costs, 7) == list(range(7))
    assert thinned([0.5], [1.0], 3) == [0]
