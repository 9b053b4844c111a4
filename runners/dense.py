"""The dense model of a run, which its folder keeps: made or trained once, scored once, shared by all processes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from torch import nn

from ..search import load
from ..search.candidates import score_dense
from ..search.files import METRICS, read_json, write_json
from ..search.formats import FIDELITY
from ..search.saved import load_with, save_model
from ..spaces import Space, discover
from ..spaces.devices import CPU
from ..spaces.errors import SearchError, StorageError
from .making import plain
from .runs import DENSE
from .tasks import Task

#: Keys of a task that a search makes no use of: other values are no other task.
TRAINING_KEYS = ("training", "batch_size")
#: What a task is made by, and the option that names a saved model to start from.
TARGET, START = "task._target_", "start"


def prepare(
    task: Task, config: DictConfig, run_dir: Path, start: str | Path | None = None, joins: bool = False
) -> Space:
    """The space of the dense model, which the run keeps in ``dense`` before anything of it can fail: it may have been
    trained.

    ``start``: a saved model that is the dense one instead of the task's. ``joins``: the run is another process's.

    Raises:
        SearchError: the run directory belongs to another task.
    """
    folder, described = run_dir / DENSE, described_task(config, start)
    kept = read_json(folder / METRICS) if folder.exists() else None
    if kept is not None and (differing := differences(kept.get("task"), described)):
        if joins or "score" in kept:
            told = "; ".join(differing)
            raise SearchError(f"{run_dir} belongs to another task, with {told}: choose another run_dir")
        kept = None  # nothing has come of it: its score failed, for example
    if kept is not None:
        return discover_for(task, kept_model(folder, task, start), config)
    model = task.make_model() if start is None else load(Path(start)).to(task.device)
    save_model(folder, model, None, {"task": described}, task.example_inputs)
    if task.device == CPU:  # where all processes can share the file
        model = kept_model(folder, task, start, model)
    return discover_for(task, model, config)


def described_task(config: DictConfig, start: str | Path | None) -> str:
    """What says whether another search has the same dense model, as text."""
    described = {key: value for key, value in plain(config.task).items() if key not in TRAINING_KEYS}
    return json.dumps(described if start is None else {**described, START: str(start)}, sort_keys=True)


def differences(there: Any, here: str) -> list[str]:
    """The options in which two tasks differ, as :func:`described_task` says them."""
    before, now = (options_of(json.loads(text)) if isinstance(text, str) else {} for text in (there, here))
    changed = [key for key in {**before, **now} if before.get(key) != now.get(key)]
    if TARGET in changed:  # all others are another task's
        changed = [TARGET]
    return [f"{key}={before.get(key)}, not {now.get(key)}" for key in changed]


def options_of(config: Mapping[str, Any], prefix: str = "task.") -> dict[str, Any]:
    """Values by their whole names, as in ``task.config.hidden_size``."""
    found: dict[str, Any] = {}
    for key, value in config.items():
        name = key if key == START else f"{prefix}{key}"
        found |= options_of(value, f"{name}.") if isinstance(value, Mapping) else {name: value}
    return found


def scored_dense(task: Task, space: Space, run_dir: Path) -> dict[str, Any]:
    """Costs and scores of the dense model of ``space``, with their ``score_name``; the run keeps them."""
    path = run_dir / DENSE / METRICS
    kept = read_json(path)
    if "score" not in kept:
        name = FIDELITY if task.score is None else task.score_name
        kept |= {**asdict(space.dense_cost), **dense_scores(task, space.model), "score_name": name}
        write_json(path, kept)
    return {"score_name": task.score_name, **{key: value for key, value in kept.items() if key != "task"}}


def dense_scores(task: Task, model: nn.Module) -> dict[str, float]:
    """The score and the test score of the dense model. Raises ConfigError when it cannot be scored."""
    # Without a score it is fidelity, and that to itself is known: no difference at all.
    functions = {"score": task.score or (lambda _: 0.0), "test": task.test}
    return {
        name: score_dense(model, function, f"task.{name}", task.autocast)
        for name, function in functions.items()
        if function is not None
    }


def kept_model(folder: Path, task: Task, start: str | Path | None, made: nn.Module | None = None) -> nn.Module:
    """The dense model from the run's folder: on the processor all processes map the same file, so that memory holds its
    weights once. ``made``: the one that was saved there, where this process has done so."""
    try:
        model = load_with(folder, task.make_model if made is None else lambda: made).to(task.device)
    except StorageError:
        if made is not None:
            return made
        if task.trains or start is not None:
            raise
        return task.make_model()  # of a class that has not been imported yet, for example
    if task.held is not None and start is None and task.device == CPU:
        share_weights(task.held, model)
    return model


def share_weights(model: nn.Module, other: nn.Module) -> None:
    """Let ``model`` have the tensors of ``other`` instead of its own, where all are equal."""
    theirs = {**dict(other.named_parameters()), **dict(other.named_buffers())}
    own = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    if own.keys() == theirs.keys() and all(torch.equal(tensor, theirs[name]) for name, tensor in own.items()):
        for name, tensor in own.items():
            tensor.data = theirs[name].data


def discover_for(task: Task, model: nn.Module, config: DictConfig) -> Space:
    return discover(
        model,
        task.example_inputs,
        calibration=task.calibration,
        loss=task.loss,
        autocast=task.autocast,
        seed=config.seed,
        **plain(config.space),
    )


def dense_line(dense: Mapping[str, Any], seconds: float) -> str:
    """What the search starts from, and how long it took to get there: a task may train its model first."""
    scores = f"{dense['score_name']} {dense['score']:.4f}"
    if "test" in dense:
        scores += f" (test {dense['test']:.4f})"
    return f"dense: {scores}, {dense['macs']:,} MACs, {dense['params']:,} params, ready in {seconds:.1f} s"
