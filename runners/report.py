"""``report.html``: one page that opens with no network."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
from plotly.offline import get_plotlyjs

from ..search.saved import METRICS, RESULT, read_json, read_plan
from ..search.study import finished, read_study
from ..spaces.errors import StorageError
from .figures import LABELS, front_figure, history_figure, scored_trials, widths_figure

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1200px; margin: 2rem auto; padding: 0 1rem; color: #111827 }
h1, h2 { font-weight: 600; margin: 2rem 0 .5rem } p.note { color: #4b5563 }
table { border-collapse: collapse; font-variant-numeric: tabular-nums }
th, td { padding: .25rem .9rem; text-align: right; white-space: nowrap; border-bottom: 1px solid #e5e7eb }
th:first-child, td:first-child { text-align: left } tr.picked { font-weight: 600; color: #b91c1c }
"""
#: Columns of the table of models.
COLUMNS = {"score": "score (search)", "test": "score (test)"} | LABELS
COLUMNS |= {"latency_low_ms": "from", "latency_high_ms": "to (95 %)", "latency_predicted_ms": "predicted"}


def read_run(run_dir: Path) -> dict[str, Any]:
    """What a finished search has left: result.json, with ``dense`` (its metrics as far as known) and ``space``.

    Raises:
        StorageError: this is no finished run, or it is damaged.
    """
    if not (run_dir / "space.json").exists():
        raise StorageError(f"{run_dir} is no run of a search: it has no space.json")
    if not (run_dir / RESULT).exists():
        raise StorageError(f"{run_dir} is no finished run: it has no {RESULT}; finish it with resume={run_dir}")
    result, space = read_json(run_dir / RESULT), read_json(run_dir / "space.json")
    dense = dict(space.get("dense_cost", {}))
    if (run_dir / "dense" / METRICS).exists():
        dense |= read_json(run_dir / "dense" / METRICS)
    if "dense_latency_ms" in result:
        dense["latency_ms"] = result["dense_latency_ms"]
    names = [entry.get("name") for entry in result.get("front", [])]
    if result.get("picked") not in names or result.get("objective") not in dense:
        raise StorageError(f"{run_dir / RESULT} is damaged: it does not describe a front")
    return {**result, "dense": dense, "space": space}


def write_report(run_dir: Path) -> Path:
    """Write ``report.html`` from what the run has left, and return its path.

    Raises:
        StorageError: see :func:`read_run`.
    """
    run, study = read_run(run_dir), read_study(run_dir)
    trials = finished(study)
    widths = {entry["name"]: read_plan(run_dir / "front" / entry["name"])["widths"] for entry in run["front"]}
    figures = {
        "Front": front_figure(
            scored_trials(study, run["objective"]), run["front"], run["picked"], run["dense"], run["objective"]
        ),
        "History": history_figure(study, run["dense"].get("score")),
        "Widths": widths_figure(run["space"]["groups"], widths, run["picked"]),
    }
    path = run_dir / "report.html"
    path.write_text(_page(run_dir.name, run, len(trials), figures), encoding="utf-8")
    return path


def _page(name: str, run: Mapping[str, Any], n_trials: int, figures: Mapping[str, go.Figure]) -> str:
    search = run["space"]["search"]
    budget = ", ".join(f"{key} {value}" for key, value in search["budget"].items()) or "none"
    repair = f"criterion {search['criterion']}, compensation {search['compensation']}"
    facts = f"mode {search['mode']}, budget {budget}, {n_trials} trials, {repair}"
    sections = [f"<h2>{title}</h2>{_plot(figure)}" for title, figure in figures.items()]
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>prunefront: {html.escape(name)}</title>
<style>{STYLE}</style><script>{get_plotlyjs()}</script></head><body>
<h1>{html.escape(name)}</h1><p class="note">{html.escape(facts)}</p>
{_models(run["front"], run["picked"], run["dense"])}
<p class="note">Shares are of the dense model. The test split was used for these models only.</p>
{"".join(sections)}
<h2>Time</h2>{_times(run["seconds"])}
</body></html>
"""


def _plot(figure: go.Figure) -> str:
    return str(figure.to_html(full_html=False, include_plotlyjs=False, config={"displaylogo": False}))


def _models(front: Sequence[Mapping[str, Any]], picked: str, dense: Mapping[str, Any]) -> str:
    known = [key for key in COLUMNS if any(key in entry for entry in front)]
    rows = [_row("dense", dense, dense, known)]
    rows += [_row(entry["name"], entry, dense, known, entry["name"] == picked) for entry in front]
    head = "".join(f"<th>{COLUMNS[key]}</th>" for key in known)
    return f"<table><tr><th>model</th>{head}</tr>{''.join(rows)}</table>"


def _row(name: str, metrics: Mapping[str, Any], dense: Mapping[str, Any], keys: list[str], picked: bool = False) -> str:
    cells = "".join(f"<td>{_cell(key, metrics.get(key), dense.get(key))}</td>" for key in keys)
    label = f"{html.escape(name)} (picked)" if picked else html.escape(name)
    return f"<tr{' class=picked' if picked else ''}><td>{label}</td>{cells}</tr>"


def _cell(key: str, value: float | None, dense: float | None) -> str:
    if value is None:
        return "-"
    if key in ("score", "test"):
        return f"{value:.4f}"
    if key.endswith("_ms"):
        return f"{value:.3g} ms" if not dense else f"{value:.3g} ms ({value / dense:.1%})"
    return f"{value:,.0f}" if not dense else f"{value:,.0f} ({value / dense:.1%})"


def _times(seconds: Mapping[str, float]) -> str:
    total = sum(seconds.values()) or 1.0
    rows = [f"<tr><td>{html.escape(k)}</td><td>{v:.1f} s</td><td>{v / total:.1%}</td></tr>" for k, v in seconds.items()]
    return f"<table><tr><th>part</th><th>time</th><th>share</th></tr>{''.join(rows)}</table>"
