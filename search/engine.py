"""What users call: a search is prepared, its trials are run, and its finalists judged."""

from __future__ import annotations

import datetime
import errno
import hashlib
import inspect
import itertools
import logging
import numbers
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import optuna
import torch
from torch import nn

from ..spaces import Cost, Space, discover
from ..spaces.calibration import check_calibration
from ..spaces.errors import ConfigError, SearchError, StorageError
from ..spaces.groups import KINDS
from ..spaces.inputs import Inputs
from ..spaces.rebuild import own_classes
from .budget import (
    LATENCY,
    LATENCY_COLUMN,
    Limits,
    check_lowest,
    check_lowest_reachable,
    check_reachable,
    first_key,
    parse_budget,
    parse_lowest,
)
from .candidates import Candidates, Score
from .files import SPACE
from .guidance import GUIDES, Guidance, guidance
from .latency import LatencyModel, check_latency
from .loop import Callback, Loop
from .problem import LATENCY_MS, Problem, objective_of
from .progress import SearchProgress
from .result import Judge, Judging, Result, Verification, collect, known_dense
from .samplers import make_sampler, shares_for
from .study import (
    DESCRIBED,
    Store,
    check_described,
    check_owner,
    ended,
    join_study,
    keep_copy,
    open_study,
)
from .timing import Timing
from .tuning import Tuning
from .warm_start import read_earlier

logger = logging.getLogger(__name__)

MODES = ("budget", "front")
#: How far scores of one model may differ by machine, relatively.
SAME_SCORE = 1e-2
#: Of a file system that takes no more.
_DISK_ERRORS = (
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EROFS,
    errno.EACCES,
    errno.EPERM,
    errno.EIO,
    errno.EFBIG,
    errno.ENOENT,
    errno.ESTALE,
)
_ANY_COST = Cost(*[10**30] * 4)
#: Searched unless the user says otherwise.
WIDTH_KINDS = tuple(kind for kind in KINDS if kind != "block")


def search(
    model: nn.Module,
    example_inputs: Any,
    *,
    score: Score | None = None,
    budget: Mapping[str, str | float] | None = None,
    calibration: Iterable[Any] | None = None,
    test: Score | None = None,
    dense: Mapping[str, Any] | None = None,
    mode: str = "budget",
    lowest: str | float | None = None,
    n_trials: int = 100,
    timeout_s: float | None = None,
    patience: int | None = None,
    guide: str = "auto",
    finalists: int | None = None,
    sampler: str | optuna.samplers.BaseSampler = "auto",
    warm_start: Sequence[str | Path] = (),
    tuning: Tuning | None = None,
    seed: int = 0,
    run_dir: str | Path | None = None,
    storage: str | None = None,
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
    before_trials: Callable[[optuna.Study], None] | None = None,
    before_judging: Callable[[], None] | None = None,
    judging: Judging | None = None,
    show_progress_bar: bool = False,
) -> Result:
    """Find the best pruned models and save them in ``run_dir``.

    ``mode="budget"`` maximises the score within ``budget``. ``mode="front"`` explores score against the first cost
    that ``budget`` names (macs by default), up to the budget or, without one, up to the dense model, and down to
    ``lowest``, given as a budget is, or a twentieth of the dense cost.

    ``score`` gets a candidate in evaluation mode and returns a number, higher is better, on data that is neither
    training nor test data; without one it is the fidelity to the dense model's outputs on ``calibration``. ``test`` is
    called for the front and the dense model only. ``dense``: the dense model's ``score`` and ``test``, where they are
    known already.

    ``guide``: what trials are told. ``score`` is that; ``fidelity`` that to the dense model's outputs on 1,000 samples
    of the score's data, or of ``calibration``, which needs no labels and is smoother than an accuracy; ``auto`` is
    fidelity where ``score`` is a :class:`.scores.SampleScore`. Losers against the best so far are given up after part
    of the samples. The ``finalists`` best trials (by default 5) are repaired thoroughly and get the whole ``score``;
    the best of them is picked. Along a front these are at most so many (20) that no other trial beats, spread over the
    range of costs.

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
    continued until it has ``n_trials`` finished trials. ``storage``: a database for the study instead of the run's own
    journal (``postgresql://...``, ``mysql://...``, or ``grpc://host:port`` of Optuna's proxy). Others join with
    :func:`work`. Ctrl-C ends the search with what was found (``is_interrupted`` of the result). ``callbacks`` are
    called with ``(study, trial)`` as in Optuna, ``before_trials`` with the study once ``run_dir`` is known to be this
    search's, ``before_judging`` once all trials are done: models are measured and scored in this process alone.
    ``judging`` is then told how many of how many models are done. ``show_progress_bar`` as in Optuna.

    Raises:
        BudgetError, CalibrationError, TraceError, EmptySpaceError, ConfigError: see their messages; all before the
            first trial.
        SearchError: the run directory belongs to another model, or no trial succeeded.
        StorageError: the run directory cannot be written or is damaged; finished trials are safe.
    """
    prepared = _prepared(locals())
    if before_trials is not None:
        before_trials(prepared.loop.study)
    prepared.warn(n_trials)
    dense = prepared.scored_dense(score, test, dense)
    bar = prepared.bar(n_trials) if show_progress_bar else None
    try:
        with bar or nullcontext():
            if bar is not None:
                bar.begin(prepared.loop.study)
            prepared.loop.trials(n_trials, timeout_s, patience, [*callbacks, *([bar] if bar else [])])
            if before_judging is not None:
                before_judging()
            return prepared.collected(test, finalists, judging or (bar.judging if bar else None), dense)
    except OSError as error:
        raise _explained(prepared.store.run_dir, error) from error


