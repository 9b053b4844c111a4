"""What runs and models are described by on disk: JSON and where it lies. No pickle, and no torch."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping
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


def resolve(path: Path) -> Path:
    """The folder of a saved model: ``path`` itself, or of the run in ``path`` what has the highest score: of the picked
    model as it was found, or fine-tuned, or within a budget of all that were found or fine-tuned."""
    if (path / PLAN).exists() or not (path / RESULT).exists():
        return path
    result = read_json(path / RESULT)
    names = [result.get("picked")]
    if has_budget(path):
        names += [entry.get("name") for entry in result.get("front", [])]
    if not all(isinstance(name, str) and Path(name).name == name for name in names):
        raise StorageError(f"{path / RESULT} is damaged: it names no picked model")
    found = [path / "front" / name for name in dict.fromkeys(map(str, names))]
    versions = [found[0], *(m.parent for f in found for m in sorted(f.glob(f"{FINETUNED}/*/{METRICS}")))]
    if len(versions) == 1:
        return found[0]
    return max(versions, key=lambda folder: read_json(folder / METRICS).get("score", -math.inf))


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
