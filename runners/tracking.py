"""Experiment trackers: told about every trial and the final front, or about every point of a fine-tuning; none of their
failures ends a run."""

from __future__ import annotations

import logging
import os
import secrets
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol, cast

import optuna
from optuna.trial import FrozenTrial, TrialState

from ..search import Result
from ..search.front import hypervolume
from ..search.study import finished
from .figures import front_figure, scored_trials
from .finetuning import Progress

logger = logging.getLogger(__name__)


class Tracker(Protocol):
    """``tracker._target_`` names one."""

    def start(self, config: dict[str, Any], run_dir: Path, dense: Mapping[str, float], objective: str) -> None:
        """Before the first trial. ``dense``: score and costs of the dense model; ``objective``: the front's cost."""

    def trial(self, study: optuna.Study, trial: FrozenTrial) -> None:
        """After every trial, failed ones included."""

    def finish(self, result: Result | None) -> None:
        """Once at the end; None when the search ended with an error."""

    def start_finetuning(self, config: dict[str, Any], run_dir: Path, name: str) -> None:
        """Before a model of the search in ``run_dir`` is trained on. ``name``: of the model and the recipe."""

    def step(self, progress: Progress) -> None:
        """At every point of the loss curve, and after evaluations."""

    def finish_finetuning(self, metrics: Mapping[str, Any] | None) -> None:
        """Once at the end; None when training ended with an error."""


class NoTracker:
    """``tracker=none``."""

    def start(self, config: dict[str, Any], run_dir: Path, dense: Mapping[str, float], objective: str) -> None:
        pass

    def trial(self, study: optuna.Study, trial: FrozenTrial) -> None:
        pass

    def finish(self, result: Result | None) -> None:
        pass

    def start_finetuning(self, config: dict[str, Any], run_dir: Path, name: str) -> None:
        pass

    def step(self, progress: Progress) -> None:
        pass

    def finish_finetuning(self, metrics: Mapping[str, Any] | None) -> None:
        pass


class Guarded:
    """A tracker that is switched off, with a warning, by its first failure."""

    def __init__(self, tracker: Tracker) -> None:
        self.tracker = tracker

    def start(self, config: dict[str, Any], run_dir: Path, dense: Mapping[str, float], objective: str) -> None:
        self._attempt(lambda: self.tracker.start(config, run_dir, dense, objective))

    def trial(self, study: optuna.Study, trial: FrozenTrial) -> None:
        self._attempt(lambda: self.tracker.trial(study, trial))

    def finish(self, result: Result | None) -> None:
        self._attempt(lambda: self.tracker.finish(result))

    def start_finetuning(self, config: dict[str, Any], run_dir: Path, name: str) -> None:
        self._attempt(lambda: self.tracker.start_finetuning(config, run_dir, name))

    def step(self, progress: Progress) -> None:
        self._attempt(lambda: self.tracker.step(progress))

    def finish_finetuning(self, metrics: Mapping[str, Any] | None) -> None:
        self._attempt(lambda: self.tracker.finish_finetuning(metrics))

    def _attempt(self, call: Callable[[], None]) -> None:
        try:
            call()
        except Exception as error:  # a network, a full disk, a service's bug: none of it is worth the search
            logger.warning("tracking ends here, the run goes on: %s: %s", type(error).__name__, error)
            self.tracker = NoTracker()


