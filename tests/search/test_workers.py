"""Several processes on one study: dead ones, real databases, and what must not be joined."""

import datetime
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import optuna
import pytest
import torch
from optuna.trial import TrialState
from torch import nn

import prunefront
from benchmarks.mariadb import is_installed, mariadb
from benchmarks.postgresql import free_port, postgresql, programs
from prunefront.search.engine import work
from prunefront.search.liveness import OTHER_HOST_S, UNSIGNED_S, WORKER, is_alive, is_stale, this_process
from prunefront.search.study import (
    DRIVERS,
    MOST_TRIED,
    Store,
    ended,
    finished,
    join_study,
    open_study,
    read_study,
    release_stale,
)
from prunefront.spaces.errors import SearchError, StorageError
from tests.services import missing

INPUTS = torch.randn(2, 6, generator=torch.Generator().manual_seed(0))
SCRIPT = """
import sys, time, optuna
from pathlib import Path
from prunefront.search.liveness import WORKER, this_process
from prunefront.search.study import STUDY_NAME, Store
study = optuna.load_study(study_name=STUDY_NAME, storage=Store(Path(sys.argv[1])).open())
trial = study.ask({"x": optuna.distributions.FloatDistribution(0, 1)})
trial.set_user_attr(WORKER, this_process())
print("asked", flush=True)
time.sleep(600)
"""


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 24), nn.ReLU(), nn.Linear(24, 16), nn.ReLU(), nn.Linear(16, 3)).eval()


def score(model: nn.Module) -> float:
    return float(model[2].weight.detach().abs().sum())


def options(run_dir: Path, n_trials: int = 12, **more):
    fixed = {"score": score, "budget": {"macs": "50%"}, "compensation": "none", "guide": "score", "finalists": 2}
    return {"example_inputs": INPUTS, "run_dir": run_dir, "n_trials": n_trials, **fixed, **more}


def test_this_process_is_alive_and_one_of_its_id_from_before_is_not():
    signed = this_process()
    assert signed["host"] == socket.gethostname() and is_alive(signed)
    assert not is_alive({**signed, "started": signed["started"] - 1})
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    assert not is_alive({**signed, "pid": ended.pid})


def running(age_s: float, **attributes) -> optuna.trial.FrozenTrial:
    start = datetime.datetime.now() - datetime.timedelta(seconds=age_s)
    trial = optuna.trial.create_trial(state=TrialState.RUNNING, user_attrs=attributes)
    trial.datetime_start = start
    return trial


def test_of_processes_elsewhere_only_the_time_tells():
    there = {"host": "elsewhere", "pid": 1, "started": 0.0}
    assert not is_stale(running(OTHER_HOST_S - 60, worker=there)) and is_stale(running(OTHER_HOST_S + 60, worker=there))
    assert not is_stale(running(UNSIGNED_S - 30)) and is_stale(running(UNSIGNED_S + 30))
    assert not is_stale(running(10**6, worker=this_process()))


def test_what_a_killed_process_tried_is_tried_again_once(tmp_path):
    study = open_study(Store(tmp_path), ["score"])
    worker = subprocess.Popen([sys.executable, "-c", SCRIPT, str(tmp_path)], stdout=subprocess.PIPE)
    assert worker.stdout.readline() == b"asked\n"
    release_stale(study)
    assert [t.state for t in study.trials] == [TrialState.RUNNING]
    worker.send_signal(signal.SIGKILL)
    worker.wait()
    release_stale(study)
    release_stale(study)
    assert [t.state for t in study.trials] == [TrialState.FAIL, TrialState.WAITING]
    assert study.ask().params == {} and study.trials[1].system_attrs["fixed_params"] == study.trials[0].params


def test_a_plan_that_kills_its_processes_is_given_up(tmp_path, caplog):
    study = open_study(Store(tmp_path), ["score"])
    for tried in range(MOST_TRIED + 1):
        worker = subprocess.Popen([sys.executable, "-c", SCRIPT, str(tmp_path)], stdout=subprocess.PIPE)
        assert worker.stdout.readline() == b"asked\n"
        worker.send_signal(signal.SIGKILL)
        worker.wait()
        release_stale(study)
        waiting = [t for t in study.trials if t.state == TrialState.WAITING]
        assert [t.user_attrs["tried"] for t in waiting] == ([tried + 1] if tried < MOST_TRIED else [])
    assert ended(study.trials) == (1, 1) and "its process died 4 times in a row" in study.trials[-1].user_attrs["error"]


def test_a_trial_that_others_have_given_up_ends_nothing(tmp_path, caplog):
    """It took longer than anybody waits for a process on another machine."""
    gone = []

    def score(model):
        study = read_study(tmp_path)
        if not gone and len(finished(study)) == 2:
            (running,) = [t for t in study.trials if t.state == TrialState.RUNNING]
            gone.append(running.number)
            study.tell(running.number, state=TrialState.FAIL)
        return float(sum(p.sum() for p in model.parameters()))

    result = prunefront.search(net(), **{**options(tmp_path, 6), "score": score, "guide": "score"})
    assert gone and "another process has given it up" in caplog.text and len(finished(result.study)) == 6


