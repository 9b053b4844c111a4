"""What a search found: the front, tested, saved, and ready to be built again."""

from __future__ import annotations

import logging
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from torch import nn

from ..spaces import Plan, Space
from ..spaces.errors import SearchError, StorageError
from ..spaces.inputs import Inputs
from .candidates import Candidates, Score
from .front import knee, non_dominated
from .saved import FINETUNED, METRICS, RESULT, read_json, read_saved, save_model, write_json
from .study import finished
from .timing import Timing

logger = logging.getLogger(__name__)

#: Metrics of latency: predicted by a model until it is measured, when the prediction is kept beside it.
LATENCY_MS, PREDICTED_MS = "latency_ms", "latency_predicted_ms"


@dataclass(frozen=True)
class Entry:
    """One scored plan. ``metrics``: score, macs, params, memory_bytes, size_bytes; test and latency where measured."""

    name: str
    plan: Plan
    metrics: Mapping[str, Any]
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


@dataclass(frozen=True)
class Verification:
    """Measures the models of the front on the target. ``limit``: of the ratio to the dense model, infinite without."""

    timing: Timing
    limit: float
    inputs: Inputs

    def measured(self, candidates: Candidates, candidate: nn.Module) -> dict[str, Any]:
        """Metrics of latency of one model; none where the target fails on it."""
        with candidates.timer.part("measure"):
            found = self.timing.verify(candidates.space.model, candidate, self.inputs)
        if found is None:
            return {}
        return {
            LATENCY_MS: found.median_ms,
            "latency_low_ms": found.low_ms,
            "latency_high_ms": found.high_ms,
            "latency_ratio": found.ratio,
            "latency_ratio_high": found.ratio_high,
            "latency_conditions": dict(found.conditions),
            "latency_warnings": list(found.warnings),
        }

    def holds(self, metrics: Mapping[str, Any]) -> bool:
        """Whether the upper end of the measured interval is within the limit."""
        return self.limit == math.inf or metrics.get("latency_ratio_high", math.inf) <= self.limit


def collect(
    run_dir: Path,
    study: optuna.Study,
    candidates: Candidates,
    objective: str,
    has_budget: bool,
    inputs: Inputs,
    test: Score | None,
    reason: str,
    verification: Verification | None = None,
) -> Result:
    """Measure, test and save the front of ``study``; members that miss a budget of latency give way to the next."""
    trials = list({t.user_attrs["plan"]["fingerprint"]: t for t in reversed(finished(study))}.values())
    if not trials:
        raise SearchError(f"no trial was finished in {run_dir}; {reason or 'allow more time'}")
    entries = _verified(run_dir, trials, candidates, objective, inputs, verification)
    entries = [_tested_entry(entry, candidates, inputs, test) for entry in entries]
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
            **_dense_latency(entries),
        },
    )
    _remove_others(run_dir / "front", {entry.name for entry in entries})
    return Result(entries[best], tuple(entries), objective, study, candidates.space, run_dir, seconds)


def _dense_latency(entries: Sequence[Entry]) -> dict[str, float]:
    """Milliseconds of the dense model, measured beside those of the front."""
    known = [e.metrics for e in entries if "latency_ratio" in e.metrics]
    return {"dense_latency_ms": float(np.median([m[LATENCY_MS] / m["latency_ratio"] for m in known]))} if known else {}


def _verified(
    run_dir: Path,
    trials: Sequence[optuna.trial.FrozenTrial],
    candidates: Candidates,
    objective: str,
    inputs: Inputs,
    verification: Verification | None,
) -> list[Entry]:
    """The non-dominated trials, measured where there is a target: their measured latency decides who is dominated."""
    entries = {t.number: _entry(run_dir, t, candidates) for t in trials}
    scores = {t.number: t.values[0] for t in trials}
    checked: set[int] = set()
    while entries:
        numbers = list(entries)
        costs = [entries[n].metrics[objective] for n in numbers]
        chosen = [numbers[i] for i in non_dominated([scores[n] for n in numbers], costs)]
        todo = [number for number in chosen if number not in checked]
        if verification is None or not todo:
            return [entries[number] for number in chosen]
        for number in todo:
            checked.add(number)
            entry = entries[number]
            metrics = dict(entry.metrics)
            if "latency_ratio" not in metrics:
                predicted = {PREDICTED_MS: metrics[LATENCY_MS]} if LATENCY_MS in metrics else {}
                metrics |= predicted | verification.measured(candidates, entry.model())
            if verification.holds(metrics):
                entries[number] = replace(entry, metrics=metrics)
            else:
                del entries[number]
    raise SearchError(
        f"no candidate of {len(trials)} holds the latency budget when it is measured; search on with more trials, "
        "raise the budget, or measure on a quieter machine"
    )


def planned(space: Space, trial: optuna.trial.FrozenTrial) -> Plan:
    """The plan that a trial scored."""
    described = trial.user_attrs["plan"]
    return space.plan(described["widths"], described["criterion"])


def _entry(run_dir: Path, trial: optuna.trial.FrozenTrial, candidates: Candidates) -> Entry:
    """As the trial, or an earlier session of the same run, has measured it."""
    plan = planned(candidates.space, trial)
    path = run_dir / "front" / f"trial{trial.number:04d}"
    metrics = _saved_metrics(path, plan) or {"score": trial.values[0], **trial.user_attrs["costs"]}
    return Entry(path.name, plan, metrics, path, lambda: candidates.prepare(plan))


def _tested_entry(entry: Entry, candidates: Candidates, inputs: Inputs, test: Score | None) -> Entry:
    """With its test score, and saved, unless both are so already."""
    saved = _saved_metrics(entry.path, entry.plan)
    if saved == dict(entry.metrics) and (test is None or "test" in saved):
        return entry
    metrics = dict(entry.metrics)
    candidate = entry.model()
    if test is not None:
        metrics |= _tested(candidates, candidate, test)
    with candidates.timer.part("save"):
        save_model(entry.path, candidate, entry.plan, metrics, inputs)
    return replace(entry, metrics=metrics)


def _saved_metrics(path: Path, plan: Plan) -> dict[str, Any] | None:
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
    """Models that a longer search has found better ones than; their plans stay in the study.

    Those that were fine-tuned stay: training takes longer than the search.
    """
    for folder in front.iterdir():
        if folder.name not in names and not (folder / FINETUNED).exists():
            shutil.rmtree(folder, ignore_errors=True)
