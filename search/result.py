"""What a search found: the front, tested, saved, and ready to be built again."""

from __future__ import annotations

import datetime
import importlib.metadata
import logging
import math
import platform
import shutil
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import torch
from optuna.trial import FrozenTrial
from torch import nn

from ..spaces import Plan, Space
from ..spaces.devices import device_of
from ..spaces.errors import ConfigError, SearchError, StorageError
from ..spaces.inputs import Inputs
from .candidates import Candidates, Score
from .files import METRICS, RESULT, read_json, write_json
from .formats import count_text, milliseconds_text, score_text
from .front import knee, non_dominated, picked_by, thinned
from .guidance import Guidance
from .problem import LATENCY_MS
from .protocol import conditions
from .saved import load_with, read_saved, save_model
from .study import ended, finished, first_by_plan, is_estimate, name_of
from .timing import Timing

logger = logging.getLogger(__name__)

#: The prediction that is kept beside a measured latency.
PREDICTED_MS = "latency_predicted_ms"
#: Trials that are judged within a budget, and along a front.
FINALISTS, FRONT_FINALISTS = 5, 20
Judging = Callable[[int, int], None]
#: Points of a curve of sensitivity.
SENSITIVITY_WIDTHS = 17


@dataclass(frozen=True)
class Entry:
    """One scored plan. ``metrics``: score, macs, params, memory_bytes, size_bytes; test and latency where measured;
    guide: what its trial was told."""

    name: str
    plan: Plan = field(repr=False)
    metrics: Mapping[str, Any]
    #: Folder of the saved model, for :func:`prunefront.load`.
    path: Path
    build: Callable[[], nn.Module] = field(repr=False, compare=False)
    #: Whether the plan is that of the trial: on another device near-ties among units may fall differently.
    is_of_trial: bool = field(default=True, repr=False)
    #: Whether an earlier session of the same run has judged and saved it.
    is_saved: bool = field(default=False, repr=False)

    def model(self) -> nn.Module:
        """Build the pruned model, thoroughly repaired."""
        return self.build()


