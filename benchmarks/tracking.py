"""What W&B costs a search: time spent in the tracker, offline, beside the time of the search itself.

Run: python -m benchmarks.tracking [--trials 200]

The digits search, whose trials take a seventh of a second, is the worst case. ``by count``: one trial told when so many
were told before.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import optuna

from prunefront.runners.cli import main as command
from prunefront.runners.tracking import Guarded, WandbTracker

spent: dict[str, float] = {}


class Timed(Guarded):
    """Adds up the seconds of every kind of call."""

    def _attempt(self, call: Callable[[], None]) -> None:
        started = time.perf_counter()
        super()._attempt(call)
        name = call.__qualname__.split(".")[1]
        spent[name] = spent.get(name, 0.0) + time.perf_counter() - started


def search(trials: int) -> None:
    from prunefront.runners import commands

    commands.Guarded = Timed  # type: ignore[misc]
    with tempfile.TemporaryDirectory() as folder:
        run_dir = Path(folder) / "run"
        options = [f"n_trials={trials}", f"run_dir={run_dir}", "tracker.mode=offline", "finalists=1"]
        started = time.perf_counter()
        with contextlib.redirect_stdout(io.StringIO()):
            assert command(["search", "task=digits", *options]) == 0
        whole = time.perf_counter() - started
        seconds = sum(json.loads((run_dir / "result.json").read_text())["seconds"].values())
    print(f"{trials} trials, {whole:.1f} s in all, {seconds:.1f} s of searching")
    for name, value in spent.items():
        print(f"{name}: {value:.2f} s, {value / whole:.1%} of all")
    print(f"a trial: {1000 * spent['trial'] / trials:.2f} ms, {spent['trial'] / seconds:.2%} of searching")


def by_count() -> None:
    groups = {f"layer{i}.conv": 64 for i in range(30)}
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        run_dir = Path(folder)
        space = {"groups": [{"name": name, "size": size} for name, size in groups.items()]}
        (run_dir / "space.json").write_text(json.dumps(space))
        study = optuna.create_study(directions=["maximize", "minimize"])
        tracker = WandbTracker(mode="offline")
        dense = {"macs": 1e6, "score": 1.0}
        tracker.start({}, run_dir, dense, "macs")
        trials = []
        for number in range(10_000):
            widths = dict(zip(groups, rng.integers(1, 65, 30).tolist(), strict=True))
            cost = float(rng.integers(1, 10**6))
            attributes = {"costs": {"macs": cost}, "plan": {"widths": widths}}
            trial = optuna.trial.create_trial(values=[-1 / cost - rng.random(), cost], user_attrs=attributes)
            trial.number = number
            trials.append(trial)
        done = 0
        for count in (100, 1000, 10_000):
            for trial in trials[done : count - 50]:
                tracker.trial(study, trial)
            started = time.perf_counter()
            for trial in trials[count - 50 : count]:
                tracker.trial(study, trial)
            print(f"after {count} trials: {1000 * (time.perf_counter() - started) / 50:.2f} ms a trial")
            done = count
        assert tracker.history is not None
        started = time.perf_counter()
        tracker._draw(tracker.history)
        print(f"pictures and table of {len(trials)} trials: {time.perf_counter() - started:.2f} s")
        tracker.finish(None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=200)
    options = parser.parse_args()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    search(options.trials)
    by_count()


if __name__ == "__main__":
    main()