def work(model: nn.Module, example_inputs: Any, **options: Any) -> None:
    """Run trials of a search that another process has begun, with the arguments of :func:`search`, until it is over.

    Raises:
        SearchError: the search is of another model, space or budget than these arguments say.
        StorageError: there is no search to join.
    """
    bound = inspect.signature(search).bind(model, example_inputs, **options)
    bound.apply_defaults()
    given = bound.arguments
    prepared = _prepared(given, joins=True)
    try:
        prepared.loop.trials(given["n_trials"], given["timeout_s"], given["patience"], given["callbacks"])
    except OSError as error:
        raise _explained(prepared.store.run_dir, error) from error


def check_same_score(run_dir: Path, before: float, now: float) -> None:
    """Raises SearchError where the dense model has another score than when the run began: values cannot be mixed."""
    if abs(now - before) > SAME_SCORE * max(abs(before), abs(now)):
        raise SearchError(
            f"the dense model's score is {now:.6g}, and in {run_dir} it was {before:.6g}: another score or other data; "
            "choose another run_dir"
        )


def _explained(run_dir: Path, error: OSError) -> Exception:
    """What says that the run cannot be written; the same error where it is about something else, such as the user's
    data."""
    is_ours = error.filename is None or Path(os.fsdecode(error.filename)).resolve().is_relative_to(run_dir.resolve())
    return _no_room(run_dir, error) if error.errno in _DISK_ERRORS and is_ours else error


def _no_room(run_dir: Path, error: OSError) -> StorageError:
    if run_dir.is_file():
        return StorageError(f"{run_dir} is a file, and a run needs a folder: choose another run_dir")
    return StorageError(
        f"cannot write to {run_dir}: {error}. Finished trials are safe; "
        f"make room and search again with run_dir={run_dir}"
    )


