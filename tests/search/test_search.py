"""A whole search on a small network: budget, repeats, failures, resuming, damage."""

import itertools
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import optuna
import pytest
import torch
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from torch import nn

import prunefront
from prunefront.search import liveness, scores
from prunefront.search import study as study_module
from prunefront.search.candidates import Candidates
from prunefront.search.study import Store, open_study, read_study
from prunefront.spaces.errors import (
    BudgetError,
    CalibrationError,
    ConfigError,
    ModelError,
    PrunefrontError,
    SearchError,
    StorageError,
)
from tests.processes import environment

CALIBRATION = [torch.randn(128, 3, 8, 8, generator=torch.Generator().manual_seed(1))]
INPUTS = CALIBRATION[0][:1]


def make_model(width: int = 8) -> nn.Module:
    torch.manual_seed(0)
    first, second = nn.Conv2d(3, width, 3), nn.Conv2d(width, 12, 3)
    layers = [first, nn.BatchNorm2d(width), nn.ReLU(), second, nn.BatchNorm2d(12), nn.ReLU(), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(12 * 16, 4)).eval()


def fidelity(model: nn.Module) -> float:
    with torch.no_grad():
        return -float((model(CALIBRATION[0]) - make_model()(CALIBRATION[0])).abs().mean())


def weight(model: nn.Module) -> float:
    return sum(float(parameter.detach().abs().sum()) for parameter in model.parameters())


def run(run_dir: Path, **options) -> prunefront.Result:
    settings = {"score": fidelity, "budget": {"macs": "50%"}, "calibration": CALIBRATION, "sampler": "random"}
    model = options.pop("model", None) or make_model()
    return prunefront.search(model, INPUTS, run_dir=run_dir, **{**settings, "n_trials": 6, **options})


@pytest.mark.parametrize("sampler", ["auto", "allocation", "gp", "cmaes", "tpe", "nsga2", "random"])
def test_every_sampler_finds_models_within_the_budget(tmp_path, sampler):
    result = run(tmp_path, sampler=sampler, n_trials=8, test=fidelity)
    limit = result.space.dense_cost.macs / 2
    assert all(entry.metrics["macs"] <= limit for entry in result.front)
    assert result.best.metrics["score"] == max(trial.value for trial in result.study.trials)
    model = result.best.model()
    assert fidelity(model) == pytest.approx(result.best.metrics["score"], rel=1e-4)
    assert result.best.metrics["test"] == pytest.approx(result.best.metrics["score"], rel=1e-4)
    assert result.space.cost(result.best.plan).params == sum(p.numel() for p in model.parameters())


def test_plain_optuna_reads_the_trials_and_a_run_continues_without_scoring_again(tmp_path):
    scored = []
    run(tmp_path, score=lambda model: scored.append(1) or fidelity(model))
    study = optuna.load_study(
        study_name="prunefront", storage=JournalStorage(JournalFileBackend(str(tmp_path / "study.journal")))
    )
    plans = {trial.user_attrs["plan"]["fingerprint"] for trial in study.trials}
    assert len(study.trials) == 6 and len(plans) <= 5
    # Once as a trial, once as a finalist, repaired thoroughly; and the dense model.
    assert len(scored) == 2 * len(plans) + 1
    assert set(study.trials[0].user_attrs["costs"]) == {"macs", "params", "memory_bytes", "size_bytes"}
    scored.clear()
    assert len(run(tmp_path, n_trials=6).study.trials) == 6 and not scored
    assert len(run(tmp_path, n_trials=9).study.trials) == 9


def test_the_same_seed_gives_the_same_plans(tmp_path):
    first, second = (run(tmp_path / name, seed=3).study.trials for name in "ab")
    assert [t.user_attrs["plan"] for t in first] == [t.user_attrs["plan"] for t in second]


@pytest.mark.parametrize("bad", [float("nan"), torch.ones(2), ValueError("no luck")])
def test_a_failing_score_fails_its_trial_and_the_search_goes_on(tmp_path, bad):
    answers = iter([None, bad])  # the dense model is scored first

    def score(model):
        answer = next(answers, None)
        if isinstance(answer, Exception):
            raise answer
        return fidelity(model) if answer is None else answer

    trials = run(tmp_path, score=score).study.trials
    assert [t.state.name for t in trials] == ["FAIL"] + ["COMPLETE"] * 5
    assert trials[0].user_attrs["error"]


