"""The Optuna study of a run: journal storage that survives a kill, and samplers by name."""

from __future__ import annotations

import json
import logging
import os
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import optuna
from optuna.storages import BaseStorage, GrpcStorageProxy, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend, JournalFileSymlinkLock
from optuna.study import StudyDirection
from optuna.trial import TrialState

from ..spaces.errors import SearchError, StorageError
from .files import SPACE, read_json, write_json
from .liveness import WORKER, is_stale

if TYPE_CHECKING:
    from ..spaces import Space

logger = logging.getLogger(__name__)

STUDY_NAME, JOURNAL = "prunefront", "study.journal"
#: The attribute of a study that says whose it is, as ``space.json`` does; and what runs of before did not say.
DESCRIBED, _UNSAID = "prunefront", {"storage": "journal"}
#: Attributes of trials that were given up, after so many samples, or steps: their values are estimates.
PARTLY, STOPPED = "samples", "stopped_at"
#: What may differ between two searches whose values are compared, see :mod:`.warm_start`.
COMPARABLE = ("mode", "objective", "budget", "target", "seed", "storage")
#: The attribute of a trial that says how often it was tried before by processes that died, and how often it may be.
TRIED, MOST_TRIED = "tried", 3
#: SQLAlchemy's own choices are older ones, which have to be compiled.
DRIVERS = {"postgresql": "psycopg", "mysql": "pymysql"}
#: Of a score and a cost.
DIRECTIONS = (StudyDirection.MAXIMIZE, StudyDirection.MINIMIZE)
#: A lock of the journal that nobody has renewed for so long belongs to a process that was killed.
LOCK_GRACE_S = 30
#: A worker waits so long for the search that it joins, and for a proxy.
JOIN_WAIT_S, GRPC_WAIT_S, GRPC_PORT = 120.0, 30.0, 13000


class _Lock(JournalFileSymlinkLock):
    """That of a journal, taken over from a killed process after ``LOCK_GRACE_S``, with the record that it has left
    unfinished: the next one would be appended to that, and be lost with it.

    The lock is a symbolic link to the path as given: a relative one leads nowhere, and is waited for forever.
    """

    def __init__(self, journal: Path) -> None:
        self.journal = journal.resolve()
        super().__init__(str(self.journal), grace_period=LOCK_GRACE_S)

    def acquire(self) -> bool:
        is_ours = super().acquire()
        if is_ours and not _ends_whole(self.journal):
            cut_torn_tail(self.journal)
        return is_ours


def storage_of(journal: Path) -> JournalStorage:
    """Raises StorageError where the journal is damaged."""
    try:
        return JournalStorage(JournalFileBackend(str(journal.resolve()), lock_obj=_Lock(journal)))
    except ValueError as error:
        raise StorageError(f"{journal} is damaged: {error}; only its last record may be cut off") from error


@dataclass(frozen=True)
class Store:
    """Where the study of ``run_dir`` is: its journal; or with ``url`` a database (postgresql://..., mysql://...) or a
    proxy of Optuna's in front of one (grpc://host:port), where studies have the names of their runs."""

    run_dir: Path
    url: str | None = None

    @property
    def journal(self) -> Path:
        return self.run_dir / JOURNAL

    @property
    def kind(self) -> str:
        """Without what a URL may hold of secrets."""
        return "journal" if self.url is None else self.url.partition(":")[0].partition("+")[0]

    @property
    def study_name(self) -> str:
        return STUDY_NAME if self.url is None else self.run_dir.resolve().name

    def open(self) -> BaseStorage:
        """Raises StorageError for what cannot be reached."""
        if self.url is None:
            return storage_of(self.journal)
        try:
            if self.kind == "grpc":
                place = urlsplit(self.url)
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
                    proxy = GrpcStorageProxy(host=place.hostname or "localhost", port=place.port or GRPC_PORT)
                proxy.wait_server_ready(timeout=GRPC_WAIT_S)
                return proxy
            # Workers come back from a restart of the server: a connection is tried before it is used.
            options = {"pool_pre_ping": True, "pool_size": 2}
            return RDBStorage(with_driver(self.url), engine_kwargs=options)
        except Exception as error:  # drivers have errors of their own
            raise StorageError(
                f"the storage {self.kind} cannot be opened: {type(error).__name__}: {str(error).splitlines()[0]}; "
                "is the server running, and its driver installed? pip install 'prunefront[postgresql]', [mysql], [grpc]"
            ) from error


def with_driver(url: str) -> str:
    """``url`` with the driver that our extras install, where it names none."""
    kind, _, rest = url.partition("://")
    return f"{kind}+{DRIVERS[kind]}://{rest}" if kind in DRIVERS else url


