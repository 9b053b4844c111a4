"""The console that everything is written to, so that log messages pass above a live progress bar."""

from __future__ import annotations

import logging
from pathlib import Path

from rich.console import Console
from rich.logging import RichHandler

#: Log messages pass above a live progress bar only when both are written by the same console.
console = Console()
errors = Console(stderr=True)


class ConsoleHandler(RichHandler):
    """For the logging configuration in ``conf/``."""

    def __init__(self, level: int | str = logging.NOTSET) -> None:
        super().__init__(level=level, console=console, show_path=False, show_time=False)


def show_load(folder: Path | str) -> None:
    """How a saved model is read from Python."""
    console.print(f'load    prunefront.load("{folder}")', soft_wrap=True, highlight=False)