def test_a_search_stops_with_the_reason_when_all_trials_fail(tmp_path):
    with pytest.raises(SearchError, match="no luck"):
        run(tmp_path, score=only_dense)


def only_dense(model: nn.Module) -> float:
    if model[0].out_channels < 8 or model[3].out_channels < 12:
        raise ValueError("no luck")
    return 1.0


def test_a_score_that_fails_is_told_before_any_trial(tmp_path):
    for wrong, told in (
        (lambda model: torch.ones(1), "must return one number, not Tensor"),
        (lambda model: 1 / 0, "zero"),
    ):
        with pytest.raises(ConfigError, match=f"score fails on the dense model.*{told}"):
            run(tmp_path, score=wrong)
    assert run(tmp_path).best  # nothing of it is left
    assert run(tmp_path / "tensor", score=lambda model: model[0].weight.detach().sum()).best.metrics["score"]


def test_a_result_says_what_failed(tmp_path):
    calls = iter([True, False, True, False])  # the dense model, then trials
    result = run(tmp_path, score=lambda model: 1.0 if next(calls, True) else float("nan"), n_trials=6)
    assert result.remarks[0] == "2 of 6 trials failed" and "2 of 6 trials failed" in repr(result)


def test_a_result_is_printed_beside_the_dense_model(tmp_path):
    result = run(tmp_path, n_trials=3, finalists=1)
    dense, best = result.dense, result.best.metrics
    *_, row, picked = repr(result).splitlines()
    assert row.split()[:2] == ["*", result.best.name] and picked == "* picked: the best score within the budget"
    assert f"{best['score']:.4f} ({best['score'] - dense['score']:+.4f})" in row
    assert f"{best['macs']:,} ({best['macs'] / dense['macs']:.1%})" in row


def test_what_a_longer_search_removes_is_told_and_work_of_the_users_stays(tmp_path, caplog):
    calls = itertools.count()

    def found(n_trials: int) -> prunefront.Result:
        def score(model: nn.Module) -> float:  # the last is the best
            return -1.0 if model[0].out_channels == 8 and model[3].out_channels == 12 else next(calls)

        return run(tmp_path, score=score, n_trials=n_trials, finalists=1)

    def removed(result: prunefront.Result) -> list[str]:
        return [remark for remark in result.remarks if "removed" in remark]

    first, second = found(1), found(2)
    assert not removed(first) and not first.best.path.exists()
    assert removed(second) == ["no longer on the front, and removed: trial0000; their plans stay in the study"]
    (second.best.path / "export" / "onnx").mkdir(parents=True)
    kept = f"no longer on the front, and kept with what was made of them: {second.best.name}"
    # It stays on the front until one is found that costs no more.
    count = next(n for n in range(3, 20) if kept in found(n).remarks)
    assert second.best.path.exists() and "counts them" not in caplog.text
    found(2)
    assert f"{count} trials are done, and n_trials=2 counts them: no more are run" in caplog.text


def test_a_front_of_one_model_has_no_knee(tmp_path):
    result = run(tmp_path, mode="front", n_trials=1)
    assert "a front of one model: more trials may find others" in result.remarks
    assert "picked: the only one" in repr(run(tmp_path / "without", mode="front", n_trials=1, budget=None))
    whole = run(tmp_path / "whole", n_trials=1, budget={"macs": "100%"})
    assert "trial0000 has all units of the dense model: they differ by its repair" in whole.remarks


class Own(nn.Sequential):
    """A class of the running script, once its module says so."""


