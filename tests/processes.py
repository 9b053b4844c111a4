"""Processes that tests start."""

from __future__ import annotations

import os
import sys


def environment(**extra: str) -> dict[str, str]:
    """For one that imports what this one does, the tests too, and knows nothing of W&B's process beside this one."""
    found = {**os.environ, "PYTHONPATH": os.pathsep.join([os.getcwd(), *sys.path]), **extra}
    found.pop("WANDB_SERVICE", None)
    return found
