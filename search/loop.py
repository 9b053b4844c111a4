"""The trials of a search: ask, project onto the budget, build, repair, score, tell."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Sequence

import numpy as np
import optuna
from numpy.typing import NDArray
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution
from optuna.exceptions import UpdateFinishedTrialError
from optuna.trial import TrialState
from torch import nn

from ..spaces import Plan
from ..spaces.errors import SearchError
from .candidates import Candidates
from .front import non_dominated
from .guidance import Guidance
from .liveness import WORKER, this_process
from .problem import CRITERION, Problem
from .racing import Raced
from .scores import SampleScore
from .study import DESCRIBED, PARTLY, STOPPED, best_known, ended, finished, name_of, release_stale
from .tuning import GivenUp, Watch
from .warm_start import Earlier

logger = logging.getLogger(__name__)

#: The search stops when this many first trials fail without one that succeeds.
MAX_FAILURES = 5
#: Between looks at what other processes still run.
WAIT_S = 0.5

Callback = Callable[[optuna.Study, optuna.trial.FrozenTrial], None]


class Loop:
    """Asks, scores and tells until the study has its trials; ``joins``: another process has begun it."""

    def __init__(
        self,
        problem: Problem,
        candidates: Candidates,
        study: optuna.Study,
        guided: Guidance,
        earlier: Earlier,
        joins: bool = False,
    ) -> None:
        self.problem, self.candidates, self.timer = problem, candidates, candidates.timer
        self.study, self.guided, self.earlier, self.joins = study, guided, earlier, joins
        self.process = this_process()
        #: Trials that callbacks know.
        self.told = {t.number for t in study.get_trials(deepcopy=False) if t.state.is_finished()}
        #: Costs and values by sample of the best that this process has scored on all samples, see :meth:`keep`.
        self.samples: list[tuple[float, Raced]] = []
        self.reason = ""
        self.is_interrupted = False

    def trials(
        self, n_trials: int, timeout_s: float | None, patience: int | None, callbacks: Sequence[Callback]
    ) -> None:
        deadline = math.inf if timeout_s is None else time.monotonic() + timeout_s
        failures = 0
        try:
            while time.monotonic() < deadline and self.has_room(n_trials, deadline):
                trial = self.one()
                failures = 0 if trial.state == TrialState.COMPLETE else failures + 1
                self.tell(callbacks)
                if failures >= MAX_FAILURES and not finished(self.study):
                    raise SearchError(f"the first {failures} trials all failed; the last one with {self.reason}")
                if patience is not None and self.is_stuck(patience):
                    logger.info("no better plan for %d trials: the search ends", patience)
                    break
        except KeyboardInterrupt:
            self.is_interrupted = True
            logger.warning("interrupted; ending with what was found")
        self.tell(callbacks)

    def tell(self, callbacks: Sequence[Callback]) -> None:
        """Call ``callbacks`` with all trials that have ended since, those of other processes too."""
        if not callbacks:
            return
        for trial in self.study.get_trials(deepcopy=False):
            if trial.state.is_finished() and trial.number not in self.told:
                self.told.add(trial.number)
                for callback in callbacks:
                    callback(self.study, trial)

    def has_room(self, n_trials: int, deadline: float = math.inf) -> bool:
        """Whether one more trial is wanted. Waits until ``deadline`` for those that other processes are running, which
        may yet fail."""
        while True:
            release_stale(self.study, self.process)
            trials = self.study.get_trials(deepcopy=False)
            done, _ = ended(trials)
            running = sum(t.state == TrialState.RUNNING for t in trials)
            if done >= n_trials or done + running < n_trials:
                return done < n_trials
            if self.joins or time.monotonic() > deadline:
                return False
            time.sleep(WAIT_S)

    def enqueue_starts(self) -> None:
        """In a new study: equal shares, then the best proportions of earlier runs. What a session that was killed
        meanwhile has put there is there already."""
        if DESCRIBED in self.study.user_attrs:
            return
        names = self.problem.space.dimensions
        known = [dict(zip(names, shares, strict=True)) for shares in self.earlier.starts(self.problem.shares)]
        waiting = len(self.study.get_trials(deepcopy=False))
        for row in [*self.problem.starts(), *known][waiting:]:
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
            trial = self.study.ask()
            trial.set_user_attr(WORKER, self.process)  # before the sampler thinks: whose it is shall be known if we die
            for name, distribution in self.problem.distributions.items():
                suggest(trial, name, distribution)
        try:
            values = self.evaluate(trial)
        except UpdateFinishedTrialError:
            return self.given_up(trial)
        except Exception as error:
            self.reason = f"{type(error).__name__}: {error}"
            trial.set_user_attr("error", self.reason)
            logger.warning("%s failed: %s", name_of(trial.number), self.reason)
            return self.study.tell(trial, state=TrialState.FAIL)
        except BaseException:
            self.study.tell(trial, state=TrialState.FAIL)
            raise
        with self.timer.part("tell"):
            try:
                return self.study.tell(trial, values)
            except (ValueError, UpdateFinishedTrialError):
                if self.stored(trial).state == TrialState.RUNNING:
                    raise
                return self.given_up(trial)

    def stored(self, trial: optuna.Trial) -> optuna.trial.FrozenTrial:
        return self.study.get_trials(deepcopy=False)[trial.number]

    def given_up(self, trial: optuna.Trial) -> optuna.trial.FrozenTrial:
        """A trial that another process has taken for dead: what it tried waits to be tried again."""
        logger.warning("%s took so long that another process has given it up", name_of(trial.number))
        return self.stored(trial)

    def evaluate(self, trial: optuna.Trial) -> list[float]:
        with self.timer.part("project"):
            plan, costs = self.problem.plan(trial.params)
            criterion = trial.params.get(CRITERION, self.problem.space.criteria[0])
            described = {"fingerprint": plan.fingerprint, "widths": plan.widths, "criterion": criterion}
            trial.set_user_attr("plan", described)
            trial.set_user_attr("costs", costs)
            excesses = self.problem.excesses(costs)
            trial.set_user_attr("constraints", excesses)  # the dashboard does not show Optuna's own yet
            for key, excess in excesses.items():
                trial.set_constraint(key, excess)
        cost = costs[self.problem.objective]
        same = best_known(finished(self.study), plan.fingerprint)
        if same is None:
            value = self.value(trial, plan, cost)
        else:
            value = same.values[0]
            for key in (PARTLY, STOPPED):
                if key in same.user_attrs:
                    trial.set_user_attr(key, same.user_attrs[key])
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
            self.keep(cost, raced)
        else:
            trial.set_user_attr(PARTLY, len(raced.values))
        return raced.score

    def keep(self, cost: float, raced: Raced) -> None:
        """For :meth:`rival`, those that may be one: no other is better and costs no more."""
        every = [*self.samples, (cost if self.problem.for_front else 0.0, raced)]
        front = non_dominated([raced.score for _, raced in every], [own for own, _ in every])
        self.samples = [every[place] for place in front]

    def rival(self, cost: float) -> NDArray[np.float64] | None:
        """The values by sample of the best candidate so far; along a front, of those that cost no more."""
        eligible = [raced for own, raced in self.samples if own <= cost]
        return max(eligible, key=lambda raced: raced.score).values if eligible else None


def suggest(trial: optuna.Trial, name: str, distribution: BaseDistribution) -> None:
    """Let the sampler choose the parameter."""
    if isinstance(distribution, CategoricalDistribution):
        trial.suggest_categorical(name, distribution.choices)
    elif isinstance(distribution, FloatDistribution):
        trial.suggest_float(name, distribution.low, distribution.high, step=distribution.step, log=distribution.log)
    else:
        raise TypeError(f"{name} has a distribution of a kind that no problem has: {distribution}")