def test_a_class_of_the_running_script_is_told_when_searching_and_when_loading(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(Own, "__module__", "__main__")
    monkeypatch.setattr(sys.modules["__main__"], "Own", Own, raising=False)
    model = Own(*make_model()).eval()
    run(tmp_path, model=model, n_trials=1)
    assert "Own of the running script cannot be loaded by other programs" in caplog.text
    assert isinstance(prunefront.load(tmp_path), Own)
    monkeypatch.delattr(sys.modules["__main__"], "Own")
    with pytest.raises(StorageError, match="the class Own of the script that saved it"):
        prunefront.load(tmp_path)
    assert isinstance(prunefront.load(tmp_path, model=model), Own)


def test_searches_without_a_folder_have_their_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folders = {run(None, n_trials=1).run_dir, run(None, n_trials=1).run_dir, run(None, n_trials=1).run_dir}
    assert len(folders) == 3


def test_interrupting_keeps_what_was_found(tmp_path):
    calls = []

    def score(model):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return fidelity(model)

    result = run(tmp_path, score=score, n_trials=50)
    assert sum(t.state.name == "COMPLETE" for t in result.study.trials) >= 3
    assert result.is_interrupted and not run(tmp_path, n_trials=4).is_interrupted


def test_what_was_judged_stays_in_the_running(tmp_path):
    """The guide prefers what the score does not: a longer search must not give up the better model for a worse one."""
    options = {"guide": "fidelity", "score": lambda model: -fidelity(model), "finalists": 1}
    scores = [run(tmp_path, n_trials=n, **options).best.metrics["score"] for n in (2, 6, 12)]
    assert scores == sorted(scores)
    assert run(tmp_path / "b", n_trials=12, **options).best.metrics["score"] < scores[-1]  # the guide was of no help


def test_a_run_of_another_model_is_refused(tmp_path):
    run(tmp_path)
    other = make_model()
    with torch.no_grad():
        other[0].weight[0, 0, 0, 0] += 1
    for model, what in ((make_model(width=6), "another model"), (other, "a model with other weights")):
        with pytest.raises(SearchError, match=what):
            run(tmp_path, model=model)
    with pytest.raises(SearchError, match="another model: 0 has 8 units there, 6 units here"):
        run(tmp_path, model=make_model(width=6))


def test_the_dense_model_is_scored_once_beside_what_was_found(tmp_path, capsys):
    model = make_model().train()
    scored = []

    def score(candidate: nn.Module) -> float:
        if candidate is model:
            scored.append(candidate.training)
        return fidelity(candidate)

    found = [run(tmp_path, model=model, score=score, test=weight, n_trials=n) for n in (3, 4)][-1]
    assert scored == [False, False] and model.training  # once more to see that the score is the same
    assert found.dense["score"] == fidelity(make_model()) and found.dense["test"] == pytest.approx(weight(model))
    assert found.dense["macs"] == found.space.dense_cost.macs
    lines = str(found).splitlines()
    rows = lines[3 : 3 + len(found.front)]
    assert str(tmp_path) in lines[0] and lines[2].startswith("dense") and sum("* trial" in row for row in rows) == 1
    known = run(tmp_path / "known", model=model, score=score, dense={"score": 7.0}, show_progress_bar=True)
    assert scored == [False, False] and known.dense["score"] == 7.0 and "6/6" in capsys.readouterr().out


def test_a_run_of_another_score_is_refused(tmp_path):
    run(tmp_path)
    with pytest.raises(SearchError, match=r"dense model's score is 100, and in .* it was -?0: another score"):
        run(tmp_path, score=lambda model: 100 + fidelity(model), n_trials=8)


def test_what_fails_is_told_before_any_trial(tmp_path):
    for options, told in (
        ({"test": lambda model: None}, "test fails on the dense model"),
        ({"budget": {"mac": "50%"}}, "unknown budget 'mac'"),
        ({"budget": {"latency": "50%"}}, "needs timing="),
    ):
        with pytest.raises(PrunefrontError, match=told):
            run(tmp_path / told.split()[0], **options)
    with pytest.raises(BudgetError, match="latency is measured"):
        prunefront.project(prunefront.discover(make_model(), INPUTS), {"latency": "10%"})
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match="is a file, and a run needs a folder"):
        run(tmp_path / "file")


def test_errors_of_the_users_files_are_not_the_disks(tmp_path):
    def gone(study, trial):
        raise ConnectionError("tracker is down")

    with pytest.raises(ConnectionError, match="tracker is down"):
        run(tmp_path / "a", callbacks=[gone])

    def score(model):
        return fidelity(model) if model[0].out_channels == 8 else float(Path("/data/gone").read_text())

    with pytest.raises(SearchError, match="trials all failed; the last one with FileNotFoundError"):
        run(tmp_path / "b", score=score)


def test_scores_that_are_not_finite_fail_and_the_search_goes_on(tmp_path):
    values = prunefront.SampleScore(CALIBRATION, lambda output, batch: -output[:, 0].abs())
    infinite = prunefront.SampleScore(
        CALIBRATION, lambda output, batch: -output[:, 0].abs(), of_mean=lambda mean: mean if mean > -0.2 else -np.inf
    )
    told = [t.user_attrs.get("error") for t in run(tmp_path, score=values, guide="score", n_trials=8).study.trials]
    assert not any(told)
    found = [t.values for t in run(tmp_path / "b", score=infinite, guide="score", n_trials=12).study.trials if t.values]
    assert found and np.isfinite(found).all()