@dataclass(frozen=True, repr=False)
class Result:
    """What a search found; ``print(result)`` is a table of it.

    ``front``: the non-dominated entries of score against ``objective``, cheapest first. ``best``: the one with
    the highest score within the budget; without a budget the knee of the front. ``dense``: metrics of the dense model,
    named like those of the entries.
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
    dense: Mapping[str, Any]
    #: Whether a budget decides what is best.
    has_budget: bool
    #: What a table of the front leaves open.
    remarks: tuple[str, ...] = ()
    #: Whether Ctrl-C ended the trials.
    is_interrupted: bool = False

    def __repr__(self) -> str:
        texts = {key: text for key, text in _SHOWN.items() if key in self.best.metrics}
        rows = [["", *texts], ["dense", *(text(self.dense.get(key), None) for key, text in texts.items())]]
        for entry in self.front:
            cells = [text(entry.metrics.get(key), self.dense.get(key)) for key, text in texts.items()]
            rows.append([("* " if entry is self.best else "  ") + entry.name, *cells])
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join([f"{row[0]:{widths[0]}}", *map(str.rjust, row[1:], widths[1:])]) for row in rows]
        count = f"{len(self.front)} model{'s' * (len(self.front) > 1)}"
        picked = f"* picked: {picked_by(self.has_budget, len(self.front))}"
        return "\n".join([f"{count} in {self.run_dir}; shares are of the dense model", *lines, picked, *self.remarks])


#: Metrics in the table of a result, and how they are written.
_SHOWN: dict[str, Callable[[float | None, float | None], str]] = {
    "score": score_text,
    "test": score_text,
    "macs": count_text,
    "params": count_text,
    LATENCY_MS: milliseconds_text,
}


@dataclass(frozen=True)
class Verification:
    """Measures the models of the front on the target. ``limit``: of the ratio to the dense model, infinite without."""

    timing: Timing
    limit: float
    inputs: Inputs

    def measured(self, candidates: Candidates, plan: Plan) -> dict[str, Any]:
        """Metrics of latency of one plan, which need no repair; none where the target fails on it."""
        with candidates.timer.part("measure"):
            found = self.timing.verify(candidates.space.model, candidates.space.build(plan).eval(), self.inputs)
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


@dataclass(frozen=True)
class Judge:
    """How finalists are judged: repaired thoroughly, measured where there is a target, scored, and the front tested."""

    candidates: Candidates
    guided: Guidance
    inputs: Inputs
    test: Score | None = None
    verification: Verification | None = None

    def final(self, entry: Entry) -> Entry | None:
        """Measured, scored and saved; None for one that misses the budget of latency, or cannot be built or scored."""
        verification, metrics = self.verification, dict(entry.metrics)
        if verification is not None and not entry.is_saved:
            predicted = {PREDICTED_MS: metrics[LATENCY_MS]} if LATENCY_MS in metrics else {}
            metrics |= predicted | verification.measured(self.candidates, entry.plan)
        if verification is not None and not verification.holds(metrics):
            return None
        if entry.is_saved:
            return self._kept(entry)
        is_as_before = self.candidates.tuning is None and not self.candidates.space.repairs_in_two_efforts
        try:
            candidate = entry.model()
            if self.guided.is_score and is_as_before and entry.is_of_trial:
                metrics["score"] = metrics["guide"]
            else:
                metrics["score"] = self.candidates.score(candidate, self.guided.score, "score")
        except Exception as error:  # one that fails must not cost the user the others
            logger.warning("%s has no score: %s: %s", entry.name, type(error).__name__, error)
            return None
        entry = replace(entry, metrics=metrics)
        with self.candidates.timer.part("save"):
            save_model(entry.path, candidate, entry.plan, metrics, self.inputs)
        return self._kept(entry)

    def tested(self, entry: Entry) -> Entry:
        """With its test score. A failing test function must not cost the user the models that were found."""
        if self.test is None or "test" in entry.metrics:
            return entry
        candidate = entry.model()
        try:
            metrics = {**entry.metrics, "test": self.candidates.score(candidate, self.test, "test")}
        except Exception as error:
            logger.warning("no test score: %s: %s", type(error).__name__, error)
            return entry
        with self.candidates.timer.part("save"):
            write_json(entry.path / METRICS, metrics)
        return replace(entry, metrics=metrics)

    def dense(self, known: Mapping[str, Any]) -> dict[str, Any]:
        """Metrics of the dense model; ``known``: those that need not be scored again."""
        space = self.candidates.space
        metrics: dict[str, Any] = {**asdict(space.dense_cost), **known}
        functions = {"score": self.guided.score, "test": self.test}
        for name, function in functions.items():
            if function is None or name in known:
                continue
            try:
                metrics[name] = self.candidates.score_dense(function, name)
            except ConfigError as error:  # must not cost the user the models that were found
                logger.warning("%s", error)
        return metrics

    def _kept(self, entry: Entry) -> Entry:
        """As it was saved and scored: a repair, or a training, would make another model of the same plan."""
        return replace(entry, build=lambda: _read(entry, self.candidates.space.model), is_saved=True)


def collect(
    run_dir: Path,
    study: optuna.Study,
    judge: Judge,
    objective: str,
    has_budget: bool,
    finalists: int | None,
    reason: str,
    judging: Judging | None = None,
    dense: Mapping[str, Any] | None = None,
) -> Result:
    """The front of the finalists of ``study``. Those that miss a budget of latency give way to the next.

    ``finalists``: how many, or None for the default. ``judging``: told how many of how many are done. ``dense``: scores
    of the dense model that are known.

    Raises:
        SearchError: no trial was finished, or none holds the latency budget.
    """
    candidates = judge.candidates
    trials = first_by_plan(finished(study))
    if not trials:
        raise SearchError(f"no trial was finished in {run_dir}; {reason or 'allow more time'}")
    layers = _layers([t for t in trials if not is_estimate(t)], len(study.directions) > 1)
    for_front = len(study.directions) > 1
    wanted = finalists or (FRONT_FINALISTS if for_front else FINALISTS)
    if for_front:
        layers = _chosen(layers, wanted)
        wanted = len(layers[0])
    wanted = min(wanted, sum(map(len, layers)))
    told = judging or (lambda done, of: None)
    entries: list[Entry] = []
    for trial in (trial for layer in layers for trial in layer):
        told(len(entries), wanted)
        if len(entries) == wanted:
            break
        entry = judge.final(_entry(run_dir, trial, candidates))
        if entry is not None:
            entries.append(entry)
    told(len(entries), len(entries))
    # What was judged before stays in the running: the guide that chooses finalists is not the score.
    before = {entry["name"] for entry in _earlier(run_dir).get("front", [])}
    judged_now = {entry.name for entry in entries}
    again = [_entry(run_dir, t, candidates) for t in trials if name_of(t.number) in before - judged_now]
    entries += [entry for entry in map(judge.final, again) if entry is not None]
    if not entries and judge.verification is None:
        raise SearchError(f"none of {len(trials)} candidates can be scored or built; the warnings above say why")
    if not entries:
        raise SearchError(
            f"none of {len(trials)} candidates holds the latency budget when it is measured, or can be scored; search "
            "on with more trials, raise the budget, or measure on a quieter machine"
        )
    judged = len(entries)
    front = non_dominated([e.metrics["score"] for e in entries], [e.metrics[objective] for e in entries])
    entries = [judge.tested(entries[position]) for position in front]
    best = len(entries) - 1
    if not has_budget:
        best = knee([e.metrics["score"] for e in entries], [e.metrics[objective] for e in entries])
    dense_latency = _dense_latency(entries)
    entries = [_at_one_pace(entry, dense_latency) for entry in entries]
    described = {**judge.dense(dense or {}), **dense_latency}
    seconds = dict(candidates.timer.seconds)
    write_json(
        run_dir / RESULT,
        {
            "picked": entries[best].name,
            "objective": objective,
            "judged": judged,
            "front": [{"name": entry.name, **entry.metrics} for entry in entries],
            "dense": described,
            "seconds": seconds,
            "sensitivity": sensitivity(candidates.space),
            "machine": this_machine(device_of(candidates.space.model)),
            "finished": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        },
    )
    gone = _remove_others(run_dir / "front", {entry.name for entry in entries})
    return Result(
        entries[best],
        tuple(entries),
        objective,
        study,
        candidates.space,
        run_dir,
        seconds,
        described,
        has_budget,
        _remarks(study, judged, entries, described, before, gone),
    )


def _remarks(
    study: optuna.Study,
    judged: int,
    front: Sequence[Entry],
    dense: Mapping[str, Any],
    before: set[str],
    removed: Collection[str],
) -> tuple[str, ...]:
    """``before``: models of the front that an earlier session ended with; ``removed``: folders that are gone."""
    done, failed = ended(study.get_trials(deepcopy=False))
    found = [f"{failed} of {done} trials failed"] if failed else []
    if judged > len(front):
        found.append(f"{judged - len(front)} of {judged} judged models are no better than a cheaper one")
    if len(front) == 1 and len(study.directions) > 1:
        found.append("a front of one model: more trials may find others")
    if whole := [entry.name for entry in front if entry.metrics["params"] == dense["params"]]:
        found.append(f"{whole[0]} has all units of the dense model: they differ by its repair")
    left = sorted(before - {entry.name for entry in front})
    if gone := [name for name in left if name in removed]:
        found.append(f"no longer on the front, and removed: {', '.join(gone)}; their plans stay in the study")
    if kept := [name for name in left if name not in removed]:
        found.append(f"no longer on the front, and kept with what was made of them: {', '.join(kept)}")
    return tuple(found)


def _earlier(run_dir: Path) -> dict[str, Any]:
    """What an earlier session of the same run ended with."""
    return read_json(run_dir / RESULT) if (run_dir / RESULT).exists() else {}


def known_dense(run_dir: Path) -> dict[str, Any]:
    """What an earlier session of the same run has found out about the dense model."""
    known: dict[str, Any] = _earlier(run_dir).get("dense", {})
    return known


def sensitivity(space: Space) -> dict[str, list[list[float]]]:
    """By dimension, widths and the share of the dense outputs of what reads them that no fit gives back there.

    At most :data:`SENSITIVITY_WIDTHS` of them; nothing for dimensions without moments, see :meth:`Space.lost_outputs`.
    """
    found = {}
    for name, curve in zip(space.dimensions, space.lost_outputs(), strict=True):
        if curve is not None:
            widths = np.unique(np.linspace(0, len(curve) - 1, SENSITIVITY_WIDTHS).round().astype(int))
            found[name] = [[int(width), round(float(curve[width]), 5)] for width in widths]
    return found


def this_machine(device: torch.device) -> dict[str, Any]:
    """The processor, the GPU on which the models lie, and the versions that a run's numbers belong to."""
    known = conditions()
    return {
        **{key: known[key] for key in ("cpu", "cores")},
        **({"gpu": torch.cuda.get_device_name(device)} if device.type == "cuda" else {}),
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in ("torch", "optuna", "prunefront")},
    }


