"""Multiruns over Hydra's launchers, in processes of their own."""

import contextlib
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks.postgresql import free_port
from prunefront.search.liveness import WORKER
from prunefront.search.study import finished, read_study
from tests.services import missing

LAUNCHERS = {
    "joblib": ["hydra.launcher.n_jobs=2"],
    "submitit_local": ["hydra.launcher.timeout_min=10", "hydra.launcher.cpus_per_task=1"],
}


#: A cluster of this machine alone.
SLURM = """
ClusterName=loopback
SlurmctldHost=localhost(127.0.0.1)
SlurmUser=root
AuthType=auth/none
CredType=cred/none
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
NodeName=localhost NodeAddr=127.0.0.1 CPUs=2 State=UNKNOWN
PartitionName=here Nodes=localhost Default=YES State=UP
"""


@pytest.fixture
def slurm(tmp_path_factory, monkeypatch):
    """Slurm's controller and one node, on loopback."""
    if shutil.which("slurmctld") is None or os.geteuid() != 0:
        missing("Slurm, for root as its nodes want it (Debian: apt install slurm-wlm),")
    folder = tmp_path_factory.mktemp("slurm")
    (folder / "state").mkdir()
    (folder / "spool").mkdir()
    (folder / "slurm.conf").write_text(SLURM.format(folder=folder, ports=[free_port(), free_port()]))
    monkeypatch.setenv("SLURM_CONF", str(folder / "slurm.conf"))
    with contextlib.ExitStack() as servers:
        for command in (["slurmctld", "-D"], ["slurmd", "-D", "-N", "localhost"]):
            server = servers.enter_context(subprocess.Popen(command, stderr=subprocess.DEVNULL))
            servers.callback(server.terminate)
        deadline = time.monotonic() + 30
        while "idle" not in subprocess.run(["sinfo", "-h"], capture_output=True, text=True).stdout:
            assert time.monotonic() < deadline, (folder / "slurmctld.log").read_text()[-2000:]
            time.sleep(0.2)
        yield folder


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "prunefront", *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_every_job_is_a_search_and_one_table_shows_all(launcher, tiny, tmp_path):
    pytest.importorskip("submitit" if launcher.startswith("submitit") else "joblib")
    options = [f"hydra/launcher={launcher}", *LAUNCHERS[launcher], *tiny, "tracker=none", "run_dir=runs/m"]
    done = run(tmp_path, "search", "-m", *options, "budget.macs=40%,60%")
    assert done.returncode == 0, done.stdout + done.stderr
    assert sorted(path.parent.name for path in (tmp_path / "runs/m").glob("*/result.json")) == ["0", "1"]
    table = run(tmp_path, "front", "runs/m").stdout
    assert "budget.macs=40%" in table and "budget.macs=60%" in table


def test_a_job_that_fails_elsewhere_fails_the_command(tiny, tmp_path):
    options = ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2", *tiny, "tracker=none", "run_dir=runs/m"]
    done = run(tmp_path, "search", "-m", *options, "budget.macs=60%,1%")
    assert done.returncode == 1 and "budget" in done.stdout + done.stderr
    assert (tmp_path / "runs/m/0/result.json").exists()


def test_jobs_of_a_launcher_are_workers_of_one_study(tiny, tmp_path):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    options = [*tiny, "n_trials=800", "tracker=none", "run_dir=runs/a"]
    command = [sys.executable, "-m", "prunefront", "search", *options]
    with subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.DEVNULL) as search:
        deadline = time.monotonic() + 60
        while not (tmp_path / "runs/a/study.journal").exists():
            assert search.poll() is None and time.monotonic() < deadline
            time.sleep(0.2)
        jobs = ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2", "seed=0,0"]
        assert run(tmp_path, "worker", "runs/a", "-m", *jobs).returncode == 0
        assert search.wait(200) == 0
    trials = finished(read_study(tmp_path / "runs/a"))
    assert 800 <= len(trials) <= 802  # two of three may each begin what looks like the last one
    assert len({trial.user_attrs[WORKER]["pid"] for trial in trials}) == 3
    assert not (tmp_path / "runs/a/multirun.yaml").exists()


def test_searches_and_workers_run_on_slurm(tiny, tmp_path, slurm):
    launcher = ["-m", "hydra/launcher=submitit_slurm", "hydra.launcher.partition=here", "hydra.launcher.timeout_min=10"]
    options = [*launcher, *tiny, "tracker=none", "run_dir=runs/m"]
    done = run(tmp_path, "search", *options, "budget.macs=40%,60%")
    assert done.returncode == 0, done.stdout + done.stderr
    table = run(tmp_path, "front", "runs/m").stdout
    assert "budget.macs=40%" in table and "budget.macs=60%" in table
    assert run(tmp_path, "worker", "runs/m/0", *launcher, "seed=0,0", "n_trials=8").returncode == 0
    trials = finished(read_study(tmp_path / "runs/m/0"))
    assert 8 <= len(trials) <= 9 and len({trial.user_attrs[WORKER]["pid"] for trial in trials}) >= 2