def test_a_finalist_that_fails_costs_no_other(tmp_path, caplog, monkeypatch):
    plain, calls = Candidates.prepare, []

    def prepare(self, plan, effort, *report):
        calls.append(effort)
        if effort == "thorough" and calls.count("thorough") == 1:
            raise RuntimeError("loss is nan")
        return plain(self, plan, effort, *report)

    monkeypatch.setattr(Candidates, "prepare", prepare)
    found = run(tmp_path, n_trials=8, finalists=3)
    assert "has no score: RuntimeError: loss is nan" in caplog.text and (tmp_path / "result.json").exists()
    assert found.best.path.exists()


def test_what_was_saved_is_read_and_neither_repaired_nor_trained_again(tmp_path, monkeypatch):
    first = run(tmp_path, n_trials=8)
    weights = (first.best.path / "weights.safetensors").read_bytes()
    folder = first.best.path / "finetuned" / "mine"
    folder.mkdir(parents=True)
    (folder / "work.txt").write_text("dear to me")

    def prepare(*_):
        raise AssertionError("built again")

    monkeypatch.setattr(Candidates, "prepare", prepare)
    again = run(tmp_path, n_trials=8, test=fidelity)
    assert again.best.name == first.best.name and again.best.metrics["test"] == pytest.approx(
        fidelity(again.best.model())
    )
    assert (first.best.path / "weights.safetensors").read_bytes() == weights
    assert (folder / "work.txt").read_text() == "dear to me" and not list(tmp_path.glob("front/.*"))


def test_models_are_saved_over_damaged_ones_and_the_users_work_stays(tmp_path):
    first = run(tmp_path, n_trials=8)
    (first.best.path / "export").mkdir()
    (first.best.path / "export" / "model.onnx").write_text("dear to me")
    (first.best.path / "weights.safetensors").write_bytes(b"torn")
    again = run(tmp_path, n_trials=8)
    assert again.best.name == first.best.name and again.best.metrics["score"] == first.best.metrics["score"]
    prunefront.load(again.best.path)
    assert (first.best.path / "export" / "model.onnx").read_text() == "dear to me"
    readable = [oct(path.stat().st_mode & 0o777) for path in first.best.path.glob("*.*")]
    assert len(set(readable)) == 1  # weights too


def test_starts_that_a_killed_session_has_left_out_are_put_there(tmp_path):
    options = {"mode": "front", "budget": {"macs": "90%"}, "sampler": "auto"}
    whole = run(tmp_path / "a", **options, n_trials=5)
    (tmp_path / "b").mkdir()
    study = open_study(Store(tmp_path / "b"), ["score", "macs"])
    for trial in whole.study.trials[:2]:
        study.enqueue_trial(trial.system_attrs["fixed_params"])
    found = run(tmp_path / "b", **options, n_trials=5)
    given = [[t.system_attrs["fixed_params"] for t in r.study.trials[:5]] for r in (whole, found)]
    assert given[0] == given[1]


def test_a_torn_journal_tail_is_cut_and_kept_beside_it(tmp_path):
    run(tmp_path)
    journal = tmp_path / "study.journal"
    with journal.open("ab") as file:
        file.write(b'{"op_code": 5, "worker')
    assert len(run(tmp_path, n_trials=8).study.trials) == 8
    assert (tmp_path / "study.torn").read_bytes() == b'{"op_code": 5, "worker'


def test_a_record_that_a_killed_process_left_unfinished_takes_none_of_the_others_along(tmp_path):
    run(tmp_path)
    study = read_study(tmp_path)
    with (tmp_path / "study.journal").open("ab") as file:
        file.write(b'{"op_code": 5, "worker')
    study.enqueue_trial({})  # a process that lives on
    assert len(read_study(tmp_path).trials) == 7
    assert (tmp_path / "study.torn").read_bytes() == b'{"op_code": 5, "worker'


def test_a_damaged_journal_is_told_as_such(tmp_path):
    run(tmp_path)
    lines = (tmp_path / "study.journal").read_bytes().splitlines(keepends=True)
    (tmp_path / "study.journal").write_bytes(b"".join([*lines[:3], b'{"op_\n', *lines[3:]]))
    with pytest.raises(StorageError, match=r"study.journal is damaged"):
        read_study(tmp_path)
    with pytest.raises(StorageError, match=r"study.journal is damaged"):
        run(tmp_path)