def test_a_process_that_joins_does_its_share_and_no_plan_is_scored_twice(tmp_path):
    joined = []

    def join(study, trial):
        if not joined:  # in the midst of the search, as another process would
            joined.append(True)
            work(net(), **{k: v for k, v in options(tmp_path, 8).items() if k != "n_trials"}, n_trials=8)
            joined.append(len(finished(study)))

    found = prunefront.search(net(), **options(tmp_path), callbacks=[join])
    trials = finished(found.study)
    assert joined[1] == 8 and len(trials) == 12
    plans = [t.user_attrs["plan"]["fingerprint"] for t in trials]
    by_plan = {plan: {t.values[0] for t in trials if t.user_attrs["plan"]["fingerprint"] == plan} for plan in plans}
    assert all(len(values) == 1 for values in by_plan.values())
    assert all(t.user_attrs[WORKER]["pid"] == os.getpid() for t in trials)


def test_other_searches_are_not_joined(tmp_path):
    with pytest.raises(StorageError, match="no search to join"):
        join_study(Store(tmp_path), wait_s=0.0)
    prunefront.search(net(), **options(tmp_path, 2))
    with pytest.raises(SearchError, match="has budget"):
        work(net(), **options(tmp_path, 4, budget={"macs": "40%"}))
    other = net()
    with torch.no_grad():
        other[0].weight[0, 0] += 1
    with pytest.raises(SearchError, match="other weights"):
        work(other, **options(tmp_path, 4))
    with pytest.raises(TypeError, match="budgett"):
        work(net(), **options(tmp_path, 4), budgett={"macs": "50%"})


def test_with_one_process_a_seed_decides_all_plans(tmp_path):
    runs = [prunefront.search(net(), **options(tmp_path / name, 15)) for name in "ab"]
    first, second = ([t.user_attrs["plan"]["fingerprint"] for t in run.study.trials] for run in runs)
    assert first == second and runs[0].best.plan == runs[1].best.plan


def test_the_same_scored_plans_give_the_same_pick_in_whatever_order(tmp_path):
    found = prunefront.search(net(), **options(tmp_path / "a", 14))
    study = open_study(Store(tmp_path / "b"), ["score"]) if (tmp_path / "b").mkdir() is None else None
    shutil.copy(tmp_path / "a" / "space.json", tmp_path / "b" / "space.json")
    for trial in reversed(finished(found.study)):
        study.add_trial(trial)
    again = prunefront.search(net(), **options(tmp_path / "b", 14))
    assert again.best.plan == found.best.plan and again.best.metrics == found.best.metrics


@pytest.fixture(scope="module", params=["postgresql", "mysql"])
def database(request):
    """A server on loopback: its URL, and a function that kills and restarts it."""
    is_there = programs() is not None if request.param == "postgresql" else is_installed()
    if not is_there:
        missing(f"the server of {request.param} (Debian: apt install postgresql mariadb-server)")
    pytest.importorskip(DRIVERS[request.param])
    with postgresql("fsync=off") if request.param == "postgresql" else mariadb() as server:
        yield server


def test_a_search_in_a_database_survives_its_restart_and_is_read_without_it(tmp_path, database):
    url, restart = database
    restarted = []

    def callback(study, trial):
        if trial.number == 3:
            restart()
            restarted.append(True)

    found = prunefront.search(net(), **options(tmp_path / "shared", 10, storage=url), callbacks=[callback])
    assert restarted and len(finished(found.study)) == 10
    copied = read_study(tmp_path / "shared")  # reports read the run's own journal
    assert [t.values for t in finished(copied)] == [t.values for t in finished(found.study)]
    kind = url.partition(":")[0]
    plain = optuna.load_study(study_name="shared", storage=url.replace(kind, f"{kind}+{DRIVERS[kind]}", 1))
    assert len(plain.trials) == 10 and "tester" not in (tmp_path / "shared" / "space.json").read_text()
    work(net(), **options(tmp_path / "elsewhere" / "shared", 12, storage=url))  # a machine without the run's folder
    assert len(finished(plain)) == 12
    more = prunefront.search(net(), **options(tmp_path / "shared", 14, storage=url))
    assert len(finished(more.study)) == 14
    with pytest.raises(SearchError, match=f"has storage '{kind}', not 'journal'"):
        prunefront.search(net(), **options(tmp_path / "shared", 14))


PROXY = """
import sys
from optuna.storages import JournalStorage, run_grpc_proxy_server
from optuna.storages.journal import JournalFileBackend
run_grpc_proxy_server(JournalStorage(JournalFileBackend(sys.argv[1])), host="127.0.0.1", port=int(sys.argv[2]))
"""


def test_a_search_and_its_workers_share_a_study_behind_a_proxy(tmp_path):
    pytest.importorskip("grpc")
    port = free_port()
    server = subprocess.Popen([sys.executable, "-c", PROXY, str(tmp_path / "behind.journal"), str(port)])
    try:
        url = f"grpc://127.0.0.1:{port}"
        found = prunefront.search(net(), **options(tmp_path / "shared", 8, storage=url))
        work(net(), **options(tmp_path / "elsewhere" / "shared", 12, storage=url))
        assert len(finished(found.study)) == 12
        copied = read_study(tmp_path / "shared")
        assert [t.values for t in finished(copied)] == [t.values for t in finished(found.study)[:8]]
    finally:
        server.kill()
        server.wait()


def test_a_storage_that_is_not_there_is_named(tmp_path):
    start = time.monotonic()
    with pytest.raises(StorageError, match="storage postgresql cannot be opened"):
        prunefront.search(net(), **options(tmp_path, 2, storage="postgresql://nobody@127.0.0.1:1/none"))
    assert time.monotonic() - start < 30