def finished(study: optuna.Study) -> list[optuna.trial.FrozenTrial]:
    """Trials with a score."""
    return study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))


def best_known(trials: Iterable[optuna.trial.FrozenTrial], fingerprint: str) -> optuna.trial.FrozenTrial | None:
    """The first trial that scored the plan; one whose value is an estimate only where no other has scored it."""
    same = [t for t in trials if t.user_attrs["plan"]["fingerprint"] == fingerprint]
    return min(same, key=is_estimate, default=None)


def first_by_plan(trials: Iterable[optuna.trial.FrozenTrial]) -> list[optuna.trial.FrozenTrial]:
    """Of every plan its trial, as :func:`best_known` has it."""
    by_plan: dict[str, optuna.trial.FrozenTrial] = {}
    for trial in trials:
        known = by_plan.setdefault(trial.user_attrs["plan"]["fingerprint"], trial)
        if is_estimate(known) and not is_estimate(trial):
            by_plan[trial.user_attrs["plan"]["fingerprint"]] = trial
    return list(by_plan.values())


def is_estimate(trial: optuna.trial.FrozenTrial) -> bool:
    """Whether the trial was given up: its value is what it had promised by then."""
    return PARTLY in trial.user_attrs or STOPPED in trial.user_attrs


def ended(trials: Sequence[optuna.trial.FrozenTrial]) -> tuple[int, int]:
    """How many are done, and how many of them failed.

    A trial that was interrupted has neither a value nor an error, and does not count.
    """
    failed = sum("error" in trial.user_attrs for trial in trials)
    return failed + sum(trial.state == TrialState.COMPLETE for trial in trials), failed


def name_of(number: int) -> str:
    """What the trial, and the model that is saved of it, is called everywhere."""
    return f"trial{number:04d}"


