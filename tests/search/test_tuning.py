"""Fine-tuning inside trials: reported, given up below the median, and part of what is kept."""

import optuna
import pytest
import torch
from torch import nn

import prunefront
from prunefront.search.study import STOPPED, is_estimate
from prunefront.search.tuning import LEAST_TRIALS, STEPS, GivenUp, Watch
from prunefront.spaces.errors import SearchError

INPUTS = torch.randn(32, 5, generator=torch.Generator().manual_seed(0))


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 24), nn.ReLU(), nn.Linear(24, 16), nn.ReLU(), nn.Linear(16, 4)).eval()


class Shift:
    """Adds to the last bias step by step; a width below ``half`` adds nothing."""

    description = "shift"

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, candidate, report):
        self.calls += 1
        for step in (1, 2, 3):
            with torch.no_grad():
                candidate[4].bias += 0.1 * (candidate[0].out_features - 12)
            report(step, candidate)
        return candidate


def score(model: nn.Module) -> float:
    return float(model[4].bias.detach().sum())


@pytest.mark.parametrize("mode", ["budget", "front"])
def test_candidates_are_trained_and_bad_ones_given_up(tmp_path, mode):
    tuning = Shift()
    found = prunefront.search(
        net(),
        INPUTS[:1],
        score=score,
        budget={"macs": "60%"},
        mode=mode,
        n_trials=40,
        tuning=tuning,
        sampler="random",
        run_dir=tmp_path,
        compensation="none",
        guide="score",
    )
    trials = found.study.trials
    stopped = [t for t in trials if STOPPED in t.user_attrs]
    assert stopped and len(stopped) < len(trials) - LEAST_TRIALS
    trained = [t for t in stopped if STEPS in t.user_attrs]  # others are plans of before once more
    assert all(t.values[0] == t.user_attrs[STEPS][str(t.user_attrs[STOPPED])] and is_estimate(t) for t in trained)
    assert trained and {t.values[0] for t in stopped} == {t.values[0] for t in trained}
    if mode == "budget":
        assert all(t.intermediate_values[1] == t.user_attrs[STEPS]["1"] for t in trials if STEPS in t.user_attrs)
    names = {f"trial{t.number:04d}" for t in stopped}
    assert not names & {entry.name for entry in found.front}
    best = found.best.model()
    assert score(best) == pytest.approx(found.best.metrics["score"])  # the kept model is a trained one
    with pytest.raises(SearchError, match="tuning"):
        prunefront.search(
            net(),
            INPUTS[:1],
            score=score,
            budget={"macs": "60%"},
            mode=mode,
            n_trials=41,
            run_dir=tmp_path,
            compensation="none",
            guide="score",
        )


def test_a_candidate_is_compared_with_those_that_cost_no_more():
    study = optuna.create_study(directions=["maximize", "minimize"])
    for cost in range(LEAST_TRIALS + 1):
        trial = study.ask()
        trial.set_user_attr(STEPS, {"1": float(cost)})
        study.tell(trial, [float(cost), float(cost)])
    watch = Watch(study.ask(), lambda model: 0.5, study.trials[:-1], cost=2.0)
    watch(1, net())  # three that cost no more are too few
    with pytest.raises(GivenUp, match="after 1 steps"):
        Watch(study.ask(), lambda model: 0.5, study.trials[: LEAST_TRIALS + 1], cost=100.0)(1, net())
