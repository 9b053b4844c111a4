"""A card that says what an exported model is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

#: Costs and scores of a card, in this order.
NUMBERS = {
    "test": "test score",
    "score": "score on the search split",
    "macs": "multiply-accumulates of one example",
    "params": "parameters",
    "latency_ms": "latency (ms)",
    "memory_bytes": "peak of the activations (bytes)",
}


def write_card(
    path: Path,
    title: str,
    run: Mapping[str, Any],
    metrics: Mapping[str, Any],
    widths: Mapping[str, int] | None,
    licence: str,
) -> None:
    """Write ``path``: what was pruned and how, numbers beside the dense model's, widths, the licence of the base.

    ``widths``: None of the dense model.
    """
    dense = run["dense"]
    rows = [
        f"| {label} | {_number(metrics[key])} | {_number(dense.get(key))} | {_share(metrics[key], dense.get(key))} |"
        for key, label in NUMBERS.items()
        if metrics.get(key) is not None
    ]
    lines = [
        f"# {title}",
        "",
        *(_dense() if widths is None else _pruned(run["space"]["search"], metrics)),
        f"- licence of the {'model' if widths is None else 'model that was pruned'}: {licence}",
        "",
        "| | this model | dense | of dense |",
        "| --- | --- | --- | --- |",
        *rows,
        "",
        *(_widths(run["space"]["groups"], widths) if widths else ()),
    ]
    path.write_text("\n".join(lines), encoding="utf-8")


def _dense() -> list[str]:
    return ["The dense model that a search of prunefront started from: nothing of it was pruned.", ""]


def _pruned(search: Mapping[str, Any], metrics: Mapping[str, Any]) -> list[str]:
    budget = ", ".join(f"{key} {value}" for key, value in search["budget"].items()) or "none"
    tuning = search.get("tuning")
    training = [f"trained in its trial ({tuning})"] if tuning else []
    training += [f"fine-tuned for {metrics['steps']:,} steps"] if "steps" in metrics else []
    return [
        "Structurally pruned with prunefront: a smaller model, without masks.",
        "",
        f"- search: mode {search['mode']}, budget {budget}",
        f"- units by {search['criterion']}, repaired by {search['compensation']}, "
        f"{', '.join(training) or 'not fine-tuned'}",
    ]


def _widths(groups: Sequence[Mapping[str, Any]], widths: Mapping[str, int]) -> list[str]:
    sizes = {group["name"]: group["size"] for group in groups}
    kept = [f"| {name} | {width} | {sizes.get(name, '')} |" for name, width in widths.items()]
    return ["| group | width | dense |", "| --- | --- | --- |", *kept, ""]


def _number(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def _share(value: Any, dense: Any) -> str:
    return f"{value / dense:.1%}" if dense else ""
