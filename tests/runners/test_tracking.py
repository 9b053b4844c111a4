"""Trackers: what W&B gets, read back from its offline file, and that no failure ends a search."""

import json
import shutil
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import optuna
import pytest
import torch
from torch import nn

import prunefront
from prunefront.runners.cli import main
from prunefront.runners.tasks.base import cross_entropy
from prunefront.runners.tracking import Guarded, NoTracker, WandbTracker
from prunefront.runners.tracking.weights_and_biases import _artifact_name
from prunefront.search.study import finished, read_study
from tests.processes import environment
from tests.wandb_server import wandb_server

BLOCK, HEADER = 32768, 7


def records(path: Path) -> Iterator:
    """The records of a ``.wandb`` file: LevelDB's log format, each a protocol buffer."""
    from wandb.proto import wandb_internal_pb2

    data, at, body = path.read_bytes(), HEADER, b""
    while at + HEADER <= len(data):
        if BLOCK - at % BLOCK < HEADER:
            at += BLOCK - at % BLOCK
            continue
        _, length, kind = struct.unpack_from("<IHB", data, at)
        body += data[at + HEADER : at + HEADER + length]
        at += HEADER + length
        if kind in (1, 4):  # whole, or the last part
            record = wandb_internal_pb2.Record()
            record.ParseFromString(body)
            body = b""
            yield record


def written(path: Path) -> list:
    """All records of an ended run: W&B's own process may still be writing them when ``finish`` returns."""
    from google.protobuf.message import DecodeError

    for _ in range(100):
        try:
            found = list(records(path))
        except DecodeError:  # the last record is half there
            found = []
        if any(record.WhichOneof("record_type") == "exit" for record in found):
            return found
        time.sleep(0.2)
    raise AssertionError(f"{path} is not complete")


