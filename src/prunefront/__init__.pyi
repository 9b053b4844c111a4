from .runners.finetuning import Distill, Domains, Finetuned, Recipe, finetune
from .search import Entry, Fidelity, Measurement, Result, SampleScore, Timing, load, measure, project, search
from .spaces import Cost, Frozen, Group, Member, Plan, PrunefrontError, Space, discover

__all__ = [
    "Cost",
    "Distill",
    "Domains",
    "Entry",
    "Fidelity",
    "Finetuned",
    "Frozen",
    "Group",
    "Measurement",
    "Member",
    "Plan",
    "PrunefrontError",
    "Recipe",
    "Result",
    "SampleScore",
    "Space",
    "Timing",
    "discover",
    "finetune",
    "load",
    "measure",
    "project",
    "search",
]
