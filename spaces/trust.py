"""Whose Python modules may be imported because a file names them. No torch here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

#: Packages whose modules may be.
TRUSTED = ("prunefront", "timm", "torch", "torchvision", "transformers")
#: The module of a script that is run, or a notebook.
SCRIPT = "__main__"


def is_trusted(module: str) -> bool:
    return module.partition(".")[0] in TRUSTED and not module.endswith(SCRIPT)


def own_modules(structure: Mapping[str, Any]) -> list[str]:
    """Modules that a saved model's classes are from and that its user imports, from :func:`.rebuild.describe`."""
    named = {entry["class"].partition(":")[0] for entry in structure["modules"]}
    return sorted(module for module in named if not is_trusted(module) and module != SCRIPT)
