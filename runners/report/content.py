"""What the report tells about a run, as plain JSON values: the page only draws it."""

from __future__ import annotations

import math
import re
import shlex
import warnings
from collections.abc import Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState

from ...search.budget import LATENCY_COLUMN, parse_budget
from ...search.files import folder_of, read_plan
from ...search.front import hypervolumes, picked_by
from ...search.problem import COLUMNS, COST_SHARE, CRITERION
from ...search.study import finished, is_estimate, read_study
from ...spaces.trust import own_modules
from ..display.console import load_line
from ..overrides import key_of, to_be_repeated
from ..picking import picked
from ..runs import dense_cost, models_of, own_overrides, read_run

#: Importance of fewer trials than this says nothing.
LEAST_TRIALS = 20


def described_run(run_dir: Path) -> dict[str, Any]:
    """Everything that the page shows of one run.

    Raises:
        StorageError: see :func:`.runs.read_run`.
    """
    run, study = read_run(run_dir), read_study(run_dir)
    trials = finished(study)
    groups = run["space"]["groups"]
    return {
        "name": run_dir.resolve().name,
        "overrides": [text for text in own_overrides(run_dir) if not text.startswith("run_dir=")],
        "path": str(run_dir),
        "search": run["space"]["search"],
        "objective": run["objective"],
        "guide": (study.metric_names or ["score"])[0],
        "picked": picked(run, {}, models_of(run))["name"],
        "picked_by": picked_by(bool(run["space"]["search"]["budget"]), len(run["front"])),
        "dense": _numbers(run["dense"]),
        "limits": limits(run),
        "front": [_model(run_dir, entry, groups) for entry in run["front"]],
        "finetuned": [_model(run_dir, entry, groups) for entry in run["finetuned"]],
        "score_name": run["score_name"],
        "groups": groups,
        "frozen": run["space"]["frozen"],
        "trials": trial_columns(study, groups),
        "uniform": _uniform(trials),
        "history": history(study, trials, run["objective"], run["dense"]),
        "importance": importance(study, trials),
        "sensitivity": run.get("sensitivity", {}),
        "target": _target(run),
        "seconds": run["seconds"],
        "machine": run.get("machine", {}),
        "finished": run.get("finished"),
        "config": _config(run_dir),
        "again": _again(run_dir),
    }


def limits(run: Mapping[str, Any]) -> dict[str, float]:
    """By limited cost the largest value that the budget allows, in the cost's own unit."""
    dense = run["dense"]
    parsed = parse_budget(run["space"]["search"]["budget"], dense_cost(dense), True, dense.get("latency_ms"))
    found = {key: limit for key, limit in zip(COLUMNS, parsed.values, strict=True) if math.isfinite(limit)}
    if COLUMNS[LATENCY_COLUMN] in found:
        found[COLUMNS[LATENCY_COLUMN]] *= dense.get("latency_ms", math.nan)
    return {key: limit for key, limit in found.items() if math.isfinite(limit)}


