"""Plotly figures of a search, for trackers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import optuna
import plotly.graph_objects as go

from ..search.study import finished

GREY, BLUE, RED, DARK = "#b8bec7", "#2563eb", "#dc2626", "#111827"
#: The metric of trials that are guided by the score itself.
SCORE = "score"
LABELS = {
    "macs": "MACs",
    "params": "parameters",
    "memory_bytes": "activation memory (bytes)",
    "size_bytes": "size (bytes)",
    "latency_ms": "latency (ms)",
}


def front_figure(
    trials: Sequence[tuple[float, float]],
    front: Sequence[Mapping[str, Any]],
    picked: str,
    dense: Mapping[str, float],
    objective: str,
) -> go.Figure:
    """Score against cost. ``trials``: (score, cost) of each, where known; ``dense``: metrics, costs at least."""
    whole = dense[objective]
    figure = _figure(f"{LABELS[objective]} (share of the dense model)", "score on the search split")
    scores, costs = [score for score, _ in trials], [cost / whole for _, cost in trials]
    if trials:
        figure.add_scatter(x=costs, y=scores, mode="markers", name="trials", marker={"color": GREY, "size": 6})
    figure.add_scatter(
        x=[entry[objective] / whole for entry in front],
        y=[entry["score"] for entry in front],
        text=[entry["name"] for entry in front],
        mode="lines+markers",
        name="front",
        line={"shape": "hv", "color": BLUE},
        marker={"size": 9},
    )
    chosen = next(entry for entry in front if entry["name"] == picked)
    marker = {"color": RED, "size": 14, "symbol": "circle-open", "line": {"width": 3}}
    figure.add_scatter(
        x=[chosen[objective] / whole], y=[chosen["score"]], text=[picked], mode="markers", name="picked", marker=marker
    )
    if "score" in dense:
        star = {"color": DARK, "size": 13, "symbol": "star"}
        figure.add_scatter(x=[1], y=[dense["score"]], mode="markers", name="dense", marker=star)
    figure.update_xaxes(tickformat=".0%")
    return figure


def scored_trials(study: optuna.Study, objective: str) -> list[tuple[float, float]]:
    """Score and cost of every trial; none where trials were guided by something else than the score."""
    if (study.metric_names or [SCORE])[0] != SCORE:
        return []
    return [(t.values[0], t.user_attrs["costs"][objective]) for t in finished(study)]


def _figure(x: str, y: str) -> go.Figure:
    figure = go.Figure()
    margin = {"l": 60, "r": 20, "t": 30, "b": 50}
    figure.update_layout(template="plotly_white", xaxis_title=x, yaxis_title=y, height=460, margin=margin)
    return figure
