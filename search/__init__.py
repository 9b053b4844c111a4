"""Which plan to try next: budgets, projection onto them, scoring of candidates, the search loop."""

from .budget import Limits, parse_budget
from .engine import Entry, Result, search
from .projection import project

__all__ = ["Entry", "Limits", "Result", "parse_budget", "project", "search"]
