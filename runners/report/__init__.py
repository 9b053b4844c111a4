"""``report.html``: one page about one or several runs that opens with no network."""

from .page import write_report

__all__ = ["write_report"]
