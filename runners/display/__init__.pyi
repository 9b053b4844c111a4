from .console import ConsoleHandler, console, errors, show_load
from .latency import latency_view, stairs_view
from .models import BAR, bar, finetuned_table, front_table, multirun_table, widths_table
from .space import folded_names, number_range, space_view

__all__ = [
    "BAR",
    "ConsoleHandler",
    "bar",
    "console",
    "errors",
    "finetuned_table",
    "folded_names",
    "front_table",
    "latency_view",
    "multirun_table",
    "number_range",
    "show_load",
    "space_view",
    "stairs_view",
    "widths_table",
]
