"""Our samplers: on the budget, better than chance, learning from other runs; and an exact knapsack."""

import itertools
from dataclasses import replace

import numpy as np
import optuna
import pytest
from optuna.distributions import FloatDistribution

from benchmarks.sampling import SyntheticSpace, run
from prunefront.search.allocation import AllocationSampler, choose, rising
from prunefront.search.budget import Limits
from prunefront.search.coordinates import Coordinates
from prunefront.search.problem import ALL_SHARES, COST_SHARE, SHARES, Problem
from prunefront.search.sampler import FIRST_TRIALS, Scored, SurrogateSampler, expected_improvement
from prunefront.search.samplers import make_sampler, shares_for
from prunefront.search.surrogate import Surrogate, transformed
from prunefront.search.warm_start import Earlier


def problem(groups: int = 6, share: float = 0.5) -> Problem:
    space = SyntheticSpace(groups, 0)
    dense = float(space.cost_batch(space.sizes[None])[0, 0])
    return Problem(space, Limits((share * dense, *[np.inf] * 4)), "macs")


@pytest.mark.parametrize("seed", range(5))
def test_the_knapsack_agrees_with_brute_force(seed):
    rng = np.random.default_rng(seed)
    sizes, limits = (3, 4, 2, 4), np.array([2.0, 2.5])
    gains = [rng.normal(size=size) for size in sizes]
    costs = [rng.uniform(0, 1, (size, 2)) for size in sizes]
    feasible = [
        choice
        for choice in itertools.product(*map(range, sizes))
        if (sum(cost[i] for cost, i in zip(costs, choice, strict=True)) <= limits).all()
    ]
    best = max(feasible, key=lambda choice: sum(gain[i] for gain, i in zip(gains, choice, strict=True)))
    assert tuple(choose(gains, costs, limits)) == best


def test_a_knapsack_that_nothing_fits_is_an_error():
    with pytest.raises(ValueError, match="no choice"):
        choose([np.zeros(2)], [np.ones((2, 1))], np.array([0.5]))


@pytest.mark.parametrize("sampler", ["surrogate", "allocation"])
def test_our_samplers_beat_random_plans(sampler):
    trials = 60
    found = np.mean([run(sampler, "growing", 0.5, 8, seed, trials).regret[-1] for seed in range(3)])
    chance = np.mean([run("random", "growing", 0.5, 8, seed, trials).regret[-1] for seed in range(3)])
    assert found < chance


def test_sensitivities_are_repaired_to_the_nearest_rising_ones():
    x, y = np.array([0.0, -1.0, 1.0, 2.0]), np.array([3.0, 1.0, 2.0, 4.0])
    at = np.array([-2.0, -1.0, 0.0, 0.5, 1.0, 3.0])
    # 3 and 2 fall: both become their mean. Beyond the ends the last slopes go on.
    assert rising(x, y, at).tolist() == pytest.approx([-0.5, 1.0, 2.5, 2.5, 2.5, 5.5])
    assert rising(np.array([0.0]), np.array([1.0]), at).tolist() == [1.0] * 6


def test_one_set_of_sensitivities_gives_an_allocation_for_every_budget_of_a_front():
    space = SyntheticSpace(5, 0)
    space._interaction = np.zeros_like(space._interaction)
    dense = float(space.cost_batch(space.sizes[None])[0, 0])
    front = Problem(space, Limits((0.8 * dense, *[np.inf] * 4)), "macs", for_front=True)
    study = optuna.create_study(directions=["maximize", "minimize"], sampler=AllocationSampler(front, 0))
    gains, middle = [], float(np.sqrt(np.prod(front.cost_shares)))
    for number in range(1 + 4 * 5 + 8):
        trial = study.ask(front.distributions)
        projector = front.projector(trial.params[COST_SHARE])
        widths = projector.fill(np.array([trial.params[name] for name in space.dimensions]))
        named = dict(zip(space.dimensions, widths.tolist(), strict=True))
        trial.set_user_attr("plan", {"widths": named, "criterion": "synthetic"})
        study.tell(trial, [float(space.value(widths[None])[0]), float(space.cost_batch(widths[None])[0, 0])])
        near = 0.5 < trial.params[COST_SHARE] / middle < 2  # farther off, slopes are extrapolated
        if number > 4 * 5 and near:
            uniform = projector.fill(np.ones(len(widths)))
            gains.append(study.trials[-1].values[0] - float(space.value(uniform[None])[0]))
    shares = {round(t.params[COST_SHARE], 6) for t in study.trials}
    assert len(shares) == 9 and len(gains) >= 4 and min(gains) > 0


