"""Training pruned models back, with or without the dense model as a teacher."""

from .engine import Finetuned, finetune
from .loop import Progress
from .recipe import Distill, Recipe

__all__ = ["Distill", "Finetuned", "Progress", "Recipe", "finetune"]
