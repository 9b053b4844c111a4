"""Fine-tuning inside trials with a task's own training split."""

import json
from dataclasses import replace

import pytest
import torch

from prunefront.runners.cli import main
from prunefront.runners.finetuning.trial import TrialTuning
from prunefront.runners.tasks.digits import digits
from prunefront.search.tuning import GivenUp
from prunefront.spaces.errors import ConfigError


@pytest.fixture(scope="module")
def task():
    return digits(width=4, epochs=1)


@pytest.mark.parametrize(("steps", "expected"), [(1, [1]), (4, [2, 4]), (50, [17, 34, 50])])
def test_reports_come_after_thirds_of_the_steps(task, steps, expected):
    seen = []
    TrialTuning(task, steps, 0.01, 0)(task.make_model(), lambda step, model: seen.append((step, model.training)))
    assert seen == [(step, False) for step in expected]


def test_steps_lower_the_loss_and_are_the_same_for_a_seed(task):
    dense = task.make_model()
    tuning = TrialTuning(task, 60, 0.02, 0)
    (first, second) = (tuning(dense, lambda step, model: None) for _ in range(2))
    images, labels = next(iter(task.calibration))

    def loss(model):
        with torch.no_grad():
            return float(torch.nn.functional.cross_entropy(model(images), labels))

    assert loss(first) < 0.8 * loss(dense)
    assert all(
        torch.equal(a, b) for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    )
    other = TrialTuning(task, 60, 0.02, 1)(dense, lambda step, model: None)
    assert not torch.equal(other.linear.weight, first.linear.weight)


def test_a_report_that_gives_up_ends_the_training(task):
    seen = []

    def report(step, model):
        seen.append(step)
        raise GivenUp(step, 0.0)

    with pytest.raises(GivenUp):
        TrialTuning(task, 9, 0.01, 0)(task.make_model(), report)
    assert seen == [3]


def test_a_task_without_training_split_is_refused(task):
    with pytest.raises(ConfigError, match="no training split"):
        TrialTuning(replace(task, training=None), 9, 0.01, 0)


def test_a_search_trains_its_trials_and_its_finalists(tmp_path, tiny, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    command = ["search", *tiny, "finetune_steps=6", "finalists=1", "tracker=none"]
    for name, more in {"a": [], "b": [], "c": ["finetune_steps=0"]}.items():
        assert main([*command, *more, f"run_dir=runs/{name}"]) == 0
    weights = {}
    for name in "abc":
        pick = json.loads((tmp_path / f"runs/{name}/result.json").read_text())["picked"]
        weights[name] = (pick, (tmp_path / f"runs/{name}/front/{pick}/weights.safetensors").read_bytes())
    assert weights["a"] == weights["b"] != weights["c"]
