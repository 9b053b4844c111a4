"""``prunefront pick`` and ``prunefront show``: one model of a run, for programs and for people."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from rich.console import Group
from rich.table import Table

from ..search.saved import METRICS, read_json, read_plan
from .display import BAR, bar, console, front_table
from .finetuning.command import picks
from .runs import read_run


def pick(config: DictConfig) -> None:
    """Print the folder of the best model within a budget, for other programs."""
    run_dir = Path(config.run)
    names = picks(read_run(run_dir), config.pick)
    folders = [str(run_dir / "front" / name) for name in names]
    print(json.dumps(folders) if config.json else "\n".join(folders))


def show(config: DictConfig) -> None:
    """Show one model of a run in detail: scores and costs beside the dense model's, and the width of every group."""
    run_dir = Path(config.run)
    run = read_run(run_dir)
    found = [described(run_dir, run, name) for name in picks(run, config.pick)]
    if config.json:
        print(json.dumps(found, indent=1))
        return
    for model in found:
        entry = {"name": model["name"], **model["metrics"]}
        console.print(Group(front_table([entry], model["name"], run["dense"]), widths_table(model["groups"])))
        console.print(f'load    prunefront.load("{model["path"]}")', soft_wrap=True, highlight=False)


def described(run_dir: Path, run: dict[str, Any], name: str) -> dict[str, Any]:
    folder = run_dir / "front" / name
    widths = read_plan(folder)["widths"] or {}
    groups = [{**group, "width": widths.get(group["name"], group["size"])} for group in run["space"]["groups"]]
    return {"name": name, "path": str(folder), "metrics": read_json(folder / METRICS), "groups": groups}


def widths_table(groups: list[dict[str, Any]]) -> Table:
    """``groups`` in the order of the forward: name, kind, size, and the width that is kept."""
    table = Table(caption="in the order of the forward; a bar is the share that is kept")
    for heading, side in (("group", "left"), ("kind", "left"), ("dense", "right"), ("kept", "right"), ("", "left")):
        table.add_column(heading, justify=side, width=BAR if not heading else None)  # type: ignore[arg-type]
    for group in groups:
        share = group["width"] / group["size"]
        table.add_row(group["name"], group["kind"], f"{group['size']:,}", f"{group['width']:,}", bar(share))
    return table