def test_the_lock_of_a_killed_process_is_taken_over(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(study_module, "LOCK_GRACE_S", 3)
    run(Path("a"))
    (tmp_path / "a" / "study.journal.lock").symlink_to(tmp_path / "a" / "study.journal")
    assert len(run(Path("a"), n_trials=8).study.trials) == 8
    assert not (tmp_path / "a" / "study.journal.lock").is_symlink()


def test_a_damaged_space_file_is_an_error(tmp_path):
    run(tmp_path)
    (tmp_path / "space.json").write_text("{")
    with pytest.raises(StorageError, match="damaged"):
        run(tmp_path)


@pytest.mark.parametrize("sampler", ["auto", "nsga2", "gp", "random"])
def test_front_mode_explores_the_whole_range(tmp_path, sampler):
    # A score that every removed parameter lowers: the front of an untrained network has but few points.
    result = run(tmp_path, score=weight, mode="front", budget=None, sampler=sampler, n_trials=16)
    macs = [trial.values[1] / result.space.dense_cost.macs for trial in result.study.trials]
    assert min(macs) < 0.4 < max(macs) <= 1
    scores = [entry.metrics["score"] for entry in result.front]
    assert scores == sorted(scores) and len(result.front) > 2


def test_a_front_starts_with_equal_shares_from_end_to_end_and_ends_at_the_lowest_cost(tmp_path):
    result = run(tmp_path, score=weight, mode="front", budget={"params": "80%"}, lowest="40%", n_trials=12)
    dense, trials = result.space.dense_cost.params, result.study.trials
    shares = [trial.user_attrs["costs"]["params"] / dense for trial in trials]
    assert min(shares) > 0.33 and max(shares) <= 0.8  # widths are whole numbers: a plan falls a little short
    assert sorted(shares[:5], reverse=True) == shares[:5]
    sizes = {group.name: group.size for group in result.space.groups}
    for trial in trials[:5]:
        kept = [width / sizes[name] for name, width in trial.user_attrs["plan"]["widths"].items()]
        assert max(kept) - min(kept) < 0.2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lowest": "30%"}, "needs mode=front"),
        ({"lowest": "60%", "mode": "front"}, "not below the budget macs=50%"),
        ({"lowest": "low", "mode": "front"}, "lowest=low: cannot read budget macs='low'"),
        ({"lowest": 1, "mode": "front"}, "lowest=1: the smallest candidate .* macs; was a share meant"),
        ({"budget": {"macs": "30%..70%"}}, "two ends: that is mode=front with the budget macs=70% and lowest=30%"),
        ({"budget": {"latency": "2-5ms"}}, "two ends: that is mode=front with the budget latency=5ms and lowest=2ms"),
    ],
)
def test_a_lowest_cost_that_means_nothing_is_refused(tmp_path, options, message):
    with pytest.raises(PrunefrontError, match=message):
        run(tmp_path, **{"budget": {"macs": "50%"}, **options})


def test_front_mode_holds_its_budgets(tmp_path):
    result = run(tmp_path, mode="front", budget={"params": "60%", "macs": "80%"}, n_trials=10)
    dense = result.space.dense_cost
    assert result.objective == "params" and result.best is result.front[-1]
    for trial in result.study.trials:
        assert trial.values[1] == trial.user_attrs["costs"]["params"] <= 0.6 * dense.params
        assert trial.user_attrs["costs"]["macs"] <= 0.8 * dense.macs


def test_a_killed_trial_is_tried_again(tmp_path, monkeypatch):
    monkeypatch.setattr(liveness, "UNSIGNED_S", 1.0)
    study = run(tmp_path, n_trials=2).study
    killed = study.ask()
    wanted = {g: killed.suggest_float(g, 0.1, 1.0, log=True) for g in study.trials[0].params}
    again = run(tmp_path, n_trials=3).study.trials
    assert [t.state.name for t in again] == ["COMPLETE", "COMPLETE", "FAIL", "COMPLETE"]
    assert again[3].params == wanted