@dataclass(frozen=True)
class _Prepared:
    """A search that is ready to run: the same in every process that works on it."""

    loop: Loop
    store: Store
    inputs: Inputs
    timing: Timing | None
    has_budget: bool

    def bar(self, n_trials: int) -> SearchProgress:
        problem = self.loop.problem
        known = {} if problem.latency is None else {LATENCY_MS: problem.latency.dense_ms}
        return SearchProgress(n_trials, problem.objective, asdict(problem.space.dense_cost) | known)

    def warn(self, n_trials: int) -> None:
        """Say what the user may not expect."""
        done, _ = ended(self.loop.study.get_trials(deepcopy=False))
        if done > n_trials:
            logger.warning("%d trials are done, and n_trials=%d counts them: no more are run", done, n_trials)
        if own := own_classes(self.loop.problem.space.model):
            logger.warning(
                "%s of the running script cannot be loaded by other programs without the dense model: define it in a "
                "module of its own, and import it",
                ", ".join(own),
            )

    def scored_dense(self, score: Score | None, test: Score | None, known: Mapping[str, Any] | None) -> dict[str, Any]:
        """What is known of the dense model, with its scores: what fails is told before any trial.

        Raises:
            ConfigError: ``score`` or ``test`` fails.
            SearchError: the score is another one than that of the run so far.
        """
        before, found = known_dense(self.store.run_dir), dict(known or {})
        for name, function in (("score", score), ("test", test)):
            if function is not None and name not in found:
                is_new = name == "score" or name not in before
                found[name] = self.loop.candidates.score_dense(function, name) if is_new else before[name]
        if "score" in found and "score" in before:
            check_same_score(self.store.run_dir, before["score"], found["score"])
        return {**before, **found}

    def collected(
        self, test: Score | None, finalists: int | None, judging: Judging | None, dense: Mapping[str, Any]
    ) -> Result:
        """The front, judged by this process while the others are done."""
        loop, limits = self.loop, self.loop.problem.limits
        verification = None
        if self.timing is not None:
            verification = Verification(self.timing, limits.values[LATENCY_COLUMN], self.inputs)
        judge = Judge(loop.candidates, loop.guided, self.inputs, test, verification)
        keep_copy(loop.study, self.store)
        result = collect(
            self.store.run_dir,
            loop.study,
            judge,
            loop.problem.objective,
            self.has_budget,
            finalists,
            loop.reason,
            judging,
            dense,
        )
        return replace(result, is_interrupted=loop.is_interrupted)


def _prepared(given: Mapping[str, Any], joins: bool = False) -> _Prepared:
    """``given``: the arguments of :func:`search`. ``joins``: the search is another process's."""
    model, mode, budget, timing = given["model"], given["mode"], given["budget"] or {}, given["timing"]
    if not isinstance(budget, Mapping):
        raise ConfigError(f'budget must be a dictionary such as {{"macs": "50%"}}, not {budget!r}')
    check_options(
        mode, given["guide"], given["n_trials"], given["finalists"], given["patience"], given["lowest"], budget
    )
    inputs = Inputs.of(given["example_inputs"])
    parse_budget(budget, _ANY_COST, mode == "front")  # a typing error is told before anything is computed
    if timing is not None:
        timing.check(model, inputs)
    space = _space_of(given)
    limits, lowest, latency = _limits_of(given, space, inputs, joins)
    if not space.repairs_nothing_by_choice:
        check_calibration(model, space.calibration)
    guided = guidance(space, given["score"], given["guide"], given["autocast"])
    run_dir = _fresh_run_dir() if given["run_dir"] is None else Path(given["run_dir"])
    store = Store(run_dir, given["storage"])
    problem = Problem(space, limits, objective_of(budget), mode == "front", latency, lowest)
    header = _header(given, problem, guided, store)
    earlier = read_earlier(given["warm_start"], problem, header)
    candidates = Candidates(space, given["autocast"], given["tuning"])
    try:
        if joins:
            study = join_study(store)
            check_described(study.user_attrs.get(DESCRIBED, {}), space, header, str(run_dir))
        else:
            is_new = not (run_dir / SPACE).exists()
            described = check_owner(run_dir, space, header)
            study = open_study(store, [guided.name, problem.objective][: 1 + problem.for_front])
            check_described(study.user_attrs.get(DESCRIBED, described), space, header, f"the storage {store.kind}")
            if is_new and DESCRIBED in study.user_attrs:
                logger.warning(
                    "the %s storage has a study %s already, of a run of that name, and this run goes on with it; if it "
                    "is another one, give this run's folder another name",
                    store.kind,
                    store.study_name,
                )
        problem = replace(problem, shares=shares_for(given["sampler"], study))
        # Seeded anew: a continued search must not draw the same numbers again, and workers not each other's.
        drawn = len(study.get_trials(deepcopy=False)) + (1 + os.getpid() if joins else 0)
        study.sampler = make_sampler(
            given["sampler"], problem, given["n_trials"], given["seed"] + drawn, earlier, is_fresh=not drawn
        )
        loop = Loop(problem, candidates, study, guided, earlier, joins)
        if not joins:
            loop.enqueue_starts()
            study.set_user_attr(DESCRIBED, described)  # others wait for this, and find the starts
    except OSError as error:
        raise _no_room(run_dir, error) from error
    return _Prepared(loop, store, inputs, timing, bool(budget))


