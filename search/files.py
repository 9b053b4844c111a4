"""What runs and models are described by on disk: JSON and where it lies. No pickle, and no torch."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..spaces.errors import StorageError

FORMAT = 1
PLAN, WEIGHTS, METRICS = "plan.json", "weights.safetensors", "metrics.json"
#: Of a run: what was searched, and what was found.
SPACE, RESULT = "space.json", "result.json"
#: Bytes of the largest JSON file that is read; plans of large models have a few MiB.
JSON_LIMIT = 256 << 20
#: Folder of what was trained on from a saved model, inside the folder of that.
FINETUNED = "finetuned"
#: The dense model's place among a run's models.
DENSE = "dense"
#: Between the names of a model and of the recipe that it was fine-tuned with.
TUNED = "+"


def resolve(path: Path) -> Path:
    """The folder of a saved model: ``path`` itself, or of the run in ``path`` the model that the run means."""
    if (path / PLAN).exists() or not (path / RESULT).exists():
        return path
    result = read_json(path / RESULT)
    meant = model_meant(result.get("picked"), [*saved_front(path, result), *finetuned(path)], has_budget(path))
    return folder_of(path, meant["name"])


def model_meant(picked: Any, entries: Sequence[Mapping[str, Any]], has_budget: bool) -> Mapping[str, Any]:
    """Of a run's ``entries``, name and metrics of each model, the one that is taken where none is named: of the
    ``picked`` one as it was found, or fine-tuned, and within a budget of all, what has the highest score."""
    own = [entry for entry in entries if entry["name"].partition(TUNED)[0] == picked]
    # All hold the run's own budget. Of equals the pick comes first.
    return max([*own, *(entries if has_budget else ())], key=lambda entry: entry.get("score", -math.inf))


def saved_front(run_dir: Path, result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The models in ``result``, a run's ``result.json``. Raises StorageError for names that are no folders' names, and
    where the picked model is not among them."""
    front = result.get("front")
    entries = front if isinstance(front, list) and all(isinstance(entry, dict) for entry in front) else []
    names = [entry.get("name") for entry in entries]
    are_names = all(isinstance(name, str) and Path(name).name == name and name not in ("", "..") for name in names)
    if not are_names or result.get("picked") not in names:
        raise StorageError(f"{run_dir / RESULT} is damaged: it does not describe a front with a picked model")
    return entries


def finetuned(run_dir: Path) -> list[dict[str, Any]]:
    """Name and metrics of what was fine-tuned of all models in the run's ``front``, those that a longer search has left
    behind too."""
    found = []
    for path in sorted((run_dir / "front").glob(f"*/{FINETUNED}/*/{METRICS}")):
        folder = path.parent
        # The curves of the training are in the file for those who want them.
        metrics = {key: value for key, value in read_json(path).items() if not isinstance(value, dict | list)}
        found.append({"name": f"{folder.parent.parent.name}{TUNED}{folder.name}", **metrics})
    return found


def folder_of(run_dir: Path, name: str) -> Path:
    """Where the model of that name is saved: ``dense``, ``trial0012``; ``trial0012+sgd`` after fine-tuning."""
    found, _, recipe = name.partition(TUNED)
    folder = run_dir / DENSE if found == DENSE else run_dir / "front" / found
    return folder / FINETUNED / recipe if recipe else folder


def has_budget(run_dir: Path) -> bool:
    """Whether all models of the run hold a budget, so that the best score decides."""
    search = read_json(run_dir / SPACE).get("search") if (run_dir / SPACE).exists() else None
    return isinstance(search, dict) and bool(search.get("budget"))


def read_plan(directory: Path) -> dict[str, Any]:
    """The content of ``plan.json``, checked against its own checksum."""
    content = read_json(directory / PLAN)
    found = content.get("format")
    if found != FORMAT:
        raise StorageError(f"{directory / PLAN} has format {found!r}, and this version of prunefront reads {FORMAT}")
    if content.get("sha256") != digest({key: value for key, value in content.items() if key != "sha256"}):
        raise StorageError(f"{directory / PLAN} was changed after it was written: its checksum differs")
    return content


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises StorageError if ``path`` is missing or holds something else."""
    try:
        if path.stat().st_size > JSON_LIMIT:
            raise StorageError(f"{path} has more than {JSON_LIMIT >> 20} MiB: it is no file that a search has written")
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise StorageError(f"{path} does not exist; expected a folder that a search has written") from error
    except (OSError, ValueError) as error:
        raise StorageError(f"{path} is damaged: {error}") from error
    if not isinstance(content, dict):
        raise StorageError(f"{path} is damaged: it holds no JSON object")
    return content


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    write_text(path, json.dumps(content, indent=1))


def write_text(path: Path, text: str) -> None:
    """Write at once: a reader sees the old file or the new one."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def digest(content: Mapping[str, Any]) -> str:
    """The checksum of a JSON object."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