def _model(run_dir: Path, entry: Mapping[str, Any], groups: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    folder = folder_of(run_dir, entry["name"])
    plan = read_plan(folder)
    widths, modules = plan["widths"], own_modules(plan["structure"])
    return {
        **_numbers(entry),
        "name": entry["name"],
        "folder": str(folder.relative_to(run_dir)),
        "load": load_line(folder, plan),
        "modules": f" 'modules=[{','.join(modules)}]'" if modules else "",
        "widths": [widths[group["name"]] for group in groups],
        "warnings": list(entry.get("latency_warnings", [])),
    }


def _again(run_dir: Path) -> str | None:
    """What a command says again that goes on with the run's task; None for runs of the Python API."""
    if not (run_dir / ".hydra" / "overrides.yaml").exists():
        return None
    return shlex.join(text for text in to_be_repeated(run_dir) if key_of(text).partition(".")[0] in ("task", "tracker"))


def _numbers(metrics: Mapping[str, Any]) -> dict[str, float]:
    return {key: value for key, value in metrics.items() if isinstance(value, int | float) and math.isfinite(value)}


def trial_columns(study: optuna.Study, groups: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """All ended trials by column, shorter than by row: number, value, state, costs and widths."""
    trials = [t for t in study.get_trials(deepcopy=False) if t.state.is_finished() and "costs" in t.user_attrs]
    names = [group["name"] for group in groups]
    costs = [key for key in COLUMNS if any(key in t.user_attrs["costs"] for t in trials)]
    plans = [t.user_attrs["plan"]["widths"] for t in trials]
    return {
        "number": [t.number for t in trials],
        "value": [t.values[0] if t.values else None for t in trials],
        "state": [_state(t) for t in trials],
        **{key: [t.user_attrs["costs"].get(key) for t in trials] for key in costs},
        "widths": [[widths[name] for name in names] for widths in plans],
    }


def _state(trial: FrozenTrial) -> str:
    if trial.state != TrialState.COMPLETE:
        return str(trial.user_attrs.get("error", trial.state.name.lower()))
    return "estimate" if is_estimate(trial) else "complete"


def _uniform(trials: Sequence[FrozenTrial]) -> int | None:
    """The number of the trial in which all layers had the same share."""
    for trial in trials:
        shares = {value for name, value in trial.params.items() if name not in (COST_SHARE, CRITERION)}
        if len(shares) == 1:
            return trial.number
    return None


def history(
    study: optuna.Study, trials: Sequence[FrozenTrial], objective: str, dense: Mapping[str, float]
) -> dict[str, list[float]]:
    """By finished trial: its number, the best value so far, and the hypervolume of the front so far.

    The hypervolume is a share of the rectangle between the dense model's cost and cost 0, and between the best value
    and the first one; it is what two objectives have.
    """
    values = [t.values[0] for t in trials]
    found: dict[str, list[float]] = {"number": [t.number for t in trials], "best": list(accumulate(values, max))}
    if len(study.directions) > 1 and trials:
        costs = [t.user_attrs["costs"][objective] for t in trials]
        reference = (min(values), dense[objective])
        whole = (max(values) - reference[0]) * reference[1] or 1.0
        found["hypervolume"] = [area / whole for area in hypervolumes(values, costs, reference)]
    return found


def importance(study: optuna.Study, trials: Sequence[FrozenTrial]) -> list[tuple[str, float]]:
    """How much each dimension decides whether a trial is among the best tenth, most important first.

    Watanabe et al. 2023, "PED-ANOVA: Efficiently Quantifying Hyperparameter Importance in Arbitrary Subspaces".
    """
    if len(trials) < LEAST_TRIALS or len({t.values[0] for t in trials}) < LEAST_TRIALS:
        return []
    from optuna.importance import PedAnovaImportanceEvaluator, get_param_importances  # imports scikit-learn

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        warnings.simplefilter("ignore", UserWarning)  # it says that low targets are the good ones: they are, below
        try:
            found = get_param_importances(
                study, evaluator=PedAnovaImportanceEvaluator(), target=lambda t: -float(t.values[0])
            )
        except (RuntimeError, ValueError):  # all trials have the same value of every parameter, for example
            return []
    return [(name, float(value)) for name, value in found.items()]


def _target(run: Mapping[str, Any]) -> dict[str, Any]:
    """What latency was measured on: the target's description with the conditions of the picked model."""
    picked = next(entry for entry in run["front"] if entry["name"] == run["picked"])
    return {**(run["space"]["search"].get("target") or {}), **picked.get("latency_conditions", {})}


def _config(run_dir: Path) -> str | None:
    path = run_dir / ".hydra" / "config.yaml"
    if not path.exists():
        return None
    # Earlier versions wrote URLs of storages down, which may hold a password.
    return re.sub(r"(?m)^storage: .*://.*$", "storage: ...", path.read_text(encoding="utf-8"))