def _fresh_run_dir() -> Path:
    """A folder named by the time, that no other search has."""
    named = f"runs/{datetime.datetime.now():%Y-%m-%d-%H%M%S}"
    for number in itertools.count(1):
        run_dir = Path(named if number == 1 else f"{named}-{number}")
        try:
            run_dir.mkdir(parents=True)
        except FileExistsError:
            continue
        except OSError as error:
            raise _no_room(run_dir, error) from error
        break
    return run_dir


def _space_of(given: Mapping[str, Any]) -> Space:
    names = ("criterion", "calibration", "compensation", "loss", "kinds", "round_to")
    options = {name: given[name] for name in names}
    space: Space | None = given["space"]
    if space is None:
        return discover(
            given["model"], given["example_inputs"], autocast=given["autocast"], seed=given["seed"], **options
        )
    if space.model is not given["model"] or _is_given(**options):
        raise ConfigError(
            "space= brings its own model, criterion, calibration, compensation, loss, kinds and round_to; "
            "give them to discover() only"
        )
    return space


def _limits_of(
    given: Mapping[str, Any], space: Space, inputs: Inputs, joins: bool
) -> tuple[Limits, Limits | None, LatencyModel | None]:
    """The limits, the lower end of a front that is asked for, and the latency model, which is measured where it is
    needed and not given."""
    budget, lowest, latency, timing = given["budget"] or {}, given["lowest"], given["latency"], given["timing"]
    may_be_empty = given["mode"] == "front"
    if LATENCY in budget and timing is None:
        raise ConfigError("a latency budget needs timing=, the target on which the models of the front are measured")
    if LATENCY in budget and latency is None:
        if joins and timing.cache is None:
            raise ConfigError(
                "to join a search within a latency budget, pass latency=, the model that the search made, or timing= "
                "with the cache of the search: plans are projected onto what is predicted"
            )
        latency = timing.model(space, inputs, budget=None if may_be_empty else budget)
    dense_ms = None if latency is None else latency.dense_ms
    limits = parse_budget(budget, space.dense_cost, may_be_empty, dense_ms)
    check_reachable(space, budget)
    if latency is not None:
        check_latency(latency, limits.values[LATENCY_COLUMN])
    low = None if lowest is None else parse_lowest(lowest, budget, space.dense_cost, dense_ms)
    if low is not None:
        check_lowest_reachable(space, lowest, first_key(budget), low)
    return limits, low, latency


def _header(given: Mapping[str, Any], problem: Problem, guided: Guidance, store: Store) -> dict[str, Any]:
    """What must be the same for a search to go on, and for a process to join it."""
    space, tuning, timing = problem.space, given["tuning"], given["timing"]
    return {
        **early_header(given["mode"], given["budget"] or {}, given["seed"], store),
        "criterion": ", ".join(space.criteria),
        "compensation": space.compensation,
        "guide": guided.name,
        "tuning": None if tuning is None else tuning.description,
        **{f"space.{key}": value for key, value in space.options.to_json().items()},
        "target": None if timing is None else dict(timing.target.description),
        "weights": weights_digest(space.model),
    }


def early_header(mode: str, budget: Mapping[str, str | float], seed: int, store: Store) -> dict[str, Any]:
    """Of the header, what is known without a model."""
    return {
        "mode": mode,
        "objective": objective_of(budget),
        "budget": {key: str(value) for key, value in budget.items()},
        "seed": seed,
        "storage": store.kind,
    }


def check_options(
    mode: str,
    guide: str,
    n_trials: int,
    finalists: int | None = None,
    patience: int | None = None,
    lowest: str | float | None = None,
    budget: Mapping[str, str | float] | None = None,
) -> None:
    """What can be said without a model. Raises ConfigError, and BudgetError for ``lowest``."""
    if mode not in MODES:
        raise ConfigError(f"unknown mode {mode!r}; expected one of {', '.join(MODES)}")
    if lowest is not None and mode != "front":
        raise ConfigError("lowest is where a front ends: it needs mode=front")
    if guide not in GUIDES:
        raise ConfigError(f"unknown guide {guide!r}; expected one of {', '.join(GUIDES)}")
    for name, value in {"n_trials": n_trials, "finalists": finalists, "patience": patience}.items():
        if value is not None and (not isinstance(value, numbers.Integral) or isinstance(value, bool)):
            raise ConfigError(f"{name} must be a whole number, not {value!r}")
        if value is not None and value < 1:
            raise ConfigError(f"{name} must be at least 1, not {value}")
    if lowest is not None:
        check_lowest(lowest, budget or {})


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
