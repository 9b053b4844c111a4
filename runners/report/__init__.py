"""``report.html``: one page about one or several runs that opens with no network."""

from .page import write_report
from .runs import differing_overrides, own_overrides, read_run

__all__ = ["differing_overrides", "own_overrides", "read_run", "write_report"]
