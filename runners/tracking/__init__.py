"""Experiment trackers: told about every trial and the final front, or about every point of a fine-tuning; none of their
failures ends a run."""

from .base import Guarded, NoTracker, Tracker
from .weights_and_biases import WandbTracker

__all__ = ["Guarded", "NoTracker", "Tracker", "WandbTracker"]
