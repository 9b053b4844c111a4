"""What every tracker has, the one that does nothing, and the guard that keeps failures of any from ending a run."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import optuna
from optuna.trial import FrozenTrial

from ...search import Result
from ..finetuning import Progress

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
        """Before a model of the search in ``run_dir`` is trained on. ``name``: of the model
        and the recipe, as :func:`.runs.folder_of` takes it."""

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
    """A tracker that is told nothing before its start, and is ended, with a warning, by its first failure."""

    def __init__(self, tracker: Tracker) -> None:
        self.given = tracker
        self.tracker: Tracker = NoTracker()
        self.end: Callable[[None], None] = tracker.finish

    def start(self, config: dict[str, Any], run_dir: Path, dense: Mapping[str, float], objective: str) -> None:
        self.tracker = self.given
        self._attempt(lambda: self.tracker.start(config, run_dir, dense, objective))

    def trial(self, study: optuna.Study, trial: FrozenTrial) -> None:
        self._attempt(lambda: self.tracker.trial(study, trial))

    def finish(self, result: Result | None) -> None:
        self._attempt(lambda: self.tracker.finish(result))

    def start_finetuning(self, config: dict[str, Any], run_dir: Path, name: str) -> None:
        self.tracker, self.end = self.given, self.given.finish_finetuning
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
            with contextlib.suppress(Exception):  # nobody waits for a run that is told nothing more
                self.end(None)
