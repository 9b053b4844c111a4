"""What the command line shows: progress, tables, log messages, all on one console."""

from .console import ConsoleHandler, console, errors
from .latency import latency_view, stairs_view
from .models import BAR, bar, finetuned_table, front_table, multirun_table
from .progress import SearchProgress, TrainingProgress
from .space import folded_names, number_range, space_view

__all__ = [
    "BAR",
    "ConsoleHandler",
    "SearchProgress",
    "TrainingProgress",
    "bar",
    "console",
    "errors",
    "finetuned_table",
    "folded_names",
    "front_table",
    "latency_view",
    "multirun_table",
    "number_range",
    "space_view",
    "stairs_view",
]
