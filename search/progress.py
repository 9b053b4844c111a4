"""A live bar of a search."""

from __future__ import annotations

import time
from collections.abc import Mapping

import optuna
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from .liveness import WORKER
from .study import ended, finished


class SearchProgress:
    """A live bar with the best score and its cost, rate and workers; one more trial at every call."""

    def __init__(
        self, n_trials: int, objective: str, dense: Mapping[str, float], console: Console | None = None
    ) -> None:
        self.n_trials, self.objective, self.dense = n_trials, objective, dense
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[best]}"),
            TextColumn("{task.fields[rate]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
        )
        self.bar = self.progress.add_task("searching", total=n_trials, best="", rate="")
        self.judged: TaskID | None = None
        self.started, self.seen, self.workers = time.monotonic(), 0, set[str]()

    def __enter__(self) -> SearchProgress:
        self.progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.progress.stop()

    def begin(self, study: optuna.Study) -> None:
        """Show what an earlier session has done."""
        done, _ = ended(study.get_trials(deepcopy=False))
        if done:
            self.progress.update(self.bar, completed=done, total=max(done, self.n_trials), best=self.best(study))

    def __call__(self, study: optuna.Study, trial: optuna.trial.FrozenTrial) -> None:
        done, _ = ended(study.get_trials(deepcopy=False))
        self.seen += 1
        self.workers.add(str(trial.user_attrs.get(WORKER)))
        rate = f"{60 * self.seen / (time.monotonic() - self.started):.0f}/min"
        if len(self.workers) > 1:
            rate += f" by {len(self.workers)}"
        self.progress.update(self.bar, completed=done, best=self.best(study), rate=rate)

    def judging(self, done: int, of: int) -> None:
        """After the last trial: a second bar, of the models that are repaired thoroughly and scored in full."""
        if self.judged is None:
            self.progress.stop_task(self.bar)
            self.judged = self.progress.add_task("judging", total=of, best="", rate="")
        self.progress.update(self.judged, completed=done, total=of)

    def best(self, study: optuna.Study) -> str:
        trials = finished(study)
        if not trials:
            return "no score yet"
        best, guide = max(trials, key=lambda t: t.values[0]), (study.metric_names or ["score"])[0]
        share = best.user_attrs["costs"][self.objective] / self.dense[self.objective]
        return f"{guide} {best.values[0]:.4f} at {share:.1%} {self.objective}"