def test_the_search_chooses_among_several_criteria(tmp_path):
    result = run(tmp_path, criterion=["l1", "reconstruction"], compensation="sequential", n_trials=10)
    trials = result.study.trials
    assert {trial.params["criterion"] for trial in trials} == {"l1", "reconstruction"}
    assert all(trial.user_attrs["plan"]["criterion"] == trial.params["criterion"] for trial in trials)
    best = result.study.best_trial
    plan = result.space.plan(best.user_attrs["plan"]["widths"], best.params["criterion"])
    assert plan.fingerprint == best.user_attrs["plan"]["fingerprint"] == result.best.plan.fingerprint
    model = prunefront.load(tmp_path)
    assert fidelity(model) == pytest.approx(result.best.metrics["score"], rel=1e-4)
    with pytest.raises(SearchError, match="has compensation 'sequential', not 'bn'"):
        run(tmp_path, criterion=["l1", "reconstruction"], compensation="bn")


def test_a_space_brings_its_own_calibration(tmp_path):
    model = make_model()
    space = prunefront.discover(model, INPUTS, calibration=CALIBRATION, compensation="bn")
    result = run(tmp_path, model=model, space=space, calibration=None, n_trials=3)
    assert result.space.compensation == "bn"
    with pytest.raises(ConfigError, match="give them to discover"):
        run(tmp_path, model=model, space=space)
    with pytest.raises(CalibrationError, match="BatchNorm"):
        run(tmp_path, model=model, space=prunefront.discover(model, INPUTS), calibration=None)
    untouched = prunefront.discover(model, INPUTS, compensation="none")
    assert run(tmp_path / "none", model=model, space=untouched, calibration=None, n_trials=2).best


def test_a_failing_test_function_costs_no_model(tmp_path, caplog):
    result = run(tmp_path, test=lambda model: 1.0 if model[0].out_channels == 8 else float("nan"))
    assert "test" not in result.best.metrics and "test returned nan" in caplog.text and result.dense["test"] == 1
    assert prunefront.load(tmp_path)


def count_finished(run_dir: Path) -> int:
    """Finished trials in the journal, read without Optuna."""
    return (run_dir / "study.journal").read_text().count('"state":1')


FULL = """
import resource, sys
sys.path.insert(0, {tests!r})
import test_search
resource.setrlimit(resource.RLIMIT_FSIZE, (20000, resource.RLIM_INFINITY))
try:
    test_search.run(test_search.Path({run_dir!r}), n_trials=1000)
except test_search.StorageError as error:
    sys.exit(str(error))
"""


def test_a_full_disk_is_reported_and_loses_nothing(tmp_path):
    script = FULL.format(tests=str(Path(__file__).parent), run_dir=str(tmp_path))
    ended = subprocess.run([sys.executable, "-c", script], env=environment(), capture_output=True, text=True)
    assert "make room and search again" in ended.stderr and "Traceback" not in ended.stderr
    scored = count_finished(tmp_path)
    again = run(tmp_path, n_trials=60).study.trials
    assert 2 < scored <= sum(t.state.name == "COMPLETE" for t in again[: scored + 1])


def test_bad_options(tmp_path):
    with pytest.raises(CalibrationError, match="BatchNorm"):
        run(tmp_path, calibration=None)
    with pytest.raises(ConfigError, match="unknown sampler"):
        run(tmp_path, sampler="annealing")
    with pytest.raises(ConfigError, match="cmaes has a single objective"):
        run(tmp_path / "front", sampler="cmaes", mode="front")
    with pytest.raises(ConfigError, match="unknown mode"):
        run(tmp_path, mode="pareto")
    with pytest.raises(SearchError, match="has seed 0, not 7"):
        run(tmp_path, seed=7)
    with pytest.raises(ConfigError, match="n_trials"):
        run(tmp_path, n_trials=0)
    with pytest.raises(ConfigError, match="n_trials must be a whole number, not '10'"):
        run(tmp_path, n_trials="10")
    with pytest.raises(ConfigError, match="budget must be a dictionary"):
        run(tmp_path, budget="50%")
    with pytest.raises(ModelError, match="not the class Conv2d"):
        run(tmp_path, model=nn.Conv2d)
    with pytest.raises(ModelError, match="not an object of type OrderedDict"):
        run(tmp_path, model=make_model().state_dict())
    for data, told in (
        (CALIBRATION[0], "is one tensor"),
        ((CALIBRATION[0], torch.zeros(128)), "tuple of tensors"),
        (lambda: CALIBRATION, "call it"),
    ):
        with pytest.raises(CalibrationError, match=told):
            run(tmp_path, calibration=data)