def test_an_offline_run_holds_every_trial_the_front_and_the_models(digits_run):
    file = next((digits_run / "wandb").glob("offline-run-*/*.wandb"))
    found = written(file)
    steps = [
        {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in r.history.item}
        for r in found
        if r.WhichOneof("record_type") == "history"
    ]
    trials = finished(read_study(digits_run))
    last, steps = steps[-1], [step for step in steps if "trial" in step]
    assert {"front/so far", "front/widths", "trials", "front/models", "front/score"} <= {
        k.partition("/_")[0] for k in last
    }
    assert [step["fidelity"] for step in steps] == [trial.values[0] for trial in trials]
    assert [step["cost/macs"] for step in steps] == [trial.user_attrs["costs"]["macs"] for trial in trials]
    assert all({"trial", "feasible", "best/fidelity", "hypervolume", "cost/params"} <= set(step) for step in steps)
    assert steps[-1]["best/fidelity"] == max(trial.values[0] for trial in trials)
    volumes = [step["hypervolume"] for step in steps]
    assert volumes == sorted(volumes) and volumes[0] > 0
    artifacts = [r.artifact for r in found if r.WhichOneof("record_type") == "artifact"]
    assert {"plans", "model", "run_table"} <= {artifact.type for artifact in artifacts}
    picked = json.loads((digits_run / "result.json").read_text())["picked"]
    models = {a.name.rpartition("-")[0]: json.loads(a.metadata) for a in artifacts if a.type == "model"}
    assert set(models) == {"dense", picked} and models[picked]["made_from"].startswith("dense-")
    run = next(r.run for r in found if r.WhichOneof("record_type") == "run")
    assert run.job_type == "search" and set(run.tags) == {"search", "digits", "budget"}
    summary: dict[str, object] = {}
    for record in found:
        if record.WhichOneof("record_type") == "summary":
            summary |= {"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in record.summary.update}
    assert summary["picked/name"] == picked and {"picked/score", "picked/macs", "dense/score"} <= set(summary)
    media = {path.parent.name for path in file.parent.rglob("files/media/*/*")}
    assert {"plotly", "table"} <= media


def test_a_fine_tuning_is_a_run_in_the_group_of_its_search(digits_run, tmp_path):
    run_dir = shutil.copytree(digits_run, tmp_path / "digits")
    assert main(["finetune", str(run_dir), "finetune.epochs=2"]) == 0
    files = sorted((run_dir / "wandb").glob("offline-run-*/*.wandb"), key=lambda path: path.stat().st_mtime)
    found = [written(file) for file in files]
    runs = [next(r.run for r in run if r.WhichOneof("record_type") == "run") for run in found]
    assert [run.job_type for run in runs] == ["search", "finetune"] and runs[0].run_group == runs[1].run_group != ""
    models = [r.artifact for r in found[1] if r.WhichOneof("record_type") == "artifact" and r.artifact.type == "model"]
    used, made = (model.name for model in models)  # what was trained, and what came of it
    assert made.startswith(used.rpartition("-")[0] + "-sgd-") and json.loads(models[1].metadata)["made_from"] == used
    history = [
        {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in r.history.item}
        for r in found[1]
        if r.WhichOneof("record_type") == "history"
    ]
    (metrics,) = run_dir.glob("front/*/finetuned/sgd/metrics.json")
    expected = json.loads(metrics.read_text())
    assert [step["loss"] for step in history] == [point["loss"] for point in expected["curve"]]
    assert [step["score"] for step in history if "score" in step] == [e["score"] for e in expected["evaluations"]]


def command_line(folder: Path, *arguments: str) -> None:
    """In a process of its own: W&B reads its settings once in a process."""
    command = [sys.executable, "-m", *arguments]
    done = subprocess.run(command, cwd=folder, env=environment(), capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture
def server(monkeypatch):
    with wandb_server() as server:
        monkeypatch.setenv("WANDB_BASE_URL", server.url)
        monkeypatch.setenv("WANDB_API_KEY", "a" * 40)
        monkeypatch.delenv("WANDB_MODE", raising=False)
        yield server
        assert not server.failures


def test_an_offline_run_that_is_synced_is_complete(digits_run, tmp_path, server):
    run_dir = shutil.copytree(digits_run, tmp_path / "digits")
    folders = [str(path) for path in (run_dir / "wandb").glob("offline-run-*")]
    command_line(tmp_path, "wandb", "sync", *folders)
    ((name, run),) = server.runs.items()
    trials, result = finished(read_study(run_dir)), json.loads((run_dir / "result.json").read_text())
    rows = [run["history"][place] for place in sorted(run["history"])]
    assert [row["fidelity"] for row in rows if "trial" in row] == [trial.values[0] for trial in trials]
    assert run["summary"]["picked/name"] == result["picked"] and run["complete"] and run["exitcode"] == 0
    assert run["config"]["n_trials"]["value"] == 6 and run["config"]["budget"]["value"] == {"macs": "50%"}
    kept = {key.removesuffix(f"-{name}"): artifact for key, artifact in server.artifacts.items()}
    assert {"dense", result["picked"], "plans"} < set(kept)
    assert all(artifact["state"] == "COMMITTED" and artifact["run"] == name for artifact in kept.values())
    sent = server.files[f"artifacts/{result['picked']}-{name}/weights.safetensors"]
    assert sent == (run_dir / "front" / result["picked"] / "weights.safetensors").read_bytes()
    pictures = [json.loads(data) for path, data in server.files.items() if path.endswith(".plotly.json")]
    assert len(pictures) == 3 and all(picture["data"] for picture in pictures)


def test_online_a_search_goes_on_as_the_same_run_and_models_have_their_lineage(tiny, tmp_path, server):
    run_dir = tmp_path / "a"
    for command in (["search", *tiny, f"run_dir={run_dir}"], ["search", f"resume={run_dir}", "n_trials=8"]):
        command_line(tmp_path, "prunefront", *command)  # with a key it is online
    command_line(tmp_path, "prunefront", "finetune", str(run_dir), "finetune.epochs=1")
    search, tuning = server.runs
    picked = json.loads((run_dir / "result.json").read_text())["picked"]
    rows = [server.runs[search]["history"][place] for place in sorted(server.runs[search]["history"])]
    assert [row["trial"] for row in rows if "trial" in row] == list(range(8))
    tables = [data for path, data in server.files.items() if "-incr-trials" in path and path.startswith("artifacts")]
    assert sorted(row[0] for data in tables for row in json.loads(data)["data"]) == list(range(8))
    runs = server.runs.values()
    assert len({run["groupName"] for run in runs}) == 1 and [run["jobType"] for run in runs] == ["search", "finetune"]
    dense, pick, tuned = (f"{name}-{search}" for name in ("dense", picked, f"{picked}-sgd"))
    assert set(server.used) == {(search, dense), (tuning, pick)}
    assert server.artifacts[tuned]["run"] == tuning and json.loads(server.artifacts[tuned]["metadata"])["steps"] == 17


class Broken:
    def __init__(self, at: str) -> None:
        self.at = at

    def start(self, *_: object) -> None:
        self._fail("start")

    def trial(self, *_: object) -> None:
        self._fail("trial")

    def finish(self, *_: object) -> None:
        self._fail("finish")

    def start_finetuning(self, *_: object) -> None:
        self._fail("start")

    def step(self, *_: object) -> None:
        self._fail("trial")

    def finish_finetuning(self, *_: object) -> None:
        self._fail("finish")

    def _fail(self, now: str) -> None:
        if self.at == now:
            raise ConnectionError("no network")


def test_a_tracker_that_failed_is_ended(caplog):
    class Fails(NoTracker):
        ended = 0

        def trial(self, study, trial):
            raise ValueError("an artifact's name")

        def finish(self, result):
            self.ended += 1

    tracker = Guarded(given := Fails())
    tracker.start({}, Path(), {}, "macs")
    tracker.trial(None, None)
    tracker.finish(None)
    assert given.ended == 1 and "tracking ends here" in caplog.text


def test_names_of_artifacts_are_what_wandb_takes():
    assert _artifact_name("trial0001-ä b=c", "0f") == "trial0001---b-c-0f"
    assert _artifact_name("x" * 200, "0f").endswith("x-0f") and len(_artifact_name("x" * 200, "0f")) == 128


@pytest.fixture
def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))