def test_an_allocation_probes_every_dimension_whatever_plans_the_study_was_given():
    space = SyntheticSpace(4, 0)
    problem = Problem(space, Limits((0.5 * float(space.cost_batch(space.sizes[None])[0, 0]), *[np.inf] * 4)), "macs")
    found = []
    for given in (1, 3):
        study = optuna.create_study(direction="maximize", sampler=AllocationSampler(problem, 0))
        for number in range(given):
            study.enqueue_trial(dict.fromkeys(space.dimensions, 0.3) | {space.dimensions[0]: 0.3 + 0.1 * number})
        for _ in range(given + 4 * 4 + 1):
            trial = study.ask(problem.distributions)
            widths = problem.projector().fill(np.array([trial.params[name] for name in space.dimensions]))
            named = dict(zip(space.dimensions, widths.tolist(), strict=True))
            trial.set_user_attr("plan", {"widths": named, "criterion": "synthetic"})
            study.tell(trial, float(space.value(widths[None])[0]))
        found.append([trial.user_attrs["plan"] for trial in study.trials[given:]])
    assert found[0] == found[1]


def test_the_surrogate_slopes_are_those_of_its_mean():
    rng = np.random.default_rng(0)
    points = rng.normal(0, 0.3, (30, 4))
    surrogate = Surrogate(points, -np.exp(points.sum(1) + (points**2).sum(1)), rng)
    at, step = rng.normal(0, 0.3, (3, 4)), 1e-5
    moved = [(surrogate.predict(at + d)[0] - surrogate.predict(at - d)[0]) / (2 * step) for d in step * np.eye(4)]
    assert surrogate.slopes(at) == pytest.approx(np.array(moved).T, rel=1e-4, abs=1e-6)


def test_the_surrogate_predicts_additive_scores_of_plans_that_it_has_not_seen():
    rng = np.random.default_rng(0)
    points = rng.normal(0, 0.3, (80, 20))
    values = 3 + points @ rng.normal(size=20) - (points**2) @ rng.uniform(0, 2, 20)
    surrogate = Surrogate(points[:60], values[:60], rng)
    means, deviations = surrogate.predict(points[60:])
    assert np.corrcoef(means, values[60:])[0, 1] > 0.9
    assert (np.abs(means - values[60:]) < 4 * deviations).mean() > 0.9


def test_expected_improvement_against_sampling():
    rng = np.random.default_rng(0)
    draws = rng.normal(0.3, 0.5, 400_000)
    expected = np.maximum(draws - 0.6, 0).mean()
    assert expected_improvement(np.array([0.3]), np.array([0.5]), 0.6)[0] == pytest.approx(expected, rel=0.01)


def ask(sampler: SurrogateSampler, study: optuna.Study) -> tuple[dict, np.ndarray]:
    trial = study.ask(sampler.problem.distributions)
    space = sampler.problem.space
    shares = np.array([trial.params[name] for name in space.dimensions])
    widths = sampler.problem.projector(trial.params.get(COST_SHARE)).fill(shares)
    named = dict(zip(space.dimensions, widths.tolist(), strict=True))
    trial.set_user_attr("plan", {"widths": named, "criterion": "synthetic"})
    study.tell(trial, float(space.value(widths[None])[0]))
    return trial.params, widths


def test_proposals_hold_the_budget_and_are_never_repeated():
    sampler = SurrogateSampler(problem(), 0)
    study = optuna.create_study(direction="maximize", sampler=sampler)
    asked = [ask(sampler, study) for _ in range(30)]
    widths = np.array([row for _, row in asked])
    assert (sampler.problem.projector().excess(widths) <= 0).all()
    assert len({tuple(row) for row in widths[FIRST_TRIALS:].tolist()}) == 30 - FIRST_TRIALS
    low, high = sampler.problem.shares
    assert all(low <= value <= high for parameters, _ in asked for value in parameters.values())


