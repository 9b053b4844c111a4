"""How metrics of models are written: beside the dense model's where they are known."""

from __future__ import annotations

#: The name of the score where the user has none, and of what guides trials by default.
FIDELITY = "fidelity"


def score_text(value: float | None, dense: float | None) -> str:
    """``0.8712 (-0.0034)``: with the difference to the dense model's."""
    if value is None:
        return "-"
    return f"{value:.4f}" if dense is None else f"{value:.4f} ({value - dense:+.4f})"


def count_text(value: float | None, dense: float | None) -> str:
    """``62,744,000 (49.9%)``: with the share of the dense model's."""
    if value is None:
        return "-"
    return f"{value:,.0f}" if dense is None else f"{value:,.0f} ({value / dense:.1%})"


def milliseconds_text(value: float | None, dense: float | None) -> str:
    """``4.81 ms (55.0%)``: with the share of the dense model's."""
    if value is None:
        return "-"
    return f"{value:.3g} ms" if dense is None else f"{value:.3g} ms ({value / dense:.1%})"
