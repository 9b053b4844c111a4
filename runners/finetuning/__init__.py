"""Training pruned models back, with or without the dense model as a teacher."""

from .engine import Finetuned, finetune
from .loop import Progress
from .recipe import Distill, Domains, Recipe

__all__ = ["Distill", "Domains", "Finetuned", "Progress", "Recipe", "finetune"]
