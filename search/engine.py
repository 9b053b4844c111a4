"""The search loop: ask, project onto the budget, build, recalibrate, score, tell."""

from __future__ import annotations

import datetime
import hashlib
import logging
import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import torch
from optuna.trial import TrialState
from torch import nn

from ..spaces import Plan, Space, discover
from ..spaces.errors import ConfigError, SearchError, StorageError
from .budget import Limits, check_reachable, parse_budget
from .calibrate import check_calibration, recalibrate
from .projection import project_widths
from .study import make_sampler, open_study

logger = logging.getLogger(__name__)

#: The search stops when this many first trials fail without one that succeeds.
MAX_FAILURES = 5
#: Proposals are relative keep shares in this range; only their proportions matter, since they are projected.
SHARES = (0.1, 1.0)


@dataclass(frozen=True)
class Entry:
    """One scored plan. ``metrics``: score, macs, params, memory_bytes, size_bytes, and test where it was measured."""

    plan: Plan
    metrics: Mapping[str, float]
    build: Callable[[], nn.Module] = field(repr=False, compare=False)

    def model(self) -> nn.Module:
        """Build the pruned model, recalibrated."""
        return self.build()


@dataclass(frozen=True)
class Result:
    """What a search found. ``front``: the non-dominated entries of score against macs, cheapest first."""

    best: Entry
    front: tuple[Entry, ...]
    study: optuna.Study
    space: Space
    run_dir: Path
    #: Seconds by part: ask, project, build, recalibrate, score, tell.
    seconds: Mapping[str, float]


def search(
    model: nn.Module,
    example_inputs: Any,
    *,
    score: Callable[[nn.Module], float],
    budget: Mapping[str, str | float],
    calibration: Iterable[Any] | None = None,
    test: Callable[[nn.Module], float] | None = None,
    n_trials: int = 100,
    timeout_s: float | None = None,
    sampler: str = "auto",
    seed: int = 0,
    run_dir: str | Path | None = None,
    importance: str = "l1",
    round_to: int = 1,
) -> Result:
    """Find the best pruned model within ``budget``.

    ``score`` gets a candidate in evaluation mode and returns a number, higher is better, on data that is neither
    training nor test data; ``test`` is called for the front only. ``calibration`` is read once a candidate:
    batches of training data, to recalibrate BatchNorm. An existing ``run_dir`` of the same model and search is
    continued until it has ``n_trials`` finished trials. Ctrl-C ends the search with what was found.

    Raises:
        BudgetError, CalibrationError, TraceError, EmptySpaceError, ConfigError: see their messages; all before the
            first trial.
        SearchError: the run directory belongs to another model, or no trial succeeded.
    """
    if n_trials < 1:
        raise ConfigError(f"n_trials must be at least 1, not {n_trials}")
    space = discover(model, example_inputs, importance=importance, round_to=round_to, seed=seed)
    limits = parse_budget(budget, space.dense_cost)
    check_reachable(space, limits)
    check_calibration(model, calibration)
    arguments = len(example_inputs) if isinstance(example_inputs, tuple) else 1
    directory = Path(run_dir or f"runs/{datetime.datetime.now():%Y-%m-%d-%H%M%S}")
    header: dict[str, Any] = {
        "budget": {key: str(value) for key, value in budget.items()},
        "importance": importance,
        "seed": seed,
    }
    header["weights"] = weights_digest(model)
    chosen = make_sampler(sampler, n_trials, len(space.groups), seed)
    study = open_study(directory, space, {**header, "round_to": round_to}, chosen)
    run = _Run(space, limits, study, score, calibration, arguments)
    try:
        run.trials(n_trials, timeout_s)
    except OSError as error:
        raise StorageError(
            f"cannot write to {directory}: {error}. Finished trials are safe; "
            f"make room and search again with run_dir={directory}"
        ) from error
    return run.result(directory, test)


