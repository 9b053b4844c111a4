"""The search loop: ask, project onto the budget, build, repair, score, tell."""

from __future__ import annotations

import datetime
import hashlib
import logging
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
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
from .budget import LATENCY, LATENCY_COLUMN, check_reachable, parse_budget
from .candidates import Candidates, Score
from .front import non_dominated
from .guidance import GUIDES, Guidance, guidance
from .latency import LatencyModel, check_latency
from .problem import CRITERION, SHARES, Problem, objective_of
from .racing import Raced
from .result import PARTLY, Judge, Result, Verification, collect
from .samplers import make_sampler
from .scores import SampleScore
from .study import check_owner, finished, open_study
from .timing import Timing
from .tuning import STOPPED, GivenUp, Tuning, Watch
from .warm_start import Earlier, read_earlier

logger = logging.getLogger(__name__)

#: The search stops when this many first trials fail without one that succeeds.
MAX_FAILURES = 5
MODES = ("budget", "front")
#: Searched unless the user says otherwise.
WIDTH_KINDS = tuple(kind for kind in KINDS if kind != "block")

Callback = Callable[[optuna.Study, optuna.trial.FrozenTrial], None]


def search(
    model: nn.Module,
    example_inputs: Any,
    *,
    score: Score | None = None,
    budget: Mapping[str, str | float] | None = None,
    calibration: Iterable[Any] | None = None,
    test: Score | None = None,
    mode: str = "budget",
    n_trials: int = 100,
    timeout_s: float | None = None,
    patience: int | None = None,
    guide: str = "auto",
    finalists: int = 5,
    sampler: str | optuna.samplers.BaseSampler = "auto",
    warm_start: Sequence[str | Path] = (),
    tuning: Tuning | None = None,
    seed: int = 0,
    run_dir: str | Path | None = None,
    criterion: str | Sequence[str] = "auto",
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
    training nor test data; without one it is the fidelity to the dense model's outputs on ``calibration``. ``test`` is
    called for the front only. ``guide``: what trials are told. ``score`` is that; ``fidelity`` that to the dense
    model's outputs on 1,000 samples of the score's data, or of ``calibration``, which needs no labels and is smoother
    than an accuracy; ``auto`` is fidelity where ``score`` is a :class:`.scores.SampleScore`. Losers against the best so
    far are given up after part of the samples. The ``finalists`` best trials are repaired thoroughly and get the whole
    ``score``, and the best of them is picked; along a front these are all that no other trial beats.

    ``calibration``: batches of training data, readable again and again, with which candidates are repaired; models
    with BatchNorm need it. ``criterion``: which units stay; of several, the search chooses. ``compensation``, ``loss``,
    ``round_to``: see :func:`discover`. ``kinds`` are by default all but blocks: taking out whole blocks pays after a
    search of widths, or with training. ``space``, from an earlier :func:`discover` of this model, saves doing that
    again and brings all of these, calibration included. ``autocast`` runs calibration and scores in this type.
    ``timing``: the target on which latency is measured, for ``budget={"latency": "5ms"}`` or ``"60%"``, and for the
    measured latency of the front; ``latency``: the model of it, from ``timing.model(space, inputs)``, where it has been
    made already.

    ``sampler``: a name of :data:`.samplers.SAMPLERS`, or an Optuna sampler. The search ends after ``n_trials``,
    ``timeout_s``, or ``patience`` trials without a better one. ``warm_start``: runs of the same model and space, with
    any budget, whose scored plans this one learns from. ``tuning`` trains every candidate for a moment, and gives up
    those below the median of the others after as many steps. An existing ``run_dir`` of the same model and search is
    continued until it has ``n_trials`` finished trials. Ctrl-C ends the search with what was found. ``callbacks`` are
    called with ``(study, trial)`` as in Optuna.

    Raises:
        BudgetError, CalibrationError, TraceError, EmptySpaceError, ConfigError: see their messages; all before the
            first trial.
        SearchError: the run directory belongs to another model, or no trial succeeded.
        StorageError: the run directory cannot be written or is damaged; finished trials are safe.
    """
    check_options(mode, guide, n_trials, finalists, patience)
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
    guided = guidance(space, score, guide, autocast)
    directory = Path(run_dir or f"runs/{datetime.datetime.now():%Y-%m-%d-%H%M%S}")
    objective = objective_of(budget)
    problem = Problem(space, limits, objective, mode == "front", latency)
    header: dict[str, Any] = {
        "mode": mode,
        "objective": objective,
        "budget": {key: str(value) for key, value in (budget or {}).items()},
        "criterion": ", ".join(space.criteria),
        "compensation": space.compensation,
        "guide": guided.name,
        "tuning": None if tuning is None else tuning.description,
        **{f"space.{key}": value for key, value in space.options.to_json().items()},
        "target": None if timing is None else dict(timing.target.description),
        "seed": seed,
        "weights": weights_digest(model),
    }
    earlier = read_earlier(warm_start, problem, header)
    try:
        check_owner(directory, space, header)
        study = open_study(directory, [guided.name, objective][: 1 + problem.for_front])
        # Seeded anew: a continued search must not draw the same numbers again.
        fresh_seed = seed + len(study.get_trials(deepcopy=False))
        study.sampler = make_sampler(sampler, problem, n_trials, fresh_seed, earlier)
        candidates = Candidates(space, autocast, tuning)
        run = _Run(problem, candidates, study, guided, earlier)
        run.trials(n_trials, timeout_s, patience, callbacks)
        verification = None if timing is None else Verification(timing, limits.values[LATENCY_COLUMN], inputs)
        judge = Judge(candidates, guided, inputs, test, verification)
        return collect(directory, study, judge, objective, bool(budget), finalists, run.reason)
    except OSError as error:
        raise StorageError(
            f"cannot write to {directory}: {error}. Finished trials are safe; "
            f"make room and search again with run_dir={directory}"
        ) from error


def check_options(mode: str, guide: str, n_trials: int, finalists: int, patience: int | None) -> None:
    """Raises ConfigError."""
    if mode not in MODES:
        raise ConfigError(f"unknown mode {mode!r}; expected one of {', '.join(MODES)}")
    if guide not in GUIDES:
        raise ConfigError(f"unknown guide {guide!r}; expected one of {', '.join(GUIDES)}")
    for name, value in {"n_trials": n_trials, "finalists": finalists, "patience": patience}.items():
        if value is not None and value < 1:
            raise ConfigError(f"{name} must be at least 1, not {value}")


class _Run:
    def __init__(
        self,
        problem: Problem,
        candidates: Candidates,
        study: optuna.Study,
        guided: Guidance,
        earlier: Earlier,
    ) -> None:
        self.problem, self.candidates, self.timer = problem, candidates, candidates.timer
        self.study, self.guided, self.earlier = study, guided, earlier
        self.known = {t.user_attrs["plan"]["fingerprint"]: t.values[0] for t in finished(study)}
        #: Costs and values by sample of what this process has scored on all samples.
        self.samples: list[tuple[float, Raced]] = []
        self.reason = ""

    def trials(
        self, n_trials: int, timeout_s: float | None, patience: int | None, callbacks: Sequence[Callback]
    ) -> None:
        deadline = math.inf if timeout_s is None else time.monotonic() + timeout_s
        existing = self.study.get_trials(deepcopy=False)
        if not existing:
            self.enqueue_starts()
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
                if patience is not None and self.is_stuck(patience):
                    logger.info("no better plan for %d trials: the search ends", patience)
                    break
        except KeyboardInterrupt:
            logger.warning("interrupted; ending with what was found")

    def enqueue_starts(self) -> None:
        """Equal shares in the middle of their range, then the best proportions of earlier runs."""
        names = self.problem.space.dimensions
        rows = [dict.fromkeys(names, math.sqrt(SHARES[0] * SHARES[1]))]
        rows += [dict(zip(names, shares, strict=True)) for shares in self.earlier.starts(SHARES)]
        for row in rows:
            self.study.enqueue_trial(row)

    def is_stuck(self, patience: int) -> bool:
        """Whether none of the last ``patience`` trials is on the front, or the best."""
        trials = finished(self.study)
        if len(trials) <= patience:
            return False
        costs = [t.values[1] if self.problem.for_front else 0.0 for t in trials]
        return max(non_dominated([t.values[0] for t in trials], costs)) < len(trials) - patience

    def one(self) -> optuna.trial.FrozenTrial:
        with self.timer.part("ask"):
            trial = self.study.ask(self.problem.distributions)
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
        with self.timer.part("project"):
            plan, costs = self.problem.plan(trial.params)
            criterion = trial.params.get(CRITERION, self.problem.space.criteria[0])
            described = {"fingerprint": plan.fingerprint, "widths": plan.widths, "criterion": criterion}
            trial.set_user_attr("plan", described)
            trial.set_user_attr("costs", costs)
        cost = costs[self.problem.objective]
        if plan.fingerprint not in self.known:
            self.known[plan.fingerprint] = self.value(trial, plan, cost)
        value = self.known[plan.fingerprint]
        return [value, cost] if self.problem.for_front else [value]

    def value(self, trial: optuna.Trial, plan: Plan, cost: float) -> float:
        """What the candidate is worth; an estimate where it was given up during its fine-tuning."""
        if self.candidates.tuning is None:
            return self.scored(trial, self.candidates.prepare(plan, "quick"), cost)
        guide = self.guided.guide
        limit = cost if self.problem.for_front else None
        watch = Watch(trial, lambda model: self.candidates.score(model, guide, "score"), finished(self.study), limit)
        try:
            return self.scored(trial, self.candidates.prepare(plan, "quick", watch), cost)
        except GivenUp as reason:
            trial.set_user_attr(STOPPED, reason.step)
            return reason.value

    def scored(self, trial: optuna.Trial, candidate: nn.Module, cost: float) -> float:
        """The value of a candidate, estimated from part of the samples where it clearly loses."""
        if not isinstance(self.guided.guide, SampleScore):
            return self.candidates.score(candidate, self.guided.guide, "score")
        raced = self.candidates.race(candidate, self.guided.guide, self.rival(cost))
        if raced.is_complete:
            self.samples.append((cost, raced))
        else:
            trial.set_user_attr(PARTLY, len(raced.values))
        return raced.score

    def rival(self, cost: float) -> NDArray[np.float64] | None:
        """The values by sample of the best candidate so far; along a front, of those that cost no more."""
        eligible = [raced for own, raced in self.samples if own <= cost or not self.problem.for_front]
        return max(eligible, key=lambda raced: raced.score).values if eligible else None


def _is_given(
    criterion: Any, calibration: Any, compensation: str, loss: Any, kinds: Any, round_to: int | Mapping[str, int]
) -> bool:
    """Whether any argument that is for :func:`discover` differs from its default."""
    data = calibration is not None or loss is not None
    return data or (criterion, compensation, kinds, round_to) != ("auto", "auto", WIDTH_KINDS, 1)


def weights_digest(model: nn.Module) -> str:
    """Sixteen hexadecimal digits that identify the values of all parameters."""
    digest = hashlib.sha256()
    for parameter in model.parameters():
        digest.update(parameter.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]
