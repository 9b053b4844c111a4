from .errors import PrunefrontError
from .groups import Frozen, Group, Member
from .plan import Cost, Plan
from .space import Space, discover

__all__ = ["Cost", "Frozen", "Group", "Member", "Plan", "PrunefrontError", "Space", "discover"]
