"""What a search found: the front, tested, saved, and ready to be built again."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import optuna
from torch import nn

from ..spaces import Plan, Space
from ..spaces.errors import SearchError, StorageError
from ..spaces.inputs import Inputs
from .candidates import Candidates, Score
from .front import knee, non_dominated
from .saved import METRICS, RESULT, read_json, read_saved, save_model, write_json
from .study import finished

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Entry:
    """One scored plan. ``metrics``: score, macs, params, memory_bytes, size_bytes, and test where it was measured."""

    name: str
    plan: Plan
    metrics: Mapping[str, float]
    #: Folder of the saved model, for :func:`prunefront.load`.
    path: Path
    build: Callable[[], nn.Module] = field(repr=False, compare=False)

    def model(self) -> nn.Module:
        """Build the pruned model, recalibrated."""
        return self.build()


@dataclass(frozen=True)
class Result:
    """What a search found.

    ``front``: the non-dominated entries of score against ``objective``, cheapest first. ``best``: the one with
    the highest score within the budget; without a budget the knee of the front.
    """

    best: Entry
    front: tuple[Entry, ...]
    #: The cost of the front, such as macs.
    objective: str
    study: optuna.Study
    space: Space
    run_dir: Path
    #: Seconds by part: ask, project, build, recalibrate, score, tell, test, save.
    seconds: Mapping[str, float]


def collect(
    run_dir: Path,
    study: optuna.Study,
    candidates: Candidates,
    objective: str,
    has_budget: bool,
    inputs: Inputs,
    test: Score | None,
    reason: str,
) -> Result:
    """Test and save the front of ``study``."""
    trials = list({t.user_attrs["plan"]["fingerprint"]: t for t in reversed(finished(study))}.values())
    if not trials:
        raise SearchError(f"no trial was finished in {run_dir}; {reason or 'allow more time'}")
    costs = [t.user_attrs["costs"][objective] for t in trials]
    chosen = [trials[i] for i in non_dominated([t.values[0] for t in trials], costs)]
    entries = [_entry(run_dir, trial, candidates, inputs, test) for trial in chosen]
    best = len(entries) - 1
    if not has_budget:
        best = knee([e.metrics["score"] for e in entries], [e.metrics[objective] for e in entries])
    seconds = dict(candidates.timer.seconds)
    write_json(
        run_dir / RESULT,
        {
            "picked": entries[best].name,
            "objective": objective,
            "front": [{"name": entry.name, **entry.metrics} for entry in entries],
            "seconds": seconds,
        },
    )
    _remove_others(run_dir / "front", {entry.name for entry in entries})
    return Result(entries[best], tuple(entries), objective, study, candidates.space, run_dir, seconds)


def planned(space: Space, trial: optuna.trial.FrozenTrial) -> Plan:
    """The plan that a trial scored."""
    described = trial.user_attrs["plan"]
    return space.plan(described["widths"], described["criterion"])


def _entry(
    run_dir: Path,
    trial: optuna.trial.FrozenTrial,
    candidates: Candidates,
    inputs: Inputs,
    test: Score | None,
) -> Entry:
    plan = planned(candidates.space, trial)
    path = run_dir / "front" / f"trial{trial.number:04d}"
    metrics: dict[str, float] = {"score": trial.values[0], **trial.user_attrs["costs"]}
    saved = _saved_metrics(path, plan)
    if saved is not None and (test is None or "test" in saved):
        metrics = saved
    else:
        candidate = candidates.prepare(plan)
        if test is not None:
            metrics |= _tested(candidates, candidate, test)
        with candidates.timer.part("save"):
            save_model(path, candidate, plan, metrics, inputs)
    return Entry(path.name, plan, metrics, path, lambda: candidates.prepare(plan))


def _saved_metrics(path: Path, plan: Plan) -> dict[str, float] | None:
    """What an earlier session of the same run has measured for this plan."""
    try:
        return read_json(path / METRICS) if read_saved(path)[0]["plan"] == plan.to_json() else None
    except StorageError:
        return None


def _tested(candidates: Candidates, model: nn.Module, test: Score) -> dict[str, float]:
    """A failing test function must not cost the user the models that were found."""
    try:
        return {"test": candidates.score(model, test, "test")}
    except Exception as error:
        logger.warning("no test score: %s: %s", type(error).__name__, error)
        return {}


def _remove_others(front: Path, names: set[str]) -> None:
    """Models that a longer search has found better ones than; their plans stay in the study."""
    for folder in front.iterdir():
        if folder.name not in names:
            shutil.rmtree(folder, ignore_errors=True)
