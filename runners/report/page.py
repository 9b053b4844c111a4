"""The page: the data of the runs, and the styles and scripts that draw them, in one file."""

from __future__ import annotations

import html
import json
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from ..runs import differing_overrides
from .content import described_run

STYLES = ("style.css",)
SCRIPTS = ("elements.js", "charts.js", "page.js", "details.js")


def write_report(run_dirs: Path | Sequence[Path], path: Path | None = None) -> Path:
    """Write one page about one or several runs, and return its path: ``report.html`` of the first run by default.

    Raises:
        StorageError: see :func:`.runs.read_run`.
    """
    folders = [run_dirs] if isinstance(run_dirs, Path) else list(run_dirs)
    runs = [described_run(folder) for folder in folders]
    if len({run["name"] for run in runs}) < len(runs):
        runs = [{**run, "name": run["path"]} for run in runs]
    for run, own in zip(runs, differing_overrides([run["overrides"] for run in runs]), strict=True):
        run["differs"] = own
    path = path or folders[0] / "report.html"
    path.write_text(page(runs), encoding="utf-8")
    return path


def page(runs: Sequence[Mapping[str, Any]]) -> str:
    """The whole page about what :func:`.content.described_run` has told."""
    # "</" would end the script element; JSON allows the escaped slash.
    data = json.dumps(runs, separators=(",", ":"), allow_nan=False).replace("</", "<\\/").replace("<!--", "<\\u0021--")
    files = resources.files(__package__)
    read = {name: (files / name).read_text(encoding="utf-8") for name in ("page.html", *STYLES, *SCRIPTS)}
    text = read["page.html"].replace("{{style}}", "\n".join(read[name] for name in STYLES))
    text = text.replace("{{script}}", "\n".join(read[name] for name in SCRIPTS))
    before, _, after = text.partition("{{data}}")  # titles and data come last, in one go: they may hold braces
    title = html.escape(", ".join(run["name"] for run in runs))
    return before.replace("{{title}}", title) + data + after