class _Run:
    def __init__(
        self,
        space: Space,
        limits: Limits,
        study: optuna.Study,
        score: Callable[[nn.Module], float],
        calibration: Iterable[Any] | None,
        arguments: int,
    ) -> None:
        self.space, self.limits, self.study, self.score = space, limits, study, score
        self.calibration, self.arguments = calibration, arguments
        self.seconds: dict[str, float] = defaultdict(float)
        self.names = [group.name for group in space.groups]
        self.known: dict[str, float] = {
            t.user_attrs["plan"]["fingerprint"]: float(t.value or 0) for t in self.finished()
        }
        self.reason = ""

    def finished(self) -> list[optuna.trial.FrozenTrial]:
        return self.study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))

    def trials(self, n_trials: int, timeout_s: float | None) -> None:
        deadline = math.inf if timeout_s is None else time.monotonic() + timeout_s
        if not self.study.get_trials(deepcopy=False):
            self.study.enqueue_trial(dict.fromkeys(self.names, SHARES[1]))  # the uniform plan
        done = sum(t.state.is_finished() for t in self.study.get_trials(deepcopy=False))
        failures = 0
        try:
            while done < n_trials and time.monotonic() < deadline:
                failures = 0 if self.one() else failures + 1
                done += 1
                if failures >= MAX_FAILURES and not self.known:
                    raise SearchError(f"the first {failures} trials all failed; the last one with {self.reason}")
        except KeyboardInterrupt:
            logger.warning("interrupted; ending with what was found")

    def one(self) -> bool:
        with self.timed("ask"):
            trial = self.study.ask()
            shares = np.array([trial.suggest_float(name, *SHARES, log=True) for name in self.names])
        try:
            value = self.evaluate(trial, shares)
        except BaseException as error:
            trial.set_user_attr("error", f"{type(error).__name__}: {error}")
            self.study.tell(trial, state=TrialState.FAIL)
            if not isinstance(error, Exception):
                raise
            self.reason = f"{type(error).__name__}: {error}"
            logger.warning("trial %d failed: %s", trial.number, self.reason)
            return False
        with self.timed("tell"):
            self.study.tell(trial, value)
        return True

    def evaluate(self, trial: optuna.Trial, shares: np.ndarray) -> float:
        with self.timed("project"):
            widths = project_widths(self.space, self.limits, shares)
            plan = self.space.plan({name: int(w) for name, w in zip(self.names, widths, strict=True)})
            trial.set_user_attr("plan", {"fingerprint": plan.fingerprint, "widths": plan.widths})
            trial.set_user_attr("costs", asdict(self.space.cost(plan)))
        if plan.fingerprint not in self.known:
            self.known[plan.fingerprint] = self.measure(plan)
        return self.known[plan.fingerprint]

    def measure(self, plan: Plan) -> float:
        candidate = self.prepare(plan)
        with self.timed("score"):
            return checked_score(self.score(candidate), "score")

    def prepare(self, plan: Plan) -> nn.Module:
        with self.timed("build"):
            candidate = self.space.apply(plan).eval()
        with self.timed("recalibrate"):
            recalibrate(candidate, self.calibration, self.arguments)
        return candidate

    @contextmanager
    def timed(self, part: str) -> Any:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[part] += time.perf_counter() - start

    def result(self, directory: Path, test: Callable[[nn.Module], float] | None) -> Result:
        trials = {t.user_attrs["plan"]["fingerprint"]: t for t in self.finished()}
        if not trials:
            raise SearchError(f"no trial was finished in {directory}; {self.reason or 'allow more time'}")
        scored = [({"score": float(t.value or 0), **t.user_attrs["costs"]}, t) for t in trials.values()]
        chosen = [(metrics, t) for metrics, t in scored if not any(_dominates(m, metrics) for m, _ in scored)]
        chosen.sort(key=lambda pair: (pair[0]["macs"], pair[0]["score"]))
        front = tuple(self.entry(metrics, t.user_attrs["plan"]["widths"], test) for metrics, t in chosen)
        return Result(front[-1], front, self.study, self.space, directory, dict(self.seconds))

    def entry(self, metrics: dict[str, float], widths: dict[str, int], test: Any) -> Entry:
        plan = self.space.plan(widths)
        if test is not None:
            metrics = {**metrics, "test": checked_score(test(self.prepare(plan)), "test")}
        return Entry(plan, metrics, lambda: self.prepare(plan))


def weights_digest(model: nn.Module) -> str:
    """Sixteen hexadecimal digits that identify the values of all parameters."""
    digest = hashlib.sha256()
    for parameter in model.parameters():
        digest.update(parameter.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def _dominates(one: Mapping[str, float], other: Mapping[str, float]) -> bool:
    no_worse = one["score"] >= other["score"] and one["macs"] <= other["macs"]
    return no_worse and (one["score"] > other["score"] or one["macs"] < other["macs"])


def checked_score(value: Any, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float | np.floating | np.integer):
        raise TypeError(f"{name} must return a number, not {type(value).__name__}; for a tensor use .item()")
    if not math.isfinite(value):
        raise ValueError(f"{name} returned {value}")
    return float(value)
