"""Experiment trackers: told about every trial and the final front; none of their failures ends a search."""

from __future__ import annotations

import logging
import os
import secrets
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol, cast

import optuna
from optuna.trial import FrozenTrial, TrialState

from ..search import Result
from ..search.front import hypervolume
from ..search.study import finished
from .figures import front_figure, scored_trials

logger = logging.getLogger(__name__)


class Tracker(Protocol):
    """``tracker._target_`` names one."""

    def start(self, config: dict[str, Any], run_dir: Path, dense: Mapping[str, float], objective: str) -> None:
        """Before the first trial. ``dense``: score and costs of the dense model; ``objective``: the front's cost."""

    def trial(self, study: optuna.Study, trial: FrozenTrial) -> None:
        """After every trial, failed ones included."""

    def finish(self, result: Result | None) -> None:
        """Once at the end; None when the search ended with an error."""


class NoTracker:
    """``tracker=none``."""

    def start(self, config: dict[str, Any], run_dir: Path, dense: Mapping[str, float], objective: str) -> None:
        pass

    def trial(self, study: optuna.Study, trial: FrozenTrial) -> None:
        pass

    def finish(self, result: Result | None) -> None:
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

    def _attempt(self, call: Callable[[], None]) -> None:
        try:
            call()
        except Exception as error:  # a network, a full disk, a service's bug: none of it is worth the search
            logger.warning("tracking ends here, the search goes on: %s: %s", type(error).__name__, error)
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
        import wandb  # about a second, and only where it is used

        mode = self.mode or os.environ.get("WANDB_MODE")
        if mode is None and not wandb.api.api_key:
            mode = "offline"
        identity = run_dir / "wandb" / "prunefront-id"
        identity.parent.mkdir(parents=True, exist_ok=True)
        if not identity.exists():
            identity.write_text(secrets.token_hex(4))
        self.run = wandb.init(
            project=self.project,
            entity=self.entity,
            name=self.name or run_dir.name,
            id=identity.read_text(),
            resume=None if mode == "offline" else "allow",  # several offline runs of one id are joined by `wandb sync`
            dir=run_dir,
            mode=cast(Any, mode),  # W&B checks the value
            config={**config, "dense": dict(dense)},
            settings=wandb.Settings(silent=True, console="off"),
        )
        self.dense, self.objective = dict(dense), objective

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
