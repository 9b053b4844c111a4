"""BatchNorm recalibration: the statistics of the dense model are wrong for a candidate (Li et al. 2020, EagleEye)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from ..spaces.errors import CalibrationError
from ..spaces.inputs import Inputs
from ..spaces.trace import evaluating

#: Fewer samples than this give statistics that are mostly noise.
MIN_SAMPLES = 128


def batch_norms(model: nn.Module) -> list[nn.modules.batchnorm._BatchNorm]:
    """The layers that keep running statistics."""
    kinds = nn.modules.batchnorm._BatchNorm
    return [m for m in model.modules() if isinstance(m, kinds) and m.track_running_stats]


def check_calibration(model: nn.Module, calibration: Iterable[Any] | None) -> None:
    """Raises CalibrationError if ``model`` has BatchNorm and ``calibration`` does not serve every candidate.

    It must be readable again and again (no generator), and give at least ``MIN_SAMPLES`` samples.
    """
    layers = len(batch_norms(model))
    if not layers:
        return
    if calibration is None:
        raise CalibrationError(f"the model has {layers} BatchNorm layers: pass calibration=, batches of training data")
    if isinstance(calibration, Iterator):
        raise CalibrationError(
            "calibration is a generator, which is empty after one reading, and every candidate reads it; "
            "pass a DataLoader or a list of batches"
        )
    samples = sum(len(_first_tensor(batch)) for batch in calibration)
    if samples < MIN_SAMPLES:
        raise CalibrationError(
            f"calibration gives {samples} samples, and BatchNorm statistics need at least {MIN_SAMPLES}; "
            "pass more training data"
        )


def recalibrate(model: nn.Module, calibration: Iterable[Any] | None, arguments: int = 1) -> None:
    """Replace the running statistics of every BatchNorm layer by their average over ``calibration``.

    A batch is a tensor, a mapping of keyword arguments, or a tuple or list whose first ``arguments`` items are the
    model's arguments.
    """
    layers = batch_norms(model)
    if not layers or calibration is None:
        return
    momenta = [layer.momentum for layer in layers]
    try:
        with evaluating(model), torch.no_grad():
            for layer in layers:
                layer.reset_running_stats()
                layer.momentum = None  # a cumulative average
                layer.train()
            for batch in calibration:
                Inputs.of(batch[:arguments] if isinstance(batch, tuple | list) else batch).call(model)
    finally:
        for layer, momentum in zip(layers, momenta, strict=True):
            layer.momentum = momentum


def _first_tensor(batch: Any) -> torch.Tensor:
    if isinstance(batch, Mapping):
        batch = list(batch.values())
    first = batch[0] if isinstance(batch, tuple | list) and batch else batch
    if not isinstance(first, torch.Tensor):
        raise CalibrationError(f"a calibration batch must be a tensor or start with one, not {type(batch).__name__}")
    return first
