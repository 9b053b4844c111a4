"""Plotly figures for trackers: the front, and all trials as lines over their groups."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import plotly.graph_objects as go

from ...search.front import non_dominated

GREY, BLUE, RED, DARK = "#b8bec7", "#2563eb", "#dc2626", "#111827"
LABELS = {
    "macs": "MACs",
    "params": "parameters",
    "memory_bytes": "activation memory (bytes)",
    "size_bytes": "size (bytes)",
    "latency_ms": "latency (ms)",
}
#: Lines of parallel coordinates: more hide each other.
MOST_LINES = 200


def front_figure(
    trials: Sequence[tuple[float, float, str]],
    front: Sequence[tuple[float, float, str]],
    picked: str | None,
    dense: tuple[float, float | None],
    cost: str,
    value: str,
) -> go.Figure:
    """Value against cost.

    ``trials`` and ``front``: (cost, value, name) of each, costs in their own unit; ``dense``: cost and value, where it
    has one; ``cost``: the cost's key; ``value``: what is maximised.
    """
    whole, dense_value = dense
    figure = go.Figure()
    for points, options in (
        (trials, {"mode": "markers", "name": "trials", "marker": {"color": GREY, "size": 6}}),
        (
            sorted(front),
            {"mode": "lines+markers", "name": "front", "line": {"shape": "hv", "color": BLUE}, "marker": {"size": 9}},
        ),
        (
            [point for point in front if point[2] == picked],
            {
                "mode": "markers",
                "name": "picked",
                "marker": {"color": RED, "size": 14, "symbol": "circle-open", "line": {"width": 3}},
            },
        ),
        (
            [] if dense_value is None else [(whole, dense_value, "dense")],
            {"mode": "markers", "name": "dense", "marker": {"color": DARK, "size": 13, "symbol": "star"}},
        ),
    ):
        if points:
            costs, values, names = zip(*points, strict=True)
            figure.add_scatter(x=[number / whole for number in costs], y=values, text=names, **options)
    figure.update_layout(
        template="plotly_white",
        xaxis={"title": f"{LABELS[cost]} (share of the dense model)", "tickformat": ".0%"},
        yaxis={"title": value},
        height=460,
    )
    return figure


def front_of(trials: Sequence[tuple[float, float, str]]) -> list[tuple[float, float, str]]:
    """Those of ``trials`` that no other beats in both."""
    kept = non_dominated([value for _, value, _ in trials], [cost for cost, _, _ in trials])
    return [trials[i] for i in kept]


def coordinates_figure(
    rows: Sequence[Mapping[str, Any]], sizes: Mapping[str, int], value: str, most: int = MOST_LINES
) -> go.Figure:
    """Parallel coordinates: the share kept of every group, and the value; the best trials only.

    ``rows``: ``value`` and ``widths`` by group of each trial; ``sizes``: dense width by group.
    """
    best = sorted(rows, key=lambda row: row["value"])[-most:]
    values = [row["value"] for row in best]
    axes = [
        {"label": name, "range": [0, 1], "values": [row["widths"][name] / size for row in best]}
        for name, size in sizes.items()
    ]
    figure = go.Figure(
        go.Parcoords(
            line={"color": values, "colorscale": "Blues", "showscale": True},
            dimensions=[*axes, {"label": value, "values": values}],
        )
    )
    figure.update_layout(height=460)
    return figure
