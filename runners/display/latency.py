"""The latency model of a target, and its steps."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from rich.console import Group as Lines
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from ...search.latency import Failed, LatencyModel
from ...search.stairs import LEAST_WIDTHS, PERIODS, Stairs, override


def latency_view(model: LatencyModel, target: Mapping[str, Any]) -> RenderableType:
    """Measured plans beside what is predicted for them, and how far predictions are off in cross-validation."""
    widths = np.array([measured.widths for measured in model.measured])
    predicted, macs = model.ratios(widths), model.space.cost_batch(widths)[:, 0] / model.space.dense_cost.macs
    table = Table(title="measured plans, slowest first; shares are of the dense model")
    for name in ("MACs", "latency", "predicted", "off by"):
        table.add_column(name, justify="right")
    for row in sorted(range(len(widths)), key=lambda index: -model.measured[index].ratio):
        ratio = model.measured[row].ratio
        table.add_row(f"{macs[row]:.1%}", f"{ratio:.1%}", f"{predicted[row]:.1%}", f"{predicted[row] / ratio - 1:+.1%}")
    facts = ", ".join(f"{key} {value}" for key, value in target.items() if value is not None)
    ahead = "" if model.error_ahead is None else f", by {model.error_ahead:.1%} for plans not measured yet"
    summary = _failures(model.known.failed) + (
        f"{facts}\ndense model {model.dense_ms:.3g} ms; predictions are off by {model.error:.1%} on average in "
        f"cross-validation{ahead}, Kendall's tau {model.tau:.2f}, from {len(widths)} plans"
    )
    return Lines(table, Text(summary))


def _failures(failed: Sequence[Failed]) -> str:
    """A line for each reason; empty where nothing failed."""
    reasons = Counter(plan.reason for plan in failed)
    lines = [f"{count} more cannot be measured: {reason}\n" for reason, count in reasons.most_common()]
    return "".join(lines) + ("refresh=true tries them again\n" if failed else "")


#: Lines of a chart of latency against width.
CHART_LINES = 6


def stairs_view(found: Sequence[Stairs], target: Mapping[str, Any]) -> RenderableType:
    """Latency against width, how well steps of any period explain it, and what to search with."""
    if not found:
        return Text(f"no group of this space has {LEAST_WIDTHS} widths: there are no steps to be seen")
    table = Table(title="error of held-out times, in % of the dense model, with steps of so many units")
    table.add_column("kind", no_wrap=True)
    table.add_column("group", overflow="fold")
    for name in ("none", *map(str, PERIODS[1:]), "round_to"):
        table.add_column(name, justify="right", no_wrap=True)
    for stairs in found:
        errors = [f"{100 * stairs.errors[period]:.2f}" for period in PERIODS]
        table.add_row(stairs.kind, stairs.dimension, *errors, str(stairs.round_to))
    charts = [Text(f"\nlatency of {stairs.dimension} against its width\n{_chart(stairs)}") for stairs in found]
    facts = ", ".join(f"{key} {value}" for key, value in target.items() if value is not None)
    return Lines(table, *charts, Text(f"\n{facts}\nsearch with: '{override(found)}'"))


def _chart(stairs: Stairs) -> str:
    """A column a width, in eighths of a line."""
    low, high = min(stairs.ratios), max(stairs.ratios)
    heights = [round((ratio - low) / max(high - low, 1e-9) * 8 * CHART_LINES) for ratio in stairs.ratios]
    lines = []
    for line in reversed(range(CHART_LINES)):
        label = {CHART_LINES - 1: f"{high:.1%}", 0: f"{low:.1%}"}.get(line, "")
        columns = "".join(" ▁▂▃▄▅▆▇█"[min(max(height - 8 * line, 0), 8)] for height in heights)
        lines.append(f"{label:>7} {columns}".rstrip())
    first, last = str(stairs.widths[0]), str(stairs.widths[-1])
    return "\n".join([*lines, f"{'':7} {first}{last:>{max(len(heights) - len(first), 1)}}"])
