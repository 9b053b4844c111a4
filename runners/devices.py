"""The devices that the user names."""

from __future__ import annotations

from dataclasses import replace

import torch
from omegaconf import DictConfig

from ..spaces.devices import CPU, check_device
from ..spaces.errors import ConfigError
from .tasks import Task


def use_device(name: str) -> None:
    """Check it, and make it the one that ``.cuda()`` means. Raises ConfigError."""
    check_device(name)
    if name != CPU:
        torch.cuda.set_device(torch.device(name).index or 0)


def devices_of(config: DictConfig) -> list[str]:
    """Of a search; none where models stay where the task makes them.

    Raises:
        ConfigError: one cannot be used, or there are fewer processes than devices.
    """
    devices = list(config.devices)
    for device in devices:
        check_device(device)
    if config.workers is not None and config.workers < max(1, len(devices)):
        raise ConfigError(
            f"workers must be at least {max(1, len(devices))}, not {config.workers}"
            + (f": there are {len(devices)} devices, and each needs a process" if len(devices) > 1 else "")
        )
    return devices


def placed(task: Task, device: str | None) -> Task:
    """``task`` with its model on ``device``, which what the model is given follows; None: as it is."""
    if device is None:
        return task
    use_device(device)
    return replace(task, make_model=lambda: task.make_model().to(device), device=device)