def open_study(store: Store, metrics: Sequence[str]) -> optuna.Study:
    """Create the study of a run, or continue it. ``metrics``: of a score, and of a cost along a front.

    Trials that a dead process left running are marked failed, and their proposals wait to be tried again.

    Raises:
        StorageError: the storage cannot be read.
    """
    if store.url is None and store.journal.exists():
        with _locked(store.journal):
            cut_torn_tail(store.journal)
    with _quiet():
        study = optuna.create_study(
            storage=store.open(),
            study_name=store.study_name,
            directions=DIRECTIONS[: len(metrics)],
            load_if_exists=True,
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        study.set_metric_names(list(metrics))
    release_stale(study)
    return study


@contextmanager
def _quiet() -> Iterator[None]:
    """Without Optuna's line about a new study: no other line of the kind follows it."""
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(max(before, optuna.logging.WARNING))
    try:
        yield
    finally:
        optuna.logging.set_verbosity(before)


def join_study(store: Store, wait_s: float = JOIN_WAIT_S) -> optuna.Study:
    """The study of a search that another process has begun, or begins within ``wait_s``.

    Raises:
        StorageError: there is none.
    """
    deadline = time.monotonic() + wait_s
    while True:
        try:
            if store.url is not None or store.journal.exists():
                study = optuna.load_study(study_name=store.study_name, storage=store.open())
                if DESCRIBED in study.user_attrs:  # its first plans are there too
                    return study
        except KeyError:
            pass
        if time.monotonic() > deadline:
            raise StorageError(f"there is no search to join: {store.run_dir} has no study in its {store.kind}")
        time.sleep(0.2)


def release_stale(study: optuna.Study, idle: Mapping[str, Any] | None = None) -> None:
    """Trials whose process is gone, or is ``idle``, fail, and what they tried is tried again, but not for ever: a plan
    may be what kills processes."""
    running = study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
    if not running:
        return
    durations = [t.duration.total_seconds() for t in finished(study) if t.duration is not None]
    usual = max(durations, default=0.0)
    for trial in running:
        is_gone = is_stale(trial, usual)
        if is_gone or (idle is not None and trial.user_attrs.get(WORKER) == idle):
            tried = trial.user_attrs.get(TRIED, 0) + is_gone
            try:
                if tried > MOST_TRIED:
                    reason = f"its process died {tried} times in a row: is there enough memory for this plan?"
                    optuna.Trial(study, trial._trial_id).set_user_attr("error", reason)
                    logger.warning("%s is not tried again: %s", name_of(trial.number), reason)
                study.tell(trial.number, state=TrialState.FAIL)
            except (ValueError, optuna.exceptions.UpdateFinishedTrialError):
                continue  # another process was faster, and has seen to it
            if tried <= MOST_TRIED:
                study.enqueue_trial(trial.params, user_attrs={TRIED: tried})


def keep_copy(study: optuna.Study, store: Store) -> None:
    """The study of a database as the run's own journal, which reports read without the database."""
    if store.url is None:
        return
    fresh = store.journal.with_suffix(".copy")
    fresh.unlink(missing_ok=True)
    target = storage_of(fresh)
    optuna.copy_study(
        from_study_name=store.study_name, from_storage=store.open(), to_storage=target, to_study_name=STUDY_NAME
    )
    fresh.replace(store.journal)


def read_study(run_dir: Path) -> optuna.Study:
    """The study of a run, to look at.

    Raises:
        StorageError: there is none.
    """
    journal = run_dir / JOURNAL
    if not journal.exists():
        raise StorageError(f"{run_dir} is no run: it has no {JOURNAL}")
    return optuna.load_study(study_name=STUDY_NAME, storage=storage_of(journal))


def check_owner(run_dir: Path, space: Space, header: dict[str, Any]) -> dict[str, Any]:
    """Write down whose run this is, or compare, and return what is written.

    Raises:
        SearchError: the directory belongs to another model or search.
        StorageError: its ``space.json`` is damaged.
    """
    path = run_dir / SPACE
    run_dir.mkdir(parents=True, exist_ok=True)
    described = {
        "fingerprint": space.fingerprint,
        "search": header,
        "dense_cost": asdict(space.dense_cost),
        "groups": [{"name": g.name, "kind": g.kind, "size": g.size, "exact": g.exact} for g in space.groups],
        "frozen": [{"name": frozen.name, "reason": frozen.reason} for frozen in space.frozen],
    }
    if not path.exists():
        write_json(path, described)
        return described
    found = read_json(path)
    if "fingerprint" not in found or not isinstance(found.get("search"), dict):
        raise StorageError(f"{path} is damaged: it does not describe a search; choose another run_dir")
    check_described(found, space, header, f"the run directory {run_dir}")
    return found


def check_described(found: dict[str, Any], space: Space, header: dict[str, Any], where: str) -> None:
    """Raises SearchError unless ``found``, what stands in ``where``, describes this search."""
    search, is_same_model = found.get("search", {}), found.get("fingerprint") == space.fingerprint
    changed = changed_keys(search, header)
    if "weights" in changed or (not changed and not is_same_model):
        told = "" if any(key.startswith("space.") for key in changed) else _difference(found, space)
        what = "a model with other weights" if search and is_same_model else f"another model{told}"
        raise SearchError(f"{where} belongs to {what}; choose another run_dir")
    check_same_search(search, header, where)


def check_same_search(search: Mapping[str, Any], header: Mapping[str, Any], where: str) -> None:
    """Raises SearchError unless ``search``, which describes the search in ``where``, has the values of ``header``."""
    if changed := changed_keys(search, header):
        changes = ", ".join(f"{key} {_value(search, key)!r}, not {header[key]!r}" for key in changed)
        more = ": with warm_start it learns from this one" if set(changed) <= set(COMPARABLE) else ""
        raise SearchError(
            f"the search in {where} has {changes}; continue with the same, or choose another run_dir{more}"
        )


def changed_keys(search: Mapping[str, Any], header: Mapping[str, Any]) -> list[str]:
    """Of ``header``, what ``search`` has other values of."""
    return [key for key, value in header.items() if _value(search, key) != value]


def _value(search: Mapping[str, Any], key: str) -> Any:
    return search.get(key, _UNSAID.get(key))


def _difference(found: Mapping[str, Any], space: Space) -> str:
    """In what the model that ``found`` describes is another one, as far as was written down."""
    before = {group.get("name"): group.get("size") for group in found.get("groups", [])}
    now = {group.name: group.size for group in space.groups}
    for name in [*before, *now]:
        if before.get(name) != now.get(name):
            there, here = (f"{held[name]} units" if name in held else "none" for held in (before, now))
            return f": {name} has {there} there, {here} here"
    return ""


def cut_torn_tail(journal: Path) -> None:
    """Drop an unfinished last record, which a kill or a full disk leaves; it is kept beside the journal."""
    if not journal.exists():
        return
    content = journal.read_bytes()
    end = content.rfind(b"\n") + 1
    while end:
        start = content.rfind(b"\n", 0, end - 1) + 1
        if _is_record(content[start:end]):
            break
        end = start
    if end < len(content):
        journal.with_suffix(".torn").write_bytes(content[end:])
        with journal.open("r+b") as file:
            file.truncate(end)


@contextmanager
def _locked(journal: Path) -> Iterator[None]:
    """While no process writes."""
    lock = _Lock(journal)
    lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _ends_whole(journal: Path) -> bool:
    """Whether the last record is complete, as far as its end tells."""
    if not journal.exists() or not journal.stat().st_size:
        return True
    with journal.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read() == b"\n"


def _is_record(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except ValueError:
        return False
