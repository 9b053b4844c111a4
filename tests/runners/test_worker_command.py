"""Processes that the command line starts, and those that join."""

import contextlib
import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import ClassVar

import pytest
import torch

from prunefront.runners import beside
from prunefront.runners.cli import main
from prunefront.runners.dense import kept_model
from prunefront.runners.tasks.digits import digits
from prunefront.search.liveness import WORKER
from prunefront.search.study import finished, read_study
from tests.processes import environment

TASK = ["task=digits", "task.epochs=2", "budget.macs=40%", "tracker=none", "finalists=1"]


def test_workers_share_the_trials_of_a_search(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(beside, "GRACE_S", 120)  # both shall have their turn, on a busy machine too
    assert main(["search", *TASK, "n_trials=120", "workers=2", "run_dir=runs/a"]) == 0
    trials = finished(read_study(tmp_path / "runs/a"))
    assert len({t.user_attrs[WORKER]["pid"] for t in trials}) == 2
    values = {}
    for trial in (t for t in trials if "samples" not in t.user_attrs):  # estimates from part of them may differ
        values.setdefault(trial.user_attrs["plan"]["fingerprint"], set()).add(trial.values[0])
    assert all(len(found) == 1 for found in values.values())
    assert json.loads((tmp_path / "runs/a/result.json").read_text())["picked"]
    capsys.readouterr()
    assert main(["worker", "runs/a"]) == 0  # nothing is left to do, and its options are the run's
    assert "done with runs/a" in capsys.readouterr().out
    assert len(finished(read_study(tmp_path / "runs/a"))) == len(trials)
    assert main(["worker", "runs/a", "budget.macs=30%"]) == 1 and "has budget" in capsys.readouterr().err


def test_a_worker_without_a_search_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["worker", *TASK]) == 1 and "takes the folder of a search first" in capsys.readouterr().err
    assert main(["worker", "runs/none", *TASK]) == 1 and "copy that folder" in capsys.readouterr().err
    assert main(["search", *TASK, "workers=0", "run_dir=runs/b"]) == 1 and "at least 1" in capsys.readouterr().err


def processes_of(folder: Path) -> list[str]:
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            found += [text] if str(folder) in (text := path.read_text().replace("\0", " ")) else []
    return found


@pytest.mark.skipif(not Path("/proc/self/cmdline").exists(), reason="the system does not list processes")
def test_sigterm_ends_the_processes_beside_a_search(tmp_path):
    options = [*TASK, "n_trials=100000", "patience=null", "workers=2", f"run_dir={tmp_path}/a"]
    command, log = [sys.executable, "-m", "prunefront", "search", *options], tmp_path / "a" / "workers" / "1.log"
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=environment()) as process:
        while not log.exists():
            with pytest.raises(subprocess.TimeoutExpired):  # it must still be running
                process.wait(0.1)
        process.send_signal(signal.SIGTERM)
        _, told = process.communicate(timeout=120)
    assert process.returncode == 143 and b"terminated; what is finished is kept" in told
    assert processes_of(tmp_path) == []


class Ended:
    """A process that has done its work."""

    returncode = 0
    started: ClassVar[list[list[str]]] = []

    def __init__(self, command, **_):
        self.started.append(command)

    def poll(self):
        return 0

    def wait(self, timeout):
        return 0


@pytest.mark.parametrize(
    ("workers", "devices", "expected"),
    [
        (None, [], []),
        (3, [], ["", ""]),
        (3, ["cuda"], ["devices=[cuda]"] * 2),
        (None, ["cuda:0", "cuda:1"], ["devices=[cuda:1]"]),
        (4, ["cuda:0", "cuda:1"], ["devices=[cuda:1]", "devices=[cuda:0]", "devices=[cuda:1]"]),
        (None, ["cuda:0", "cpu"], ["devices=[cpu]"]),
    ],
)
def test_processes_take_devices_in_turn(tmp_path, monkeypatch, workers, devices, expected):
    monkeypatch.setattr(Ended, "started", [])
    monkeypatch.setattr(beside.subprocess, "Popen", Ended)
    monkeypatch.setattr(beside, "_overrides", lambda run_dir: ["of the search"])
    with beside.beside(workers, tmp_path, devices):
        pass
    ends = [command[command.index("of the search") + 1 :] for command in Ended.started]
    assert ends == [[device] if device else [] for device in expected]


def test_workers_get_the_users_configurations_and_their_errors_are_told(tmp_path, monkeypatch, capsys, caplog):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own" / "space").mkdir(parents=True)
    (tmp_path / "own" / "space" / "narrow.yaml").write_text("defaults:\n  - widths\n  - _self_\nround_to: 2\n")
    monkeypatch.setattr(beside, "GRACE_S", 120)
    options = [*TASK, "n_trials=8", "sampler=random", "workers=2", "run_dir=runs/é"]
    assert main(["search", *options, "--config-dir", "own", "space=narrow"]) == 0
    log = Path("runs/é/workers/1.log")
    assert log.read_text().strip().endswith("done with runs/é")
    assert "worker 1 failed" not in caplog.text + capsys.readouterr().out
    log.write_text(
        "preparing\nerror ConfigError: Could not find 'space/narrow'\nConfig search path:\n\tprovider=schema\n"
    )
    assert beside._mistake(log) == "error ConfigError: Could not find 'space/narrow'"


def test_devices_that_cannot_be_used_are_told_before_the_search(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["search", *TASK, "devices=[warp]", "run_dir=runs/a"]) == 1
    assert "the device warp is not known" in capsys.readouterr().err
    assert main(["search", *TASK, "devices=[cuda:9]", "run_dir=runs/a"]) == 1
    assert "the device cuda:9 cannot be used here" in capsys.readouterr().err
    assert main(["search", *TASK, "devices=[cpu,cpu]", "workers=1", "run_dir=runs/a"]) == 1
    assert (
        "there are 2 devices, and each needs a process" in capsys.readouterr().err and not Path("runs/a/dense").exists()
    )
    assert main(["worker", "runs/none", *TASK, "devices=[cpu,cpu]"]) == 1
    assert "one process on one device" in capsys.readouterr().err
    assert main(["rounds", *TASK[:-1], "devices=[cpu]", "run_dir=runs/a"]) == 1
    assert "leave workers, devices and storage" in capsys.readouterr().err


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="the system does not list mapped files")
def test_processes_map_the_file_of_the_dense_weights(digits_run):
    model = kept_model(digits_run / "dense", digits(epochs=1), None)
    weights = next(path for path in digits_run.glob("dense/*.safetensors"))
    assert str(weights.resolve()) in Path("/proc/self/maps").read_text()
    assert model(torch.zeros(1, 1, 8, 8)).shape == (1, 10)
