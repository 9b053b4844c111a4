"""The Optuna study of a run: journal storage that survives a kill, and samplers by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import optuna
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend

from ..spaces import Space
from ..spaces.errors import ConfigError, SearchError, StorageError

#: Above this number of trials CMA-ES finds more in the same time than a Gaussian process.
GP_TRIALS = 250
SAMPLERS = ("auto", "gp", "cmaes", "tpe", "random")


def make_sampler(name: str, n_trials: int, dimensions: int, seed: int) -> optuna.samplers.BaseSampler:
    """Optuna's own sampler behind ``name``; ``auto`` is gp up to 250 trials and cmaes beyond.

    Raises:
        ConfigError: unknown name.
    """
    if name not in SAMPLERS:
        raise ConfigError(f"unknown sampler {name!r}; expected one of {', '.join(SAMPLERS)}")
    if name == "auto":
        name = "gp" if n_trials <= GP_TRIALS or dimensions == 1 else "cmaes"
    if name == "gp":
        return optuna.samplers.GPSampler(seed=seed)
    if name == "cmaes":
        return optuna.samplers.CmaEsSampler(seed=seed)
    return optuna.samplers.TPESampler(seed=seed) if name == "tpe" else optuna.samplers.RandomSampler(seed=seed)


def open_study(
    run_dir: Path, space: Space, header: dict[str, Any], sampler: optuna.samplers.BaseSampler
) -> optuna.Study:
    """Create the study of ``run_dir``, or continue it. Trials that a dead process left running are marked failed.

    Raises:
        SearchError: the directory belongs to another model or search.
        StorageError: the directory cannot be written or its journal cannot be read.
    """
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        _check_owner(run_dir / "space.json", space, header)
        journal = run_dir / "study.journal"
        cut_torn_tail(journal)
        storage = JournalStorage(JournalFileBackend(str(journal)))
        study = optuna.create_study(
            storage=storage, sampler=sampler, study_name="prunefront", direction="maximize", load_if_exists=True
        )
    except OSError as error:
        raise StorageError(f"cannot write the run directory {run_dir}: {error}") from error
    for trial in study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.RUNNING,)):
        study.tell(trial.number, state=optuna.trial.TrialState.FAIL)
    return study


def _check_owner(path: Path, space: Space, header: dict[str, Any]) -> None:
    described = {
        "fingerprint": space.fingerprint,
        "search": header,
        "groups": [{"name": g.name, "kind": g.kind, "size": g.size, "exact": g.exact} for g in space.groups],
        "frozen": [{"name": frozen.name, "reason": frozen.reason} for frozen in space.frozen],
    }
    if not path.exists():
        temporary = path.with_suffix(".tmp")
        temporary.write_text(json.dumps(described, indent=1), encoding="utf-8")
        temporary.replace(path)
        return
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        owner = found["fingerprint"], found["search"]
    except (ValueError, KeyError, TypeError) as error:
        raise StorageError(f"{path} is damaged: {error!r}; choose another run_dir") from error
    if owner != (space.fingerprint, header):
        raise SearchError(
            f"the run directory {path.parent} belongs to another model or search ({owner[1]}); choose another run_dir"
        )


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
