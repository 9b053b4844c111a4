"""What searches and multiruns leave in their folders."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from ..search.files import DENSE, METRICS, PLAN, RESULT, SPACE, finetuned, read_json, saved_front
from ..search.files import folder_of as folder_of
from ..spaces import Cost
from ..spaces.errors import StorageError
from .overrides import without_secret

#: What Hydra leaves in the folder of several runs.
MULTIRUN = "multirun.yaml"


def is_multirun(folder: Path) -> bool:
    """Whether the runs are in folders of this one."""
    return (folder / MULTIRUN).exists()


def run_folders(multirun: Path) -> list[Path]:
    """The folders of jobs in that of a multirun, in their order; others, such as W&B's, are not."""
    found = [path for path in multirun.iterdir() if path.is_dir() and _is_of_a_job(path)]
    return sorted(found, key=lambda path: (len(path.name), path.name))


def _is_of_a_job(folder: Path) -> bool:
    return folder.name.isdigit() or any((folder / name).exists() for name in (".hydra", SPACE))


def _run_of(model: Path) -> Path | None:
    """The run in whose front the folder of a model is."""
    return next((folder for folder in model.parents[:2] if (folder / SPACE).exists()), None)


def read_run(run_dir: Path) -> dict[str, Any]:
    """What a finished search has left: result.json, with ``dense`` (its metrics as far as known), ``space``,
    ``finetuned`` (entries like those of the front, of what was trained from its models), ``score_name`` and ``path``.

    Raises:
        StorageError: this is no finished run, or it is damaged.
    """
    if not run_dir.is_dir():
        raise StorageError(f"{run_dir} does not exist; expected the folder of a run")
    if not (run_dir / SPACE).exists():
        if (run_dir / PLAN).exists() and (run := _run_of(run_dir)):
            named = shlex.join([str(run), f"pick={run_dir.name}"])
            raise StorageError(f"{run_dir} is one model of a run: name the run, and the model: {named}")
        inside = sorted(path.parent.name for path in run_dir.glob(f"*/{SPACE}"))
        named = f"; name one of those in it, such as {run_dir / inside[-1]}" if inside else ""
        raise StorageError(f"{run_dir} is no run of a search: it has no {SPACE}{named}")
    if not (run_dir / RESULT).exists():
        command = shlex.join(["prunefront", "search", f"resume={run_dir}"])
        raise StorageError(f"{run_dir} is no finished run: it has no {RESULT}; finish it with {command}")
    result, space = read_json(run_dir / RESULT), read_json(run_dir / SPACE)
    dense = {**space.get("dense_cost", {}), **result.get("dense", {})}
    if (run_dir / DENSE / METRICS).exists():
        dense |= read_json(run_dir / DENSE / METRICS)
    front = saved_front(run_dir, result)
    if result.get("objective") not in dense:
        raise StorageError(f"{run_dir / RESULT} is damaged: it does not say what the front is against")
    return {
        **result,
        "front": front,
        "dense": dense,
        "space": space,
        "finetuned": finetuned(run_dir),
        "score_name": dense.pop("score_name", "score"),
        "path": str(run_dir),
    }


def models_of(run: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """All models of a run, as :func:`read_run` has it: those of the front, and what was fine-tuned."""
    return [*run["front"], *run["finetuned"]]


def dense_cost(dense: Mapping[str, Any]) -> Cost:
    """Of the dense model's metrics, as :func:`read_run` has them."""
    return Cost(**{key: dense[key] for key in Cost.__dataclass_fields__})


def own_overrides(run_dir: Path) -> list[str]:
    """What the run was started with; nothing where that is not known."""
    path = run_dir / ".hydra" / "overrides.yaml"
    return [without_secret(str(text)) for text in OmegaConf.load(path)] if path.exists() else []


def differing_overrides(by_run: Sequence[Sequence[str]]) -> list[str]:
    """Of every run, those that not all have, as one text."""
    shared = set(by_run[0]).intersection(*by_run[1:])
    return [" ".join(text for text in overrides if text not in shared) or "-" for overrides in by_run]
