"""``prunefront finetune``: picked models of a run, each trained back and saved beside its plan."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from torch import nn

from ...search.saved import FINETUNED, METRICS, load_with, read_json, read_plan
from ...spaces import Plan
from ...spaces.errors import ConfigError
from ..commands import best_within, instantiated, make_task, plain
from ..display import TrainingProgress, console, finetuned_table
from ..runs import read_run
from ..tasks import Task
from ..tracking import Guarded
from .engine import Finetuned, finetune
from .recipe import Recipe

#: The dense model's place among the picks.
DENSE = "dense"


def command(config: DictConfig) -> None:
    """Train picked models of a run back, with or without the dense model as a teacher."""
    run_dir = Path(config.run)
    run = read_run(run_dir)
    names = picks(run, config.pick)
    task = make_task(config)
    done = trained(config, task, run_dir, names)
    console.print(finetuned_table({pick: found.metrics for pick, found in done.items()}, run["dense"], task.score_name))
    for found in done.values():
        console.print(f'load    prunefront.load("{found.path}")', soft_wrap=True, highlight=False)


def trained(
    config: DictConfig, task: Task, run_dir: Path, names: Sequence[str], history: Sequence[Any] = ()
) -> dict[str, Finetuned]:
    """The models ``names`` of a run, fine-tuned and saved beside themselves. ``history``: what is written down of the
    rounds before.

    Raises:
        ConfigError: the task has no training split, or the device cannot be used.
    """
    options = plain(config.finetune)
    name = options.pop("name")
    recipe = Recipe.of(options)
    if task.training is None:
        raise ConfigError(
            "the task has no training split to fine-tune on; set task.training._target_=my_module.loader"
            " and task.loss=my_module.loss"
        )
    check_device(config.device)
    teacher = load_with(run_dir / DENSE, task.make_model).to(config.device) if recipe.needs_dense else None
    done: dict[str, Finetuned] = {}
    for pick in names:
        source = run_dir / DENSE if pick == DENSE else run_dir / "front" / pick
        done[pick] = _one(config, task, recipe, teacher, run_dir, source / FINETUNED / name, history)
    return done


def picks(run: dict[str, Any], pick: DictConfig) -> list[str]:
    """Names of the models of the front that ``pick`` asks for. Raises ConfigError, SearchError."""
    known = [entry["name"] for entry in run["front"]]
    budget = {str(key): value for key, value in pick.items() if key != "names" and value is not None}
    if pick.names is None:
        return [best_within(run, budget)[0] if budget else run["picked"]]
    if budget:
        raise ConfigError("pick takes names or a budget, not both")
    names = known if pick.names == "all" else [pick.names] if isinstance(pick.names, str) else list(pick.names)
    if unknown := [name for name in names if name not in (*known, DENSE)]:
        raise ConfigError(f"pick: the front has no {', '.join(map(str, unknown))}; it has {', '.join(known)}")
    return names


def check_device(name: str) -> None:
    """Raises ConfigError unless tensors can be put there."""
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ConfigError(f"device={name} cannot be used here: {str(error).splitlines()[0]}") from error


def _one(
    config: DictConfig,
    task: Task,
    recipe: Recipe,
    teacher: nn.Module | None,
    run_dir: Path,
    folder: Path,
    history: Sequence[Any],
) -> Finetuned:
    """Fine-tune the model in whose folder ``folder`` lies."""
    source = folder.parent.parent
    assert task.training is not None
    tracker = Guarded(instantiated(config.tracker, "tracker", ConfigError))
    title = f"{source.name}/{folder.name}"
    tracker.start_finetuning(plain(config), run_dir, title)
    found = None
    try:
        with TrainingProgress(title) as progress:
            found = finetune(
                load_with(source, task.make_model).to(config.device),
                training=task.training,
                loss=task.loss,
                score=task.score,
                test=task.test,
                recipe=recipe,
                teacher=teacher,
                autocast=task.autocast,
                example_inputs=task.example_inputs,
                plan=None if source.name == DENSE else Plan.from_json(read_plan(source)["plan"]),
                metrics=read_json(source / METRICS) | ({"history": list(history)} if history else {}),
                run_dir=folder,
                restart=config.restart,
                callbacks=(progress, tracker.step),
            )
    finally:
        tracker.finish_finetuning(None if found is None else found.metrics)
    return found
