"""The search loop: ask, project onto the budget, build, recalibrate, score, tell."""

from __future__ import annotations

import datetime
import hashlib
import logging
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import torch
from numpy.typing import NDArray
from optuna.trial import TrialState
from torch import nn

from ..spaces import Plan, Space, discover
from ..spaces.calibration import check_calibration
from ..spaces.errors import ConfigError, SearchError, StorageError
from ..spaces.groups import KINDS
from ..spaces.inputs import Inputs
from .budget import KEYS, LATENCY, LATENCY_COLUMN, Limits, check_reachable, parse_budget
from .candidates import Candidates, Score
from .latency import LatencyModel, check_latency
from .projection import project_widths
from .result import LATENCY_MS, Result, Verification, collect
from .study import check_owner, finished, make_sampler, open_study
from .timing import Timing

logger = logging.getLogger(__name__)

#: The search stops when this many first trials fail without one that succeeds.
MAX_FAILURES = 5
#: Proposals are relative keep shares in this range; only their proportions matter, since they are projected.
SHARES = (0.1, 1.0)
#: In front mode, the name and the lower end of the dimension that says which share of the dense cost to aim at.
COST_SHARE, SMALLEST_SHARE = "cost_share", 0.05
#: The name of the dimension that chooses among several criteria.
CRITERION = "criterion"
MODES = ("budget", "front")
#: Searched unless the user says otherwise.
WIDTH_KINDS = tuple(kind for kind in KINDS if kind != "block")
#: The entries of ``Cost`` in the order of the columns of ``Space.cost_batch``.
COLUMNS = ("macs", "params", "memory_bytes", "size_bytes", LATENCY_MS)

Callback = Callable[[optuna.Study, optuna.trial.FrozenTrial], None]


