"""What the command line shows: progress, tables, log messages, all on one console."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import optuna
from optuna.trial import TrialState
from rich.console import Console
from rich.logging import RichHandler
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from ..search.study import finished
from ..spaces import Space

#: Log messages pass above a live progress bar only when both are written by the same console.
console = Console()
errors = Console(stderr=True)


class ConsoleHandler(RichHandler):
    """For the logging configuration in ``conf/``."""

    def __init__(self, level: int | str = logging.NOTSET) -> None:
        super().__init__(level=level, console=console, show_path=False, show_time=False)


class SearchProgress:
    """A live bar with the best score and its cost; one more trial at every call."""

    def __init__(self, n_trials: int, objective: str, dense: Mapping[str, float]) -> None:
        self.objective, self.dense = objective, dense
        self.progress = Progress(
            TextColumn("searching"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[best]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
        )
        self.bar = self.progress.add_task("searching", total=n_trials, best="")

    def __enter__(self) -> SearchProgress:
        self.progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.progress.stop()

    def __call__(self, study: optuna.Study, trial: optuna.trial.FrozenTrial) -> None:
        trials = study.get_trials(deepcopy=False)
        done = sum(t.state == TrialState.COMPLETE or "error" in t.user_attrs for t in trials)
        self.progress.update(self.bar, completed=done, best=self.best(study))

    def best(self, study: optuna.Study) -> str:
        trials = finished(study)
        if not trials:
            return "no score yet"
        best = max(trials, key=lambda t: t.values[0])
        share = best.user_attrs["costs"][self.objective] / self.dense[self.objective]
        return f"best {best.values[0]:.4f} at {share:.1%} {self.objective}"


def front_table(
    entries: Sequence[Mapping[str, Any]], picked: str, dense: Mapping[str, float], score_name: str = "score"
) -> Table:
    """``entries``: name and metrics of each model of the front; ``dense``: those of the dense model, where known."""
    table = Table(caption="shares are of the dense model; the test split was used for these models only")
    table.add_column("model")
    for name in (f"{score_name} (search)", f"{score_name} (test)", "MACs", "params"):
        table.add_column(name, justify="right")
    table.add_row("dense", *_cells(dense, {}), end_section=True)
    chosen = next(entry for entry in entries if entry["name"] == picked)
    table.add_row(f"picked ({picked})", *_cells(chosen, dense), style="bold green", end_section=True)
    for entry in entries:
        table.add_row(entry["name"], *_cells(entry, dense))
    return table


def _cells(metrics: Mapping[str, Any], dense: Mapping[str, Any]) -> list[str]:
    kinds = {"score": _score, "test": _score, "macs": _count, "params": _count}
    return [kind(metrics.get(key), dense.get(key)) for key, kind in kinds.items()]


def _score(value: float | None, dense: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.4f}" if dense is None else f"{value:.4f} ({value - dense:+.4f})"


def _count(value: float | None, dense: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,.0f}" if dense is None else f"{value:,.0f} ({value / dense:.1%})"


def space_table(space: Space) -> Table:
    """The groups, then the frozen ones with their reasons."""
    table = Table(title=f"{len(space.groups)} groups, {len(space.frozen)} frozen")
    for name in ("name", "kind", "size", "exact", "tensors"):
        table.add_column(name, justify="right" if name == "size" else "left")
    for group in space.groups:
        members = len({member.tensor for member in group.members})
        table.add_row(group.name, group.kind, str(group.size), "yes" if group.exact else "no", str(members))
    if space.frozen:
        table.add_section()
    for frozen in space.frozen:
        table.add_row(frozen.name, "frozen", "", "", frozen.reason, style="dim")
    return table
