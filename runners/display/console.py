"""The console that everything is written to, so that log messages pass above a live progress bar."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.logging import RichHandler

from ...search.files import read_plan, resolve
from ...spaces.trust import own_modules

#: Columns where no terminal tells its own: in the log of a cluster, or a file.
WIDTH = 160


def _console(stderr: bool = False) -> Console:
    # What is printed are paths, names and options of the user: brackets and colons in them mean themselves.
    made = Console(stderr=stderr, markup=False, highlight=False, emoji=False)
    if not made.is_terminal and "COLUMNS" not in os.environ:
        made.width = WIDTH
    return made


#: Log messages pass above a live progress bar only when both are written by the same console.
console = _console()
errors = _console(stderr=True)


class ConsoleHandler(RichHandler):
    """For the logging configuration in ``conf/``."""

    def __init__(self, level: int | str = logging.NOTSET) -> None:
        super().__init__(level=level, console=console, show_path=False, show_time=False)


def show_load(folder: Path | str) -> None:
    """How a saved model is read from Python, and what has to be at hand for it."""
    plan = read_plan(resolve(Path(folder)))
    console.print(f"load    {load_line(folder, plan)}", soft_wrap=True)


def load_line(folder: Path | str, plan: Mapping[str, Any]) -> str:
    """Python that reads the saved model in ``folder``, whose ``plan.json`` is ``plan``."""
    modules = own_modules(plan["structure"])
    first = f"import {', '.join(modules)}; " if modules else ""
    dense = ", model=dense_model" if plan["needs_dense_model"] else ""
    path = str(folder)
    is_plain = path.isprintable() and not set(path) & {'"', "\\"}
    text = f'"{path}"' if is_plain else repr(path)
    return f"{first}prunefront.load({text}{dense})"
