"""The devices that the user names."""

from __future__ import annotations

from dataclasses import replace

import torch
from omegaconf import DictConfig

from ..spaces.errors import ConfigError
from .tasks import Task

CPU = "cpu"


def check_device(name: str) -> None:
    """Raises ConfigError unless tensors can be put there."""
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ConfigError(f"the device {name} cannot be used here: {str(error).splitlines()[0]}") from error


def devices_of(config: DictConfig) -> list[str]:
    """Of a search, at least one. Raises ConfigError for one that cannot be used."""
    devices = list(config.devices) or [CPU]
    for device in devices:
        check_device(device)
    return devices


def placed(task: Task, device: str) -> Task:
    """``task`` with its model on ``device``; what the model is given follows it. Raises ConfigError."""
    if device == task.device:
        return task
    check_device(device)
    return replace(task, make_model=lambda: task.make_model().to(device), device=device)
