"""The user's own model and functions, named in the configuration."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from hydra.utils import get_method
from torch import nn

from ...spaces.devices import device_of
from ...spaces.errors import ConfigError
from .base import Task


def custom(
    model: nn.Module | None = None,
    score: str | None = None,
    test: str | None = None,
    calibration: Iterable[Any] | None = None,
    loss: str | None = None,
    example_inputs: Any = None,
    score_name: str = "score",
    autocast: str | None = None,
    training: Iterable[Any] | None = None,
) -> Task:
    """``score`` and ``test`` name functions of a model (``my_module.accuracy``), ``loss`` one of an output and a
    calibration or training batch; the rest are instances. ``training``: a loader, read once an epoch. Without ``score``
    it is the fidelity to the dense model's outputs on ``calibration``, which needs no labels.

    ``example_inputs`` is a tensor, a sequence of them, or a mapping of keyword arguments; without it, the first sample
    of ``calibration``.

    Raises:
        ConfigError: a part is missing, is of the wrong kind, or names something that does not exist.
    """
    if not isinstance(model, nn.Module):
        raise ConfigError(
            f"task.model must make a torch.nn.Module, not {type(model).__name__}; "
            "set task.model._target_=my_module.MyModel (a class or a function) and its arguments task.model.<name>=..."
        )
    return Task(
        make_model=lambda: model,
        example_inputs=_inputs(example_inputs, calibration),
        calibration=calibration,
        loss=None if loss is None else _function(loss, "loss"),
        training=None if training is None else lambda seed: training,
        score=None if score is None else _function(score, "score"),
        test=None if test is None else _function(test, "test"),
        score_name=score_name,
        autocast=None if autocast is None else _dtype(autocast),
        device=str(device_of(model)),
        held=model,
    )


def _inputs(example_inputs: Any, calibration: Iterable[Any] | None) -> Any:
    if example_inputs is not None:
        return tuple(example_inputs) if isinstance(example_inputs, list) else example_inputs
    batch = next(iter(calibration or ()), None)
    first = batch[0] if isinstance(batch, tuple | list) and batch else batch
    if not isinstance(first, torch.Tensor):
        raise ConfigError(
            "task.example_inputs is not set, and task.calibration gives no batches that start with a tensor; "
            "set task.example_inputs._target_=torch.randn 'task.example_inputs.size=[1,3,224,224]'"
        )
    return (first[:1],)


def _function(path: str, key: str) -> Callable[..., Any]:
    try:
        function: Callable[..., Any] = get_method(path)
    except Exception as error:  # Hydra wraps whatever the import of the user's module raises
        raise ConfigError(f"task.{key}={path} cannot be imported: {error}") from error
    return function


def _dtype(name: str) -> torch.dtype:
    types = {"bfloat16": torch.bfloat16, "float16": torch.float16}
    if name not in types:
        raise ConfigError(f"task.autocast must be one of {', '.join(types)}, not {name!r}")
    return types[name]
