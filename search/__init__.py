"""Which plan to try: budgets, and the projection of proposals onto them."""

from .budget import Limits, parse_budget
from .projection import project

__all__ = ["Limits", "parse_budget", "project"]