TRACKERS = {
    "none": NoTracker,
    "wandb": lambda: WandbTracker(mode="offline"),
    **{f"broken {at}": lambda at=at: Broken(at) for at in ("start", "trial", "finish")},
    "wandb that cannot start": lambda: WandbTracker(mode="sideways"),
}


@pytest.mark.parametrize("name", TRACKERS)
@pytest.mark.parametrize("fails", [False, True])
def test_no_tracker_ends_a_search(tmp_path, caplog, net, name, fails):
    tracker = Guarded(TRACKERS[name]())
    answers = iter([1.0, float("nan")])  # after the dense model, the first trial fails

    def score(model: nn.Module) -> float:
        return next(answers, float(next(model.parameters()).detach().abs().sum()))

    tracker.start({"seed": 0}, tmp_path, {"score": 1.0, "macs": 72.0}, "macs")
    options = {"budget": {"macs": "60%"}, "run_dir": tmp_path, "n_trials": 4, "sampler": "random"}
    result = prunefront.search(net, torch.zeros(1, 6), score=score, callbacks=(tracker.trial,), **options)
    tracker.finish(None if fails else result)
    assert len(finished(result.study)) == 3
    fault = name.startswith("broken") or name == "wandb that cannot start"
    assert ("tracking ends here" in caplog.text) == fault


@pytest.mark.parametrize("name", TRACKERS)
@pytest.mark.parametrize("fails", [False, True])
def test_no_tracker_ends_a_fine_tuning(tmp_path, caplog, net, name, fails):
    tracker = Guarded(TRACKERS[name]())
    tracker.start_finetuning({"seed": 0}, tmp_path, "trial0001+sgd")
    batches = [(torch.zeros(4, 6), torch.zeros(4, dtype=torch.long))]
    recipe = prunefront.Recipe(steps=3)
    options = {"training": batches, "loss": cross_entropy, "callbacks": (tracker.step,), "score": lambda model: 1.0}
    found = prunefront.finetune(net, recipe=recipe, **options)
    tracker.finish_finetuning(None if fails else found.metrics)
    fault = name.startswith("broken") or name == "wandb that cannot start"
    assert ("tracking ends here" in caplog.text) == fault and found.metrics["steps"] == 3


def test_a_multirun_is_a_group_and_trials_may_end_in_any_order(net, tmp_path):
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "multirun.yaml").touch()
    groups = []
    for name in ("0", "1"):
        run_dir = tmp_path / "m" / name
        options = {"budget": {"macs": "60%"}, "run_dir": run_dir, "n_trials": 4, "sampler": "random"}
        result = prunefront.search(net, torch.zeros(1, 6), score=lambda model: 1.0, **options)
        tracker = WandbTracker(mode="offline")
        tracker.start(
            {"task": {"_target_": "a.b.digits"}, "mode": "front"}, run_dir, {"score": 1.0, "macs": 72.0}, "macs"
        )
        trials = finished(result.study)
        study = optuna.create_study(study_name="empty")
        for trial in (trials[2], trials[0], trials[3], trials[1]):
            tracker.trial(study, trial)
        tracker.finish(result)
        found = written(next((run_dir / "wandb").glob("offline-run-*/*.wandb")))
        groups.append(next(r.run for r in found if r.WhichOneof("record_type") == "run").run_group)
        history = [r.history for r in found if r.WhichOneof("record_type") == "history"]
        rows = [{"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in h.item} for h in history]
        assert [row["trial"] for row in rows if "trial" in row] == [2, 0, 3, 1]
    assert groups[0] == groups[1] and groups[0].startswith("m-")