def _dense_latency(entries: Sequence[Entry]) -> dict[str, float]:
    """Milliseconds of the dense model, measured beside those of the front."""
    known = [e.metrics for e in entries if "latency_ratio" in e.metrics]
    return {LATENCY_MS: float(np.median([m[LATENCY_MS] / m["latency_ratio"] for m in known]))} if known else {}


def _at_one_pace(entry: Entry, dense: Mapping[str, float]) -> Entry:
    """With its milliseconds as they would be beside a dense model that takes those of ``dense``: machines have slow
    spells, in which only ratios mean something."""
    metrics = dict(entry.metrics)
    if "latency_ratio" not in metrics:
        return entry
    factor = metrics["latency_ratio"] * dense[LATENCY_MS] / metrics[LATENCY_MS]
    metrics |= {key: factor * metrics[key] for key in (LATENCY_MS, "latency_low_ms", "latency_high_ms")}
    if metrics[LATENCY_MS] != entry.metrics[LATENCY_MS]:
        write_json(entry.path / METRICS, metrics)
    return replace(entry, metrics=metrics)


def _layers(trials: Sequence[FrozenTrial], for_front: bool) -> list[list[FrozenTrial]]:
    """Best first: single trials by their value, or along a front what is left when the better layers are taken away."""
    if not for_front:
        return [[trial] for trial in sorted(trials, key=lambda t: -t.values[0])]
    layers, rest = [], list(trials)
    while rest:
        chosen = set(non_dominated([t.values[0] for t in rest], [t.values[1] for t in rest]))
        layers.append([rest[position] for position in sorted(chosen)])
        rest = [trial for position, trial in enumerate(rest) if position not in chosen]
    return layers


