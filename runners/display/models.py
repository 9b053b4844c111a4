"""Tables of models: a front, fine-tuned models, the picks of several runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from ...search.files import DENSE, TUNED
from ...search.formats import FIDELITY, count_text, difference_text, milliseconds_text, score_text


def finetuned_table(
    found: Mapping[str, Mapping[str, Any]], dense: Mapping[str, float], score_name: str = "score"
) -> Table:
    """``found``: metrics of fine-tuned models by name; those from before stand with ``_before``."""
    table = Table(caption=f"{score_name} after fine-tuning, what that gained, how far it is from dense; share of MACs")
    for heading in ("model", "search, gained", "test, gained", "to dense", "MACs", "steps"):
        table.add_column(heading, justify="left" if heading == "model" else "right", no_wrap=heading == "model")
    for name, metrics in found.items():
        split = "test" if "test" in metrics else "score"
        share = f"{metrics['macs'] / dense['macs']:.1%}" if "macs" in metrics and "macs" in dense else "-"
        gains = [_gain(metrics.get(key), metrics.get(f"{key}_before")) for key in ("score", "test")]
        scores = [
            f"{score_text(metrics.get(key), None)} {gain}" for key, gain in zip(("score", "test"), gains, strict=True)
        ]
        table.add_row(name, *scores, _gain(metrics.get(split), dense.get(split)), share, f"{metrics['steps']:,}")
    return table


def front_table(
    entries: Sequence[Mapping[str, Any]],
    picked: str | None,
    dense: Mapping[str, float],
    score_name: str = "score",
    picked_by: str = "",
) -> Table:
    """``entries``: name and metrics of each model; ``dense``: those of the dense model, where known.

    What was fine-tuned (``trial0012+sgd``) stands below what it was trained from. ``picked_by`` says how ``picked`` was
    chosen.
    """
    notes = ["shares are of the dense model; the test split was used for these models only"]
    if picked is not None and picked_by:
        notes.append(f"picked: {picked_by}")
    if score_name == FIDELITY:
        notes.append("fidelity: minus the divergence from the dense outputs, 0 is the same")
    table = Table(caption="\n".join(notes))
    table.add_column("model", no_wrap=True)
    kinds = dict(_KINDS)
    if any("latency_ratio" in entry for entry in entries):
        kinds["latency_ms"] = ("latency", milliseconds_text)
    for heading, _ in kinds.values():
        table.add_column(heading.format(score=score_name), justify="right")

    def _cells(metrics: Mapping[str, Any], dense: Mapping[str, Any]) -> list[str]:
        return [kind(metrics.get(key), dense.get(key)) for key, (_, kind) in kinds.items()]

    table.add_row("dense", *_cells(dense, {}), end_section=True)
    for entry in _below_their_own(entries):
        if entry["name"] == picked:
            table.add_row(f"picked ({picked})", *_cells(entry, dense), style="bold green")
        elif entry["name"] != DENSE:
            table.add_row(entry["name"], *_cells(entry, dense))
    return table


def _below_their_own(entries: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Fine-tuned models after what they were trained from, or at the end where that is not among ``entries``."""
    trials = [entry["name"].partition(TUNED)[0] for entry in entries]
    places = {trial: place for place, trial in reversed(list(enumerate(trials)))}
    return [entry for _, entry in sorted(zip(trials, entries, strict=True), key=lambda pair: places[pair[0]])]


def widths_table(groups: Sequence[Mapping[str, Any]]) -> Table:
    """``groups`` in the order of the forward: name, kind, size, and the width that is kept."""
    table = Table(caption="in the order of the forward; a bar is the share that is kept")
    for heading, side in (("group", "left"), ("kind", "left"), ("dense", "right"), ("kept", "right"), ("", "left")):
        table.add_column(heading, justify=side, width=BAR if not heading else None)  # type: ignore[arg-type]
    for group in groups:
        share = group["width"] / group["size"]
        table.add_row(group["name"], group["kind"], f"{group['size']:,}", f"{group['width']:,}", bar(share))
    return table


def multirun_table(
    rows: Sequence[Mapping[str, Any]], overrides: Sequence[str], best: str, score_name: str = "score"
) -> Table:
    """``rows``: name and metrics of the pick of each ``run``, with those of its ``dense`` model."""
    table = Table(caption="shares are of the dense model of each run; the best score is marked")
    table.add_column("run")
    table.add_column("overrides", no_wrap=len(max(overrides, key=len)) <= MOST_OVERRIDES)
    shown = {key: kind for key, kind in _KINDS.items() if key != "params" and any(key in row for row in rows)}
    if any("latency_ratio" in row for row in rows):
        shown["latency_ms"] = ("latency", milliseconds_text)
    for heading, _ in shown.values():
        table.add_column(heading.format(score=score_name), justify="right")
    for row, text in zip(rows, overrides, strict=True):
        cells = [kind(row.get(key), row["dense"].get(key)) for key, (_, kind) in shown.items()]
        table.add_row(Path(row["run"]).name, text, *cells, style="bold green" if row["run"] == best else None)
    return table


#: Characters of a full bar, and of overrides that have a line of their own.
BAR, MOST_OVERRIDES = 20, 32


def bar(share: float) -> str:
    return "█" * round(BAR * share)


def _gain(value: float | None, reference: float | None) -> str:
    return "" if value is None or reference is None else difference_text(value, reference)


#: Columns of the table of models: headings, and how values are written.
_KINDS: dict[str, tuple[str, Callable[[float | None, float | None], str]]] = {
    "score": ("{score} (search)", score_text),
    "test": ("{score} (test)", score_text),
    "macs": ("MACs", count_text),
    "params": ("params", count_text),
}