class WandbTracker:
    """Weights & Biases: one step a trial; the front, its plans and the picked model at the end.

    ``mode`` is online, offline or None: W&B's own setting (``WANDB_MODE``) where there is one, else online only for
    users who are logged in. A continued search continues its W&B run.
    """

    def __init__(
        self,
        project: str = "prunefront",
        entity: str | None = None,
        name: str | None = None,
        mode: str | None = None,
    ) -> None:
        self.project, self.entity, self.name, self.mode = project, entity, name, mode

    def start(self, config: dict[str, Any], run_dir: Path, dense: Mapping[str, float], objective: str) -> None:
        self._open({**config, "dense": dict(dense)}, run_dir, self.name or run_dir.name, "search", "prunefront-id")
        self.dense, self.objective = dict(dense), objective
        # The hypervolume counts from score 0, or from twice the dense score where scores are negative (losses).
        self.reference = (min(0.0, 2 * self.dense["score"]), self.dense[objective])

    def start_finetuning(self, config: dict[str, Any], run_dir: Path, name: str) -> None:
        self._open(config, run_dir, f"{self.name or run_dir.name}/{name}", "finetune", f"{name.replace('/', '-')}-id")

    def _open(self, config: dict[str, Any], run_dir: Path, name: str, kind: str, file: str) -> None:
        """Start or continue a W&B run; all runs of one search are a group."""
        import wandb  # about a second, and only where it is used

        mode = self.mode or os.environ.get("WANDB_MODE")
        if mode is None and not wandb.api.api_key:
            mode = "offline"
        self.run = wandb.init(
            project=self.project,
            entity=self.entity,
            name=name,
            group=f"{run_dir.name}-{_identity(run_dir / 'wandb' / 'prunefront-id')}",
            job_type=kind,
            id=_identity(run_dir / "wandb" / file),
            resume=None if mode == "offline" else "allow",  # several offline runs of one id are joined by `wandb sync`
            dir=run_dir,
            mode=cast(Any, mode),  # W&B checks the value
            config=config,
            settings=wandb.Settings(silent=True, console="off"),
        )

    def step(self, progress: Progress) -> None:
        values = {key: value for key, value in asdict(progress).items() if value is not None and key != "steps"}
        self.run.log(values, step=values.pop("step"))

    def finish_finetuning(self, metrics: Mapping[str, Any] | None) -> None:
        if metrics is not None:
            for key, value in metrics.items():
                if isinstance(value, int | float):
                    self.run.summary[f"final/{key}"] = value
        self.run.finish(exit_code=0 if metrics is not None else 1)

    def trial(self, study: optuna.Study, trial: FrozenTrial) -> None:
        trials = finished(study)
        values: dict[str, Any] = {"feasible": trial.state == TrialState.COMPLETE}
        values |= trial.user_attrs.get("costs", {})
        guide = (study.metric_names or ["score"])[0]
        if trial.state == TrialState.COMPLETE:
            values[guide] = trial.values[0]
        if trials:
            scores = [t.values[0] for t in trials]
            values[f"best_{guide}"] = max(scores)
            costs = [t.user_attrs["costs"][self.objective] for t in trials]
            # The hypervolume counts from 0, or from twice the first value where values are negative (losses).
            reference = (min(0.0, 2 * scores[0]), self.dense[self.objective])
            values["hypervolume"] = hypervolume(scores, costs, reference)
        self.run.log(values, step=trial.number)

    def finish(self, result: Result | None) -> None:
        import wandb

        if result is None:
            self.run.finish(exit_code=1)
            return
        rows = [{"name": entry.name, **entry.metrics} for entry in result.front]
        columns: list[str | int] = list(dict.fromkeys(key for row in rows for key in row))
        table = wandb.Table(columns=columns, data=[[row.get(str(column)) for column in columns] for row in rows])
        figure = front_figure(
            scored_trials(result.study, result.objective), rows, result.best.name, self.dense, result.objective
        )
        self.run.log({"front": table, "front_plot": wandb.Plotly(figure)})
        plans = wandb.Artifact(f"plans-{self.run.id}", type="plans")
        for entry in result.front:
            plans.add_file(str(entry.path / "plan.json"), name=f"{entry.name}/plan.json")
        picked = wandb.Artifact(f"model-{self.run.id}", type="model", metadata=dict(result.best.metrics))
        for file in sorted(result.best.path.iterdir()):
            picked.add_file(str(file))
        for artifact in (plans, picked):
            self.run.log_artifact(artifact)
        for key, value in result.best.metrics.items():
            self.run.summary[f"picked/{key}"] = value
        self.run.finish()


def _identity(path: Path) -> str:
    """The name of a W&B run or group, drawn once."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        path.write_text(secrets.token_hex(4))
    return path.read_text()
