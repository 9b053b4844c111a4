from .budget import Limits, parse_budget
from .engine import search
from .measurement import Measurement, measure
from .projection import project
from .result import Entry, Result
from .saved import load
from .scores import Fidelity, SampleScore
from .timing import Timing

__all__ = [
    "Entry",
    "Fidelity",
    "Limits",
    "Measurement",
    "Result",
    "SampleScore",
    "Timing",
    "load",
    "measure",
    "parse_budget",
    "project",
    "search",
]
