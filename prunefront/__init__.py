"""Find and build smaller models by structured pruning."""

# The function takes the place of the folder's name here; import the folder's parts with `from`.
from .search import Entry, Fidelity, Measurement, Result, SampleScore, Timing, load, measure, project, search
from .spaces import Cost, Frozen, Group, Member, Plan, PrunefrontError, Space, discover

__all__ = [
    "Cost",
    "Entry",
    "Fidelity",
    "Frozen",
    "Group",
    "Measurement",
    "Member",
    "Plan",
    "PrunefrontError",
    "Result",
    "SampleScore",
    "Space",
    "Timing",
    "discover",
    "load",
    "measure",
    "project",
    "search",
]
