"""What earlier runs of the same model have scored, with whatever budget."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..spaces.errors import SearchError
from .files import SPACE, read_json
from .problem import Problem
from .sampler import Scored
from .study import COMPARABLE, changed_keys, finished, read_study


@dataclass(frozen=True)
class Earlier:
    """``scored``: all plans, None where there are none; ``best``: shares ``(dimensions,)``, one of every run."""

    scored: Scored | None = None
    best: tuple[tuple[float, ...], ...] = ()

    def starts(self, shares: tuple[float, float]) -> list[list[float]]:
        """The best proportions within the range of ``shares``."""
        return [np.clip(np.array(row) / max(row), *shares).tolist() for row in self.best]


def read_earlier(runs: Sequence[str | Path], problem: Problem, header: Mapping[str, Any]) -> Earlier:
    """The scored plans of ``runs``. ``header``: of the search that they shall inform.

    Raises:
        SearchError: a run is of another model, space or guide, so that its values say nothing here.
        StorageError: a run is missing or damaged.
    """
    found, best = [], []
    for run in map(Path, runs):
        described = read_json(run / SPACE)
        search = described.get("search", {})
        differing = [key for key in changed_keys(search, header) if key not in COMPARABLE]
        if described.get("fingerprint") != problem.space.fingerprint:
            differing.append("fingerprint")
        if differing:
            advice = (
                f"; {shlex.quote(f'start={run}/dense')} takes the model of that run" if differing == ["weights"] else ""
            )
            raise SearchError(
                f"warm_start={run}: its values cannot be compared: it differs in {', '.join(differing)}{advice}"
            )
        trials = finished(read_study(run))
        if trials:
            scored = Scored.of(problem, trials)
            found.append(scored)
            # Of the quarter of its plans that cost most nearly what this budget allows, the best.
            far = np.abs(problem.projector().excess(scored.widths))
            near = np.argsort(far, kind="stable")[: max(1, len(scored) // 4)]
            chosen = near[np.argmax(scored.values[near])]
            best.append(tuple((scored.widths[chosen] / problem.space.sizes).tolist()))
    scored_all = found[0] if found else None
    for more in found[1:]:
        scored_all = more if scored_all is None else scored_all + more
    return Earlier(scored_all, tuple(best))
