"""What may be removed from a model: trace, groups, plans, candidates and their exact cost."""

from .cost import Cost
from .errors import PrunefrontError
from .groups import Frozen, Group, Member
from .plan import Plan
from .space import Space, discover

__all__ = ["Cost", "Frozen", "Group", "Member", "Plan", "PrunefrontError", "Space", "discover"]
