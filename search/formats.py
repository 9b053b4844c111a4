"""How metrics of models are written: beside the dense model's where they are known."""

from __future__ import annotations

#: The name of the score where the user has none, and of what guides trials by default.
FIDELITY = "fidelity"


def score_text(value: float | None, dense: float | None) -> str:
    """``0.8712 (-0.0034)``: with the difference to the dense model's."""
    if value is None:
        return "-"
    return number_text(value) if dense is None else f"{number_text(value)} ({difference_text(value, dense)})"


def difference_text(value: float, reference: float) -> str:
    """``-0.0034``; differences that come of rounding alone are none."""
    difference = value - reference
    is_none = abs(difference) <= 1e-9 * max(abs(value), abs(reference))
    return number_text(0.0 if is_none else difference, "+")


def number_text(value: float, sign: str = "") -> str:
    """Four digits behind the point, or four significant ones where these would all be zeros or would not fit.

    ``sign``: ``+`` shows that of positive numbers too.
    """
    is_plain = value == 0 or 1e-3 <= abs(value) < 1e5
    return format(value + 0.0, f"{sign}.4f" if is_plain else f"{sign}.4g")


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
