"""Find and build smaller models by structured pruning."""

# The function takes the place of the folder's name here; import the folder's parts with `from`.
from .search import Entry, Result, load, project, search
from .spaces import Cost, Frozen, Group, Member, Plan, PrunefrontError, Space, discover

__all__ = [
    "Cost",
    "Entry",
    "Frozen",
    "Group",
    "Member",
    "Plan",
    "PrunefrontError",
    "Result",
    "Space",
    "discover",
    "load",
    "project",
    "search",
]
