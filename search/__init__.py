"""Which plan to try next: budgets, projection onto them, scoring of candidates, the search loop."""

from .budget import Limits, parse_budget
from .engine import search
from .projection import project
from .result import Entry, Result
from .saved import load

__all__ = ["Entry", "Limits", "Result", "load", "parse_budget", "project", "search"]
