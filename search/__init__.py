"""Which plan to try: budgets, and the projection of proposals onto them."""

from .budget import Limits, parse_budget
from .engine import Entry, Result, search
from .projection import project

__all__ = ["Entry", "Limits", "Result", "parse_budget", "project", "search"]
