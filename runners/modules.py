"""The user's own modules."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterable
from pathlib import Path

from ..spaces.errors import ConfigError


def look_in_current_folder() -> None:
    """As ``python -m`` does."""
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))


def import_modules(names: Iterable[str]) -> None:
    """So that saved models find the classes that are defined there. Raises ConfigError."""
    look_in_current_folder()
    for name in names:
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise ConfigError(f"modules: cannot import {name}: {error}") from error
