"""``prunefront finetune``: picked models of a run, each trained back and saved beside its plan."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from torch import nn

from ...search.files import DENSE, FINETUNED, METRICS, TUNED, folder_of, read_json, read_plan
from ...search.saved import load_with
from ...spaces import Plan
from ...spaces.errors import ConfigError
from ..devices import use_device
from ..display import console, errors, finetuned_table, show_load
from ..making import instantiated, make_task, plain
from ..picking import picked, picks
from ..report import write_report
from ..runs import models_of, read_run
from ..tasks import Task
from ..tracking import Guarded
from .engine import Finetuned, finetune
from .progress import TrainingProgress
from .recipe import Recipe


def command(config: DictConfig) -> None:
    """Train picked models of a run back, with or without the dense model as a teacher."""
    run_dir = Path(config.run)
    run = read_run(run_dir)
    names = picks(run, config.pick, run["front"])
    task = make_task(config)
    done = trained(config, task, run_dir, names)
    console.print(finetuned_table({pick: found.metrics for pick, found in done.items()}, run["dense"], task.score_name))
    better = [pick for pick, found in done.items() if not got_worse(found.metrics)]
    if worse := [pick for pick in done if pick not in better]:
        told = f"{', '.join(worse)} got worse by fine-tuning: try a lower finetune.lr, or more epochs"
        errors.print(told, style="yellow", soft_wrap=True)
    run = read_run(run_dir)
    taken = picked(run, {}, models_of(run))["name"]
    console.print(f"picked  {folder_of(run_dir, taken)}", soft_wrap=True)
    for pick in dict.fromkeys([*better, taken]):
        show_load(folder_of(run_dir, pick))
    console.print(f"report  {write_report([run_dir], run_dir / 'report.html')}", soft_wrap=True)


def got_worse(metrics: Mapping[str, Any]) -> bool:
    """By the score on the search data, where there is one."""
    return {"score", "score_before"} <= metrics.keys() and metrics["score"] < metrics["score_before"]


def trained(
    config: DictConfig, task: Task, run_dir: Path, names: Sequence[str], history: Sequence[Any] = ()
) -> dict[str, Finetuned]:
    """The models ``names`` of a run, fine-tuned and saved beside themselves. ``history``: what is written down of the
    rounds before.

    Raises:
        ConfigError: no training split, a device that cannot be used, a name of the recipe that is no folder's.
    """
    options = plain(config.finetune)
    name = str(options.pop("name"))
    if not re.fullmatch(r"\w[\w.-]{0,63}", name):
        raise ConfigError(
            f"finetune.name={name!r} names a folder: letters, digits, and . _ - after the first, up to 64"
        )
    recipe = Recipe.of(options)
    if task.training is None:
        raise ConfigError(
            "the task has no training split to fine-tune on; set task.training._target_=my_module.loader"
            " and task.loss=my_module.loss"
        )
    use_device(config.device)
    teacher = load_with(run_dir / DENSE, task.make_model).to(config.device) if recipe.needs_dense else None
    done: dict[str, Finetuned] = {}
    for pick in names:
        folder = folder_of(run_dir, pick) / FINETUNED / name
        done[f"{pick}{TUNED}{name}"] = _one(config, task, recipe, teacher, run_dir, folder, history)
    return done


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
    title = f"{source.name}{TUNED}{folder.name}"
    tracker.start_finetuning(plain(config), run_dir, title)
    found = None
    try:
        with TrainingProgress(title, console) as progress:
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
