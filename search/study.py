"""The Optuna study of a run: journal storage that survives a kill, and samplers by name."""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import optuna
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend, JournalFileSymlinkLock
from optuna.study import StudyDirection
from optuna.trial import TrialState

from ..spaces import Space
from ..spaces.errors import SearchError, StorageError
from .saved import read_json, write_json

STUDY_NAME = "prunefront"
#: Of a score and a cost.
DIRECTIONS = (StudyDirection.MAXIMIZE, StudyDirection.MINIMIZE)
#: A lock of the journal that nobody has renewed for so long belongs to a process that was killed.
LOCK_GRACE_S = 30


def storage_of(journal: Path) -> JournalStorage:
    """Optuna's journal storage, which takes over the lock of a killed process after ``LOCK_GRACE_S``.

    Its lock is a symbolic link to the path as given: a relative one leads nowhere, and is waited for forever.
    """
    path = str(journal.resolve())
    return JournalStorage(JournalFileBackend(path, lock_obj=JournalFileSymlinkLock(path, grace_period=LOCK_GRACE_S)))


def finished(study: optuna.Study) -> list[optuna.trial.FrozenTrial]:
    """Trials with a score."""
    return study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))


def open_study(run_dir: Path, metrics: Sequence[str]) -> optuna.Study:
    """Create the study of ``run_dir``, or continue it. ``metrics``: of a score, and of a cost along a front.

    Trials that a dead process left running are marked failed, and their proposals wait to be tried again.

    Raises:
        StorageError: the journal cannot be read.
    """
    journal = run_dir / "study.journal"
    cut_torn_tail(journal)
    study = optuna.create_study(
        storage=storage_of(journal),
        study_name=STUDY_NAME,
        directions=DIRECTIONS[: len(metrics)],
        load_if_exists=True,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        study.set_metric_names(list(metrics))
    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        study.tell(trial.number, state=TrialState.FAIL)
        study.enqueue_trial(trial.params)
    return study


def read_study(run_dir: Path) -> optuna.Study:
    """The study of a run, to look at.

    Raises:
        StorageError: there is none.
    """
    journal = run_dir / "study.journal"
    if not journal.exists():
        raise StorageError(f"{run_dir} is no run: it has no study.journal")
    return optuna.load_study(study_name=STUDY_NAME, storage=storage_of(journal))


def check_owner(run_dir: Path, space: Space, header: dict[str, Any]) -> None:
    """Write down whose run this is, or compare.

    Raises:
        SearchError: the directory belongs to another model or search.
        StorageError: its ``space.json`` is damaged.
    """
    path = run_dir / "space.json"
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
        return
    found = read_json(path)
    if "fingerprint" not in found or not isinstance(found.get("search"), dict):
        raise StorageError(f"{path} is damaged: it does not describe a search; choose another run_dir")
    differing = [key for key, value in header.items() if found["search"].get(key) != value]
    if "weights" in differing or (not differing and found["fingerprint"] != space.fingerprint):
        raise SearchError(f"the run directory {run_dir} belongs to another model; choose another run_dir")
    if differing:
        changes = ", ".join(f"{key} {found['search'].get(key)!r}, not {header[key]!r}" for key in differing)
        raise SearchError(f"the run in {run_dir} has {changes}; choose another run_dir, or continue with the same")


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


def _is_record(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except ValueError:
        return False
