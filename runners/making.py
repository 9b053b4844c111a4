"""What the options of a command make: the task, the sampler, what measures latency, the budget."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import hydra
import optuna
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf

from ..search.measurement import Settings
from ..search.timing import Timing
from ..spaces.errors import ConfigError, PrunefrontError
from .finetuning.trial import TrialTuning
from .modules import look_in_current_folder
from .tasks import Task

#: The budget of a search that names none.
DEFAULT_BUDGET = {"macs": "50%"}


def instantiated(config: DictConfig, name: str, own: type[PrunefrontError]) -> Any:
    """What ``_target_`` makes. Errors of the kind ``own`` are raised as they are, others as ConfigError."""
    try:
        return hydra.utils.instantiate(config, _convert_="all")
    except HydraException as error:
        if isinstance(error.__cause__, own):
            raise error.__cause__ from None
        raise ConfigError(f"the {name} cannot be made: {str(error).strip()}") from error


def make_task(config: DictConfig) -> Task:
    """Raises ConfigError for whatever keeps the task from being made."""
    look_in_current_folder()
    task = instantiated(config.task, "task", ConfigError)
    if not isinstance(task, Task):
        raise ConfigError(f"task._target_ must make a prunefront Task, not {type(task).__name__}")
    return task


def sampler_of(config: DictConfig) -> Any:
    """A name, or what ``_target_`` makes. Raises ConfigError for what is no sampler."""
    if isinstance(config.sampler, str):
        return config.sampler
    sampler = instantiated(config.sampler, "sampler", ConfigError)
    if not isinstance(sampler, optuna.samplers.BaseSampler):
        raise ConfigError(f"sampler._target_ must make an Optuna sampler, not {type(sampler).__name__}")
    return sampler


def tuning_of(config: DictConfig, task: Task) -> TrialTuning | None:
    """A moment of training for every candidate, or None. Raises ConfigError where the task cannot be trained on."""
    if not config.finetune_steps:
        return None
    return TrialTuning(task, config.finetune_steps, config.finetune_lr, config.seed)


def timing_of(config: DictConfig) -> Timing | None:
    """What measures latency, or None. Raises TargetError for what the target cannot do."""
    if "_target_" not in config.target:
        return None
    target = instantiated(config.target, "target", PrunefrontError)
    options = config.latency
    return Timing(
        target,
        error=options.error,
        most=options.most,
        limit_s=options.limit_s,
        settings=Settings(tolerance=options.tolerance, limit_s=options.measurement_s, seed=config.seed),
        cache=Path(options.cache).expanduser(),
        batch_size=options.batch_size,
        input_shapes=plain(options.input_shapes),
    )


def given_budget(config: DictConfig) -> dict[str, str]:
    return {str(key): value for key, value in config.budget.items() if value is not None}


def chosen_budget(config: DictConfig) -> dict[str, str]:
    """The given budget; half of the MACs where a search within a budget has none."""
    return given_budget(config) or ({} if config.mode == "front" else DEFAULT_BUDGET)


def plain(config: DictConfig) -> Any:
    return OmegaConf.to_container(config, resolve=True)