def search(
    model: nn.Module,
    example_inputs: Any,
    *,
    score: Score,
    budget: Mapping[str, str | float] | None = None,
    calibration: Iterable[Any] | None = None,
    test: Score | None = None,
    mode: str = "budget",
    n_trials: int = 100,
    timeout_s: float | None = None,
    sampler: str = "auto",
    seed: int = 0,
    run_dir: str | Path | None = None,
    criterion: str | Sequence[str] = "l1",
    compensation: str = "auto",
    loss: Callable[[Any, Any], torch.Tensor] | None = None,
    kinds: Sequence[str] | None = WIDTH_KINDS,
    round_to: int | Mapping[str, int] = 1,
    space: Space | None = None,
    autocast: torch.dtype | None = None,
    timing: Timing | None = None,
    latency: LatencyModel | None = None,
    callbacks: Sequence[Callback] = (),
) -> Result:
    """Find the best pruned models and save them in ``run_dir``.

    ``mode="budget"`` maximises the score within ``budget``. ``mode="front"`` explores score against the first cost
    that ``budget`` names (macs by default), up to the budget or, without one, up to the dense model.

    ``score`` gets a candidate in evaluation mode and returns a number, higher is better, on data that is neither
    training nor test data; ``test`` is called for the front only. ``calibration``: batches of training data, readable
    again and again, with which candidates are repaired; models with BatchNorm need it. ``criterion``: which units stay;
    of several, the search chooses. ``compensation``, ``loss``, ``round_to``: see :func:`discover`. ``kinds`` are by
    default all but blocks: taking out whole blocks pays after a search of widths, or with training. ``space``, from an
    earlier :func:`discover` of this model, saves doing that again and brings all of these, calibration included.
    ``autocast`` runs calibration and scores in this type. ``timing``: the target on which latency is measured, for
    ``budget={"latency": "5ms"}`` or ``"60%"``, and for the measured latency of the front; ``latency``: the model of it,
    from ``timing.model(space, inputs)``, where it has been made already.
    An existing ``run_dir`` of the same model and search is continued until it has ``n_trials`` finished trials.
    Ctrl-C ends the search with what was found. ``callbacks`` are called with ``(study, trial)`` as in Optuna.

    Raises:
        BudgetError, CalibrationError, TraceError, EmptySpaceError, ConfigError: see their messages; all before the
            first trial.
        SearchError: the run directory belongs to another model, or no trial succeeded.
        StorageError: the run directory cannot be written or is damaged; finished trials are safe.
    """
    if n_trials < 1:
        raise ConfigError(f"n_trials must be at least 1, not {n_trials}")
    if mode not in MODES:
        raise ConfigError(f"unknown mode {mode!r}; expected one of {', '.join(MODES)}")
    inputs = Inputs.of(example_inputs)
    if timing is not None:
        timing.check(model, inputs)
    if space is None:
        space = discover(
            model,
            example_inputs,
            criterion=criterion,
            calibration=calibration,
            compensation=compensation,
            loss=loss,
            autocast=autocast,
            kinds=kinds,
            round_to=round_to,
            seed=seed,
        )
    elif space.model is not model or _is_given(criterion, calibration, compensation, loss, kinds, round_to):
        raise ConfigError(
            "space= brings its own model, criterion, calibration, compensation, loss, kinds and round_to; "
            "give them to discover() only"
        )
    empty = mode == "front"
    parse_budget(budget or {}, space.dense_cost, empty)  # a typing error is told before anything is measured
    if LATENCY in (budget or {}) and latency is None:
        if timing is None:
            raise ConfigError("a latency budget needs timing=, the target to measure on")
        latency = timing.model(space, inputs, budget=budget if mode == "budget" else None)
    dense_ms = None if latency is None else latency.dense_ms
    limits = parse_budget(budget or {}, space.dense_cost, empty, dense_ms)
    check_reachable(space, limits)
    if latency is not None:
        check_latency(latency, limits.values[LATENCY_COLUMN])
    if not space.repairs_nothing_by_choice:
        check_calibration(model, space.calibration)
    directory = Path(run_dir or f"runs/{datetime.datetime.now():%Y-%m-%d-%H%M%S}")
    objective = objective_of(budget)
    header: dict[str, Any] = {
        "mode": mode,
        "objective": objective,
        "budget": {key: str(value) for key, value in (budget or {}).items()},
        "criterion": ", ".join(space.criteria),
        "compensation": space.compensation,
        **{f"space.{key}": value for key, value in space.options.to_json().items()},
        "target": None if timing is None else dict(timing.target.description),
        "seed": seed,
        "weights": weights_digest(model),
    }
    try:
        check_owner(directory, space, header)
        study = open_study(directory, mode)
        # Seeded anew: a continued search must not draw the same numbers again.
        fresh_seed = seed + len(study.get_trials(deepcopy=False))
        study.sampler = make_sampler(sampler, mode, n_trials, len(space.dimensions), fresh_seed)
        candidates = Candidates(space, autocast)
        run = _Run(candidates, limits, study, score, objective, latency)
        run.trials(n_trials, timeout_s, callbacks)
        verification = None if timing is None else Verification(timing, limits.values[LATENCY_COLUMN], inputs)
        return collect(directory, study, candidates, objective, bool(budget), inputs, test, run.reason, verification)
    except OSError as error:
        raise StorageError(
            f"cannot write to {directory}: {error}. Finished trials are safe; "
            f"make room and search again with run_dir={directory}"
        ) from error