@pytest.mark.parametrize("share", [0.5, 0.1])
def test_the_plan_that_was_chosen_is_the_plan_that_is_tried(share, monkeypatch):
    wide = replace(problem(share=share), shares=ALL_SHARES)
    sampler, chosen = SurrogateSampler(wide, 0), []
    for name in ("_random", "_best"):
        plain = getattr(sampler, name)
        monkeypatch.setattr(sampler, name, lambda *args, plain=plain: chosen.append(plain(*args)) or chosen[-1])
    study = optuna.create_study(direction="maximize", sampler=sampler)
    for _ in range(40):
        tried = ask(sampler, study)[1]
        assert tried.tolist() == chosen[-1][0].tolist()


def test_a_study_keeps_the_range_of_its_shares():
    study = optuna.create_study()
    assert shares_for("auto", study) == shares_for("allocation", study) == ALL_SHARES
    assert shares_for("gp", study) == SHARES == shares_for(optuna.samplers.TPESampler(), study)
    study.ask({COST_SHARE: FloatDistribution(0.3, 0.5), "g0": FloatDistribution(0.1, 1.0, log=True)})
    assert shares_for("auto", study) == (0.1, 1.0)


def test_a_sampler_that_is_given_draws_new_numbers_when_a_study_goes_on():
    given = optuna.samplers.RandomSampler(seed=0)
    first, *_ = (make_sampler(given, problem(), 5, 0, Earlier()) for _ in range(1))
    drawn = [optuna.create_study(sampler=first).ask().suggest_float("x", 0, 1)]
    for is_fresh in (True, False):
        sampler = make_sampler(optuna.samplers.RandomSampler(seed=0), problem(), 5, 0, Earlier(), is_fresh)
        drawn.append(optuna.create_study(sampler=sampler).ask().suggest_float("x", 0, 1))
    assert drawn[0] == drawn[1] != drawn[2]


def test_losses_of_nothing_do_not_spread_the_logarithms():
    losses = np.array([0.5, 0.4, 0.3, 0.2, 1e-9, 0.0])
    found = transformed(-losses)
    assert np.isfinite(found).all() and found[:4].tolist() == pytest.approx((-np.log(losses[:4])).tolist())
    assert found[4] == found[5] == pytest.approx(-np.log(1e-3 * np.median(losses)))


def test_an_allocation_goes_on_from_the_start_that_was_tried_again():
    sampler = AllocationSampler(problem(), 0)
    study = optuna.create_study(direction="maximize", sampler=sampler)
    study.enqueue_trial(sampler.problem.starts()[0])
    killed = study.ask(sampler.problem.distributions)
    study.tell(killed, state=optuna.trial.TrialState.FAIL)
    study.enqueue_trial(killed.params)
    widths = [ask(sampler, study)[1] for _ in range(10)]
    assert len({tuple(row) for row in widths}) > 5


def test_a_search_that_knows_earlier_plans_starts_where_they_are_good():
    sampler = SurrogateSampler(problem(share=0.6), 0)
    study = optuna.create_study(direction="maximize", sampler=sampler)
    for _ in range(40):
        ask(sampler, study)
    earlier = Scored.of(sampler.problem, study.trials)

    def first(given: Scored | None) -> float:
        later = SurrogateSampler(problem(share=0.5), 1, given)
        fresh = optuna.create_study(direction="maximize", sampler=later)
        return max(float(later.problem.space.value(ask(later, fresh)[1][None])[0]) for _ in range(4))

    assert first(earlier) > first(None)


def test_plans_lie_where_they_lose_outputs_as_far_as_that_is_known():
    curve = np.array([1.0, 0.5, 0.24, 0.09, 0.0])
    space = SyntheticSpace(2, 0)
    space.sizes, space.lost_outputs = np.array([4, 8]), lambda criterion: [curve, None]
    coordinates = Coordinates(space)
    widths, criteria = np.array([[2, 4], [4, 8]]), np.zeros(2, dtype=np.int64)
    expected = [[-np.log(0.25), np.log(0.5)], [-np.log(0.01), 0.0]]
    assert coordinates.of(widths, criteria) == pytest.approx(np.array(expected))
    slopes = coordinates.slopes(widths, criteria)
    assert slopes[:, 1] == pytest.approx(1.0) and (slopes[:, 0] > 0).all()
    between = (-np.log(0.1) + np.log(0.51)) / np.log(3)  # from one width below to one above
    assert slopes[0, 0] == pytest.approx(between, rel=0.3)