KILLED = """
import sys
sys.path.insert(0, {tests!r})
import test_search
report = lambda study, trial: print("finished", trial.number, flush=True)
test_search.run(test_search.Path({run_dir!r}), n_trials=100000, callbacks=[report])
"""


def test_nothing_finished_is_lost_when_the_process_is_killed(tmp_path, monkeypatch):
    monkeypatch.setattr(liveness, "UNSIGNED_S", 0.0)  # where a slow disk has it killed between two records
    script = KILLED.format(tests=str(Path(__file__).parent), run_dir=str(tmp_path))
    with subprocess.Popen([sys.executable, "-c", script], env=environment(), stdout=subprocess.PIPE) as process:
        for _ in range(10):
            assert process.stdout.readline()
        process.send_signal(signal.SIGKILL)
    finished = count_finished(tmp_path)
    assert finished >= 10
    study = run(tmp_path, n_trials=finished).study
    states = [t.state.name for t in study.trials]
    assert states.count("COMPLETE") >= finished and "RUNNING" not in states


def labelled() -> prunefront.SampleScore:
    """Agreement with the dense model's classes: an accuracy by sample."""
    images = torch.randn(400, 3, 8, 8, generator=torch.Generator().manual_seed(2))
    return scores.accuracy(images, make_model()(images).argmax(1), batch_size=150)


def test_a_score_by_sample_is_guided_by_fidelity_and_decides_in_the_end(tmp_path):
    score = labelled()
    result = run(tmp_path, score=score, n_trials=12, sampler="auto", finalists=3)
    assert result.study.metric_names == ["fidelity"]
    assert all(trial.value <= 0 for trial in result.study.trials)
    entry = result.best
    assert entry.metrics["score"] == score(entry.model()) == max(e.metrics["score"] for e in result.front)
    assert entry.metrics["guide"] in [trial.value for trial in result.study.trials]


def test_a_score_can_guide_itself_and_losers_are_given_up_early(tmp_path):
    result = run(tmp_path, score=labelled(), guide="score", n_trials=30, sampler="random", compensation="none")
    partly = [trial for trial in result.study.trials if "samples" in trial.user_attrs]
    assert partly and all(trial.user_attrs["samples"] < 400 for trial in partly)
    assert all(trial.value < result.best.metrics["guide"] for trial in partly)
    assert result.best.metrics["score"] == result.best.metrics["guide"]  # without repair there is one effort


def test_without_a_score_the_fidelity_to_the_calibration_data_is_it(tmp_path):
    result = run(tmp_path, score=None)
    wanted = prunefront.Fidelity(make_model(), CALIBRATION)(result.best.model())
    assert result.best.metrics["score"] == pytest.approx(wanted, rel=1e-3)
    with pytest.raises(ConfigError, match="nothing to score"):
        run(
            tmp_path / "b",
            model=nn.Sequential(nn.Flatten(), nn.Linear(192, 8), nn.Linear(8, 2)),
            score=None,
            calibration=None,
        )


@pytest.mark.parametrize("mode", ["budget", "front"])
def test_patience_ends_a_search_that_finds_nothing_better(tmp_path, mode):
    result = run(tmp_path, score=lambda model: 1.0, n_trials=60, patience=5, mode=mode, sampler="random")
    assert 5 < len(result.study.trials) < 60


def test_a_run_learns_from_another_budget_and_refuses_another_model(tmp_path):
    run(tmp_path / "a", n_trials=14, sampler="auto", budget={"macs": "70%"})
    result = run(tmp_path / "b", n_trials=3, sampler="auto", warm_start=[tmp_path / "a"])
    assert len(result.study.trials) == 3
    assert result.best.metrics["macs"] <= 0.5 * result.space.dense_cost.macs
    with pytest.raises(SearchError, match="weights"):
        other = make_model()
        nn.init.ones_(other[0].weight)
        run(tmp_path / "c", model=other, warm_start=[tmp_path / "a"])


def test_an_optuna_sampler_of_the_users_own_is_used(tmp_path):
    asked = []

    class Mine(optuna.samplers.RandomSampler):
        def sample_independent(self, *arguments):
            asked.append(arguments[2])
            return super().sample_independent(*arguments)

    run(tmp_path, sampler=Mine(seed=0))
    assert asked


@pytest.mark.parametrize("option", [{"guide": "loss"}, {"finalists": 0}, {"patience": 0}])
def test_bad_options_are_named(tmp_path, option):
    with pytest.raises(ConfigError, match=next(iter(option))):
        run(tmp_path, **option)
