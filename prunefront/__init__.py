"""Find and build smaller models by structured pruning."""

from .search import project
from .spaces import Cost, Frozen, Group, Member, Plan, PrunefrontError, Space, discover

__all__ = ["Cost", "Frozen", "Group", "Member", "Plan", "PrunefrontError", "Space", "discover", "project"]
