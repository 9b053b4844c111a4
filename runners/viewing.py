"""Commands that look at what searches have left: front, pick, show, report, load-check."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from rich.text import Text

from ..search.files import DENSE, METRICS, RESULT, folder_of, read_json, read_plan
from ..search.front import picked_by
from ..spaces.errors import SearchError, StorageError
from .display import console, errors, front_table, multirun_table, show_load, widths_table
from .modules import import_modules
from .picking import best, given_limits, picked, picks, within
from .runs import (
    differing_overrides,
    is_multirun,
    models_of,
    own_overrides,
    read_run,
    run_folders,
)


def front(config: DictConfig) -> None:
    """Show the front of a run, or the picks of a multirun; with a budget, what holds it and the best of that."""
    run_dir, budget = Path(config.run), given_limits(config.pick)
    if is_multirun(run_dir):
        return show_multirun(run_dir, budget, config.json)
    run = read_run(run_dir)
    entries = within(run, budget, models_of(run)) if budget else models_of(run)
    name = picked(run, budget, entries)["name"]
    if config.json:
        kept = {key: [entry for entry in run[key] if entry in entries] for key in ("front", "finetuned")}
        print(json.dumps({"picked": name, **kept, "dense": run["dense"]}, indent=1))
        return
    rule = picked_by(bool(budget or run["space"]["search"]["budget"]), len(run["front"]))
    console.print(front_table(entries, name, run["dense"], run["score_name"], rule))
    show_load(folder_of(run_dir, name))


def show_multirun(folder: Path, budget: Mapping[str, str], as_json: bool) -> None:
    """One row a run: what was set in it, and its pick, or its best within ``budget``.

    Raises:
        SearchError: no run is finished, or none has a model within the budget.
    """
    rows, names = [], set[str]()
    for run_dir in run_folders(folder):
        try:
            run = read_run(run_dir)
            entry = picked(run, budget, models_of(run))
        except (StorageError, SearchError) as error:
            errors.print(f"{run_dir} is left out: {error}", style="yellow", soft_wrap=True)
            continue
        rows.append({"run": str(run_dir), "overrides": own_overrides(run_dir), "dense": run["dense"], **entry})
        names.add(run["score_name"])
    if not rows:
        raise SearchError(f"no finished run in {folder} has a model to show")
    differing = differing_overrides([row["overrides"] for row in rows])
    if as_json:
        print(json.dumps(rows, indent=1))
        return
    first = best(rows)
    console.print(multirun_table(rows, differing, first["run"], names.pop() if len(names) == 1 else "score"))
    show_load(folder_of(Path(first["run"]), first["name"]))


def pick(config: DictConfig) -> None:
    """Print the folder of the best model within a budget, for other programs."""
    run_dir = Path(config.run)
    run = read_run(run_dir)
    folders = [str(folder_of(run_dir, name)) for name in picks(run, config.pick, models_of(run))]
    print(json.dumps(folders) if config.json else "\n".join(folders))


def show(config: DictConfig) -> None:
    """Show one model of a run in detail: scores and costs beside the dense model's, and the width of every group."""
    run_dir = Path(config.run)
    run = read_run(run_dir)
    names = picks(run, config.pick, models_of(run))
    found = [described(run_dir, run, name) for name in names]
    if config.json:
        print(json.dumps(found, indent=1))
        return
    for model in found:
        entry = {"name": model["name"], **model["metrics"]}
        console.print(front_table([entry], None, run["dense"], run["score_name"]))
        console.print(widths_table(model["groups"]))
        show_load(model["path"])


def described(run_dir: Path, run: Mapping[str, Any], name: str) -> dict[str, Any]:
    """One model with its metrics, and the width of every group."""
    folder = folder_of(run_dir, name)
    widths = {} if name == DENSE else read_plan(folder)["widths"]
    groups = [{**group, "width": widths.get(group["name"], group["size"])} for group in run["space"]["groups"]]
    metrics = run["dense"] if name == DENSE and not folder.exists() else read_json(folder / METRICS)
    return {"name": name, "path": str(folder), "metrics": metrics, "groups": groups}


def report(config: DictConfig) -> None:
    """Write report.html of a finished run again, or one page that compares several runs."""
    from .report import write_report  # imports torch, which the other commands need not wait for

    given = [config.run] if isinstance(config.run, str) else list(config.run)
    folders = [folder for text in given for folder in finished_runs(Path(text))]
    own = Path(given[0]) / "report.html" if len(given) == 1 else Path("report.html")
    path = write_report(folders, Path(config.path) if config.path else own)
    console.print(str(path), soft_wrap=True)


def finished_runs(folder: Path) -> list[Path]:
    """The folder itself, or the finished runs in the folder of a multirun. Raises StorageError if there is none."""
    if not is_multirun(folder):
        return [folder]
    found = [run_dir for run_dir in run_folders(folder) if (run_dir / RESULT).exists()]
    if not found:
        raise StorageError(f"no run in {folder} is finished")
    return found


def load_check(config: DictConfig) -> None:
    """Load a saved model as a stranger would, and compare it with what was written down about it."""
    from .check import check_model  # as above

    import_modules(config.modules)
    for line in check_model(Path(config.run)):
        console.print(Text.assemble(("ok", "green"), f" {line}"), soft_wrap=True)
