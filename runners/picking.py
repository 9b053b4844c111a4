"""Which models of a run are meant: its pick, names, or the best within a budget."""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, ListConfig

from ..search.budget import LATENCY, parse_budget
from ..search.files import DENSE, model_meant
from ..spaces import Cost
from ..spaces.errors import ConfigError, SearchError
from .overrides import key_of, quoted
from .runs import dense_cost, own_overrides

#: Options of a search that another search of the same model repeats.
_OF_THE_MODEL = ("task", "space", "target", "tracker")

Entry = Mapping[str, Any]


def picks(run: Mapping[str, Any], pick: DictConfig, entries: Sequence[Entry]) -> list[str]:
    """Names of those of ``entries`` that ``pick`` asks for: by default the picked model of ``run``, or what was
    fine-tuned of it, whichever has the higher score.

    Raises:
        ConfigError: names that there are none of, or names and a budget.
        SearchError: none holds the budget.
    """
    budget = given_limits(pick)
    if pick.names is None:
        return [picked(run, budget, entries)["name"]]
    if budget:
        raise ConfigError("pick takes names or a budget, not both")
    known = [entry["name"] for entry in entries]
    given = list(pick.names) if isinstance(pick.names, ListConfig) else [pick.names]
    names = known if given == ["all"] else list(map(str, given))
    if unknown := [name for name in names if name not in (*known, DENSE)]:
        raise ConfigError(f"pick: the run has no {', '.join(unknown)}; it has {', '.join([*known, DENSE])}")
    return names


def picked(run: Mapping[str, Any], budget: Mapping[str, str], entries: Sequence[Entry]) -> Entry:
    """The best within the budget, that of the run where ``budget`` is none; without any the run's pick, or what was
    fine-tuned of it. Raises SearchError."""
    if budget:
        return best(within(run, budget, entries))
    return model_meant(run["picked"], entries, bool(run["space"]["search"].get("budget")))


def given_limits(pick: DictConfig) -> dict[str, str]:
    """The budget in ``pick``."""
    return {str(key): value for key, value in pick.items() if key != "names" and value is not None}


def best(entries: Sequence[Entry]) -> Entry:
    """Of the highest score on the search data; of equals the first."""
    return max(entries, key=lambda entry: entry.get("score", -math.inf))


def within(run: Mapping[str, Any], budget: Mapping[str, str], entries: Sequence[Entry]) -> list[Entry]:
    """Those of ``entries`` that hold the budget. Raises SearchError if there is none."""
    dense = run["dense"]
    asked = [f"budget.{key}={value}" for key, value in budget.items()]
    if LATENCY in budget and not any("latency_ms" in entry for entry in entries):
        hint = "" if _has_target(run["path"]) else " target=onnxruntime"
        raise SearchError(
            f"no latency was measured for {run['path']}; search for one: {_search(run['path'], asked)}{hint}"
        )
    limits = parse_budget(budget, dense_cost(dense), dense_ms=dense.get("latency_ms"))

    def holds(entry: Entry) -> bool:
        costs = [entry[key] for key in Cost.__dataclass_fields__]
        return limits.holds([*costs, entry.get("latency_ratio_high", math.inf)])

    found = [entry for entry in entries if holds(entry)]
    if not found:
        raise SearchError(f"no model of {run['path']} holds the budget; search for one: {_search(run['path'], asked)}")
    return found


def _search(run_dir: str, budget: Sequence[str]) -> str:
    """How to search for the budget with what the run has learnt; runs of the Python API have no options to repeat."""
    kept = [text for text in own_overrides(Path(run_dir)) if key_of(text).partition(".")[0] in _OF_THE_MODEL]
    task = shlex.join(text.lstrip("+") for text in kept) or "task=..."
    return f"prunefront search {task} {shlex.join([*budget, f'warm_start=[{quoted(run_dir)}]'])}"


def _has_target(run_dir: str) -> bool:
    return any(key_of(text) == "target" for text in own_overrides(Path(run_dir)))
