"""Tasks: a model with its data and its score."""

from .base import Task

__all__ = ["Task"]