def _chosen(layers: list[list[FrozenTrial]], most: int) -> list[list[FrozenTrial]]:
    """With at most so many trials in the first layer; the others of it come next."""
    first = layers[0]
    places = thinned([t.values[1] for t in first], most)
    others = [trial for place, trial in enumerate(first) if place not in places]
    return [[first[place] for place in places], others, *layers[1:]]


def planned(space: Space, trial: FrozenTrial) -> Plan:
    """The plan that a trial scored, with the units that are most important here."""
    described = trial.user_attrs["plan"]
    return space.plan(described["widths"], described["criterion"])


def _entry(run_dir: Path, trial: FrozenTrial, candidates: Candidates) -> Entry:
    """As the trial, or an earlier session of the same run, has measured it."""
    plan = planned(candidates.space, trial)
    path = run_dir / "front" / name_of(trial.number)
    saved = _saved_metrics(path, plan)
    return Entry(
        path.name,
        plan,
        saved or {"guide": trial.values[0], **trial.user_attrs["costs"]},
        path,
        lambda: candidates.prepare(plan, "thorough"),
        is_of_trial=plan.fingerprint == trial.user_attrs["plan"]["fingerprint"],
        is_saved=saved is not None,
    )


def _read(entry: Entry, dense: nn.Module) -> nn.Module:
    """What was saved, which takes no repairs; built anew where it cannot be read."""
    try:
        model = load_with(entry.path, lambda: dense)
    except StorageError:
        return entry.build()
    return model.to(device_of(dense))


def _saved_metrics(path: Path, plan: Plan) -> dict[str, Any] | None:
    """What an earlier session of the same run has measured for this plan."""
    try:
        return read_json(path / METRICS) if read_saved(path)[0]["plan"] == plan.to_json() else None
    except StorageError:
        return None


def _remove_others(front: Path, names: set[str]) -> list[str]:
    """Remove models that a longer search has found better ones than, and return their names.

    Those stay whose folders hold work of the user's: what was fine-tuned, exported.
    """
    gone = [
        folder
        for folder in sorted(front.iterdir())
        if folder.is_dir() and folder.name not in names and not any(path.is_dir() for path in folder.iterdir())
    ]
    for folder in gone:
        shutil.rmtree(folder, ignore_errors=True)
    return [folder.name for folder in gone]