class _Run:
    def __init__(
        self,
        candidates: Candidates,
        limits: Limits,
        study: optuna.Study,
        score: Score,
        objective: str,
        latency: LatencyModel | None,
    ) -> None:
        self.candidates, self.space, self.timer = candidates, candidates.space, candidates.timer
        self.limits, self.study, self.score, self.objective = limits, study, score, objective
        self.latency = latency
        self.names = list(self.space.dimensions)
        self.known = {t.user_attrs["plan"]["fingerprint"]: t.values[0] for t in finished(study)}
        self.reason = ""

    @property
    def for_front(self) -> bool:
        return len(self.study.directions) > 1

    def trials(self, n_trials: int, timeout_s: float | None, callbacks: Sequence[Callback]) -> None:
        deadline = math.inf if timeout_s is None else time.monotonic() + timeout_s
        existing = self.study.get_trials(deepcopy=False)
        if not existing:
            self.enqueue_uniform()
        # A trial that ended without an error and without a value was interrupted, and does not count.
        done = sum(t.state == TrialState.COMPLETE or "error" in t.user_attrs for t in existing)
        failures = 0
        try:
            while done < n_trials and time.monotonic() < deadline:
                trial = self.one()
                failures = 0 if trial.state == TrialState.COMPLETE else failures + 1
                done += 1
                for callback in callbacks:
                    callback(self.study, trial)
                if failures >= MAX_FAILURES and not self.known:
                    raise SearchError(f"the first {failures} trials all failed; the last one with {self.reason}")
        except KeyboardInterrupt:
            logger.warning("interrupted; ending with what was found")

    def enqueue_uniform(self) -> None:
        """Equal shares in the middle of their range; in front mode the sampler chooses the cost that they aim at."""
        self.study.enqueue_trial(dict.fromkeys(self.names, math.sqrt(SHARES[0] * SHARES[1])))

    def one(self) -> optuna.trial.FrozenTrial:
        with self.timer.part("ask"):
            trial = self.study.ask()
        try:
            values = self.evaluate(trial)
        except Exception as error:
            self.reason = f"{type(error).__name__}: {error}"
            trial.set_user_attr("error", self.reason)
            logger.warning("trial %d failed: %s", trial.number, self.reason)
            return self.study.tell(trial, state=TrialState.FAIL)
        except BaseException:
            self.study.tell(trial, state=TrialState.FAIL)
            raise
        with self.timer.part("tell"):
            return self.study.tell(trial, values)

    def evaluate(self, trial: optuna.Trial) -> list[float]:
        with self.timer.part("ask"):
            shares = np.array([trial.suggest_float(name, *SHARES, log=True) for name in self.names])
            limits = self.front_limits(trial) if self.for_front else self.limits
            criterion = self.criterion(trial)
        with self.timer.part("project"):
            plan, cost = self.project(shares, limits, criterion)
            described = {"fingerprint": plan.fingerprint, "widths": plan.widths, "criterion": criterion}
            trial.set_user_attr("plan", described)
            trial.set_user_attr("costs", cost)
        if plan.fingerprint not in self.known:
            candidate = self.candidates.prepare(plan)
            self.known[plan.fingerprint] = self.candidates.score(candidate, self.score, "score")
        value = self.known[plan.fingerprint]
        return [value, cost[self.objective]] if self.for_front else [value]

    def criterion(self, trial: optuna.Trial) -> str:
        """Which units stay: a dimension of the search where there is a choice."""
        criteria = self.space.criteria
        return criteria[0] if len(criteria) == 1 else str(trial.suggest_categorical(CRITERION, criteria))

    def project(self, shares: NDArray[np.float64], limits: Limits, criterion: str) -> tuple[Plan, dict[str, float]]:
        widths = project_widths(self.space, limits, shares, criterion, self.latency)
        plan = self.space.plan({name: int(w) for name, w in zip(self.names, widths, strict=True)}, criterion)
        cost: dict[str, float] = asdict(self.space.cost(plan))
        if self.latency is not None:
            cost[LATENCY_MS] = float(self.latency.ratios(widths[None], criterion)[0]) * self.latency.dense_ms
        return plan, cost

    def front_limits(self, trial: optuna.Trial) -> Limits:
        """The limits with the objective's one drawn by the sampler, as a share of the dense cost."""
        column = COLUMNS.index(self.objective)
        least = self.space.smallest_widths()[None]
        if self.latency is not None and self.objective == LATENCY_MS:
            dense, smallest = 1.0, float(self.latency.ratios(least)[0])  # limits of latency are ratios
        else:
            dense = asdict(self.space.dense_cost)[self.objective]
            smallest = self.space.cost_batch(least)[0][column] / dense
        highest = min(1.0, self.limits.values[column] / dense)
        lowest = min(max(SMALLEST_SHARE, smallest), highest)
        share = trial.suggest_float(COST_SHARE, lowest, highest, log=True)
        # The exact bound where the share is at its end: a product may fall a rounding error short of it.
        return self.limits.replace(column, max(share * dense, smallest * dense))


def _is_given(
    criterion: Any, calibration: Any, compensation: str, loss: Any, kinds: Any, round_to: int | Mapping[str, int]
) -> bool:
    """Whether any argument that is for :func:`discover` differs from its default."""
    data = calibration is not None or loss is not None
    return data or (criterion, compensation, kinds, round_to) != ("l1", "auto", WIDTH_KINDS, 1)


def objective_of(budget: Mapping[str, Any] | None) -> str:
    """The cost that the front trades against the score: that of the first budget, macs without one."""
    first = next(iter(budget)) if budget else "macs"
    return LATENCY_MS if first == LATENCY else COLUMNS[KEYS[first][0]]


def weights_digest(model: nn.Module) -> str:
    """Sixteen hexadecimal digits that identify the values of all parameters."""
    digest = hashlib.sha256()
    for parameter in model.parameters():
        digest.update(parameter.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]
