"""Searches with many workers: trials per minute, what asking and telling cost, and what survives being killed.

Run: python -m benchmarks.scale [--parts workers,memory,asking,simulated,kill] [--minutes 2] [--out scale.json]

``workers``: the digits search with 1, 2 and 4 processes, study in a journal and in PostgreSQL. ``memory``: what
1, 2 and 3 processes of a search hold of a dense model of a gigabyte, and in all. ``asking``: time to ask
for a trial and to tell its value, and the process's memory, with so many trials in the study (30 groups, no models).
``simulated``: 64 processes that ask and tell and do nothing else, on PostgreSQL. ``kill``: four searches of a tiny
network on one journal, of which a random one is killed every few seconds and started again; then, is every trial whose
telling was seen still there, and was any plan scored again after its value had been told? PostgreSQL is started here.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import optuna
import torch
from optuna.trial import TrialState
from torch import nn

import prunefront
from benchmarks.postgresql import postgresql
from benchmarks.sampling import SyntheticSpace
from benchmarks.zoo import machine
from prunefront.search.budget import Limits
from prunefront.search.liveness import WORKER, this_process
from prunefront.search.problem import Problem
from prunefront.search.samplers import make_sampler
from prunefront.search.study import Store, finished, open_study, read_study
from prunefront.search.warm_start import Earlier

Row = dict[str, Any]
GROUPS = 30


def rate(trials: Sequence[optuna.trial.FrozenTrial]) -> float:
    """Trials a minute between the first and the last end of one."""
    ends = sorted(cast(Any, trial.datetime_complete) for trial in trials)
    return 60 * (len(ends) - 1) / (ends[-1] - ends[0]).total_seconds()


def workers(url: str, count: int, storage: str, n_trials: int) -> Row:
    """A real search from the command line."""
    with tempfile.TemporaryDirectory() as folder:
        run_dir = Path(folder) / f"search{count}"
        options = [f"workers={count}", f"n_trials={n_trials}", "tracker=none", "finalists=1", f"run_dir={run_dir}"]
        if storage == "postgresql":
            options.append(f"storage={url}")
        command = [sys.executable, "-m", "prunefront", "search", "task=digits", *options]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        trials = finished(read_study(run_dir))
        # While the others are still starting, one runs alone: what counts is when all are there.
        firsts: dict[int, Any] = {}
        for trial in sorted(trials, key=lambda t: cast(Any, t.datetime_complete)):
            firsts.setdefault(trial.user_attrs[WORKER]["pid"], trial.datetime_complete)
        together = [t for t in trials if cast(Any, t.datetime_complete) >= max(firsts.values())]
        return {
            "trials": len(trials),
            "together": len(together),
            "per_minute": rate(together),
            "processes": len(firsts),
        }


def large() -> nn.Module:
    """A gigabyte of weights."""
    torch.manual_seed(0)
    return nn.Sequential(*(layer for _ in range(4) for layer in (nn.Linear(8192, 8192), nn.ReLU())))


def large_batches() -> list[torch.Tensor]:
    return [torch.zeros(8, 8192)]


def first_weight(model: nn.Sequential) -> float:
    return float(cast(nn.Linear, model[0]).weight[0, 0].detach())


def memory(count: int, samples: int = 20) -> Row:
    """GB, medians over the time in which all processes run trials: resident, where what is shared counts in every
    process, and in shares, where it counts once; and the file of the dense weights alone."""
    with tempfile.TemporaryDirectory() as folder:
        run_dir = Path(folder) / "large"
        own = ["task=custom", *(f"task.{key}=benchmarks.scale.{value}" for key, value in LARGE.items())]
        options = [f"workers={count}", "n_trials=100000", "sampler=random", "space.compensation=none"]
        options += ["space.criterion=[l1]", "tracker=none", "finalists=1", f"run_dir={run_dir}"]
        command = [sys.executable, "-m", "prunefront", "search", *own, *options]
        held: list[tuple[float, float, float]] = []
        deadline = time.monotonic() + 600
        with subprocess.Popen(command, stdout=subprocess.DEVNULL) as search:
            while len(held) < samples:
                assert search.poll() is None and time.monotonic() < deadline
                time.sleep(0.5)
                if count == len(_scoring(run_dir)):
                    held.append(_held([search.pid, *_children(search.pid)]))
            search.send_signal(signal.SIGINT)
        resident, shares, weights = (sorted(values)[samples // 2] for values in zip(*held, strict=True))
        return {"resident_gb": resident, "shares_gb": shares, "dense_file_gb": weights}


LARGE = {"model._target_": "large", "calibration._target_": "large_batches", "score": "first_weight"}


def _scoring(run_dir: Path) -> set[int]:
    """Processes that have finished a trial."""
    if not (run_dir / "study.journal").exists():
        return set()
    return {trial.user_attrs[WORKER]["pid"] for trial in finished(read_study(run_dir))}


def _children(pid: int) -> list[int]:
    return [
        int(child) for task in Path(f"/proc/{pid}/task").iterdir() for child in (task / "children").read_text().split()
    ]


def _held(pids: Sequence[int]) -> tuple[float, float, float]:
    """GB of all: resident, in shares, and in shares of the mapped file of dense weights."""
    found = np.zeros(3)
    for pid in pids:
        is_dense = False
        for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
            key, _, value = line.partition(":")
            if "-" in key.split()[0]:
                is_dense = "/dense/weights" in line
            elif key in ("Rss", "Pss"):
                kilobytes = float(value.split()[0])
                found += kilobytes / 1e6 * np.array([key == "Rss", key == "Pss", key == "Pss" and is_dense])
    resident, shares, weights = (round(float(value), 3) for value in found)
    return resident, shares, weights


def synthetic_problem() -> tuple[SyntheticSpace, Problem]:
    space = SyntheticSpace(GROUPS, 0)
    dense = float(space.cost_batch(space.sizes[None])[0, 0])
    return space, Problem(cast(Any, space), Limits((0.5 * dense, *[np.inf] * 4)), "macs")


def one_trial(study: optuna.Study, space: SyntheticSpace, problem: Problem) -> tuple[float, float]:
    """Seconds of asking and of telling, with the attributes that a search writes."""
    started = time.perf_counter()
    trial = study.ask(problem.distributions)
    asked = time.perf_counter()
    shares = np.array([trial.params[name] for name in space.dimensions])
    widths = problem.projector().fill(shares)
    named = dict(zip(space.dimensions, widths.tolist(), strict=True))
    trial.set_user_attr("plan", {"fingerprint": str(trial.number), "widths": named, "criterion": "synthetic"})
    trial.set_user_attr("costs", {"macs": 1.0})
    value = float(space.value(widths[None])[0])
    before = time.perf_counter()
    study.tell(trial, value)
    return asked - started, time.perf_counter() - before


def asking(store: Store, count: int, trials: int = 20) -> Row:
    """Of a study that already has ``count`` trials."""
    space, problem = synthetic_problem()
    study = open_study(store, ["score"])
    missing = count - len(study.get_trials(deepcopy=False))
    rng = np.random.default_rng(count)
    created = []
    for number in range(missing):
        params = dict(zip(space.dimensions, rng.uniform(0.1, 1, GROUPS).tolist(), strict=True))
        widths = problem.projector().fill(np.array(list(params.values())))
        plan = {
            "fingerprint": f"{count}-{number}",
            "widths": dict(zip(space.dimensions, widths.tolist(), strict=True)),
            "criterion": "synthetic",
        }
        created.append(
            optuna.trial.create_trial(
                value=float(space.value(widths[None])[0]),
                params=params,
                distributions=problem.distributions,
                user_attrs={"plan": plan, "costs": {"macs": 1.0}},
            )
        )
    study.add_trials(created)
    del created
    study.sampler = make_sampler("auto", problem, 10**6, 0, Earlier())
    one_trial(study, space, problem)  # reads the study and fits for the first time
    times = np.array([one_trial(study, space, problem) for _ in range(trials)])
    resident = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    ask, tell = 1000 * np.median(times, axis=0)
    return {"ask_ms": float(ask), "tell_ms": float(tell), "resident_mb": resident / 1e6}


def alone(function: Any, *arguments: Any) -> Any:
    """In a process of its own, so that its memory is its own."""
    context = multiprocessing.get_context("spawn")
    with context.Pool(1) as pool:
        return pool.apply(function, arguments)


def simulated(url: str, processes: int, seconds: float) -> Row:
    """Forked from this process, or their copies of torch would not fit into memory."""
    store = Store(Path("simulated"), url)
    open_study(store, ["score"])
    context = multiprocessing.get_context("fork")
    started = [context.Process(target=_simulate, args=(store, seed, seconds)) for seed in range(processes)]
    for process in started:
        process.start()
    for process in started:
        process.join()
    study = optuna.load_study(study_name=store.study_name, storage=store.open())
    trials = study.get_trials(deepcopy=False)
    done = [t for t in trials if t.state == TrialState.COMPLETE]
    numbers = [t.number for t in trials]
    return {
        "processes": processes,
        "seconds": seconds,
        "trials": len(done),
        "per_minute": rate(done),
        "failed_processes": sum(process.exitcode != 0 for process in started),
        "unfinished": len(trials) - len(done),
        "numbers_are_unique": len(set(numbers)) == len(numbers),
    }


def _simulate(store: Store, seed: int, seconds: float) -> None:
    torch.set_num_threads(1)
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    space, problem = synthetic_problem()
    study = optuna.load_study(study_name=store.study_name, storage=store.open())
    study.sampler = make_sampler("random", problem, 10**6, seed, Earlier())
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        one_trial(study, space, problem)


def tiny() -> nn.Module:
    torch.manual_seed(0)
    layers = [layer for width in (24, 32, 24, 32, 24) for layer in (nn.LazyLinear(width), nn.ReLU())]
    net = nn.Sequential(*layers, nn.LazyLinear(3))
    net(torch.zeros(1, 6))
    return net.eval()


def search_tiny(run_dir: Path, n_trials: int) -> None:
    """What is killed: a search that notes, before anything else can happen, what it scores and what it has told."""
    own = this_process()
    with (run_dir.parent / "notes" / f"{own['pid']}-{own['started']}").open("a") as notes:

        def note(kind: str, what: str) -> None:
            notes.write(f"{kind} {time.time_ns()} {what}\n")
            notes.flush()

        def score(model: nn.Module) -> float:
            widths = [layer.out_features for layer in model if isinstance(layer, nn.Linear)][:-1]
            note("score", "-".join(map(str, widths)))
            time.sleep(random.uniform(0.02, 0.2))
            return -float(np.var(widths)) + float(model[0].weight.detach().abs().mean())

        def told(study: optuna.Study, trial: optuna.trial.FrozenTrial) -> None:
            if trial.user_attrs.get(WORKER) == own and trial.state == TrialState.COMPLETE:
                widths = "-".join(str(width) for width in trial.user_attrs["plan"]["widths"].values())
                note("told", f"{widths} {trial.number} {trial.values[0]!r}")

        prunefront.search(
            tiny(),
            torch.zeros(1, 6),
            score=score,
            budget={"macs": "50%"},
            compensation="none",
            guide="score",
            sampler="random",
            n_trials=n_trials,
            finalists=1,
            run_dir=run_dir,
            callbacks=[told],
        )


def kill(minutes: float, processes: int = 4) -> Row:
    """Kill one every few seconds, start it again; then look what the study has."""
    with tempfile.TemporaryDirectory() as folder:
        run_dir = Path(folder) / "run"
        (Path(folder) / "notes").mkdir()
        code = f"from benchmarks.scale import *; search_tiny(Path({str(run_dir)!r}), 10**6)"
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}

        def start() -> subprocess.Popen[bytes]:
            return subprocess.Popen([sys.executable, "-c", code], env=environment, stderr=subprocess.DEVNULL)

        running = [start()]
        while not (run_dir / "study.journal").exists():  # the first one makes the study
            time.sleep(0.2)
        running += [start() for _ in range(processes - 1)]
        rng, deadline, kills, died = random.Random(0), time.monotonic() + 60 * minutes, 0, 0
        while time.monotonic() < deadline:
            time.sleep(rng.uniform(2, 6))
            place = rng.randrange(processes)
            died += running[place].poll() is not None  # by itself: that would be a crash
            running[place].send_signal(signal.SIGKILL)
            running[place].wait()
            kills += 1
            running[place] = start()
        for process in running:
            process.send_signal(signal.SIGKILL)
            process.wait()
        return {"minutes": minutes, "kills": kills, "died_by_themselves": died, **_looked_at(run_dir)}


def _looked_at(run_dir: Path) -> Row:
    """The study, read anew, against what the processes had noted."""
    study = read_study(run_dir)
    known = {t.number: t for t in finished(study)}
    lines = [line.split() for path in (run_dir.parent / "notes").iterdir() for line in path.read_text().splitlines()]
    told = [(widths, int(number), float(value), int(at)) for kind, at, widths, number, value in _of(lines, "told", 5)]
    lost = [number for _, number, value, _ in told if number not in known or known[number].values[0] != value]
    first_told: dict[str, int] = {}
    for widths, _, _, at in sorted(told, key=lambda entry: entry[3]):
        first_told.setdefault(widths, at)
    again = [widths for _, at, widths in _of(lines, "score", 3) if int(at) > first_told.get(widths, 10**30)]
    states = [trial.state.name for trial in study.get_trials(deepcopy=False)]
    return {
        "told": len(told),
        "finished": len(known),
        "lost": len(lost),
        "told_twice": len(told) - len({number for _, number, _, _ in told}),
        "scored_again_after_told": len(again),
        "plans_scored": len({widths for _, _, widths in _of(lines, "score", 3)}),
        "states": {state: states.count(state) for state in sorted(set(states))},
    }


def _of(lines: Sequence[Sequence[str]], kind: str, fields: int) -> list[Sequence[str]]:
    """A line that was being written when its process was killed is none."""
    return [line for line in lines if line and line[0] == kind and len(line) == fields]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default="workers,memory,asking,simulated,kill")
    parser.add_argument("--trials", type=int, default=200, help="of a search with workers")
    parser.add_argument("--minutes", type=float, default=2.0, help="of the simulation")
    parser.add_argument("--kill-minutes", type=float, default=5.0)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    results: dict[str, Any] = {}
    if options.out and options.out.exists():
        results = json.loads(options.out.read_text(encoding="utf-8"))
    results["machine"] = machine()

    def keep(part: str, name: str, row: Row) -> None:
        results.setdefault(part, {})[name] = row
        print(part, name, json.dumps(row), flush=True)
        if options.out:
            options.out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")

    parts = options.parts.split(",")
    with postgresql("max_connections=300") as (url, _), tempfile.TemporaryDirectory() as folder:
        if "workers" in parts:
            for storage in ("journal", "postgresql"):
                for count in (1, 2, 4):
                    keep("workers", f"{storage}, {count}", workers(url, count, storage, options.trials))
        if "memory" in parts:
            for count in (1, 2, 3):
                keep("memory", f"{count}", memory(count))
        if "asking" in parts:
            for storage in ("journal", "postgresql"):
                store = Store(Path(folder) / "asking", url if storage == "postgresql" else None)
                store.run_dir.mkdir(exist_ok=True)
                for count in (100, 1000, 10000):
                    keep("asking", f"{storage}, {count}", alone(asking, store, count))
        if "simulated" in parts:
            keep("simulated", "64", simulated(url, 64, 60 * options.minutes))
    if "kill" in parts:
        keep("kill", "journal", kill(options.kill_minutes))


if __name__ == "__main__":
    main()
