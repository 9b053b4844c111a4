"""``load-check``: a saved model loads, has the size that was written down, and runs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from ..search.files import METRICS, read_json, resolve
from ..search.saved import load
from ..spaces.errors import StorageError
from ..spaces.inputs import Inputs, output_tensors
from .exporting.inputs import stored_inputs


def check_model(path: Path) -> Iterator[str]:
    """Yields what holds, one line each.

    Raises:
        StorageError: what does not.
    """
    folder = resolve(path)
    metrics = read_json(folder / METRICS)
    model = load(folder)
    yield f"{folder}: checksums match, all weights loaded"
    params = sum(parameter.numel() for parameter in model.parameters())
    _compare("parameters", params, metrics.get("params"), folder)
    yield f"{params:,} parameters, as {METRICS} says"
    inputs = stored_inputs(folder)
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        outputs = _run(model, inputs, folder)
    macs = counter.get_total_flops() // 2
    _compare("MACs", macs, metrics.get("macs"), folder)
    yield f"{macs:,} MACs by torch's flop counter, as {METRICS} says"
    if not all(bool(torch.isfinite(output).all()) for output in outputs):
        raise StorageError(f"the model in {folder} gives outputs that are not finite")
    shapes = ", ".join(str(tuple(output.shape)) for output in outputs)
    yield f"random inputs of the stored shapes give finite outputs {shapes}"


def _compare(name: str, found: int, expected: Any, folder: Path) -> None:
    if found != expected:
        raise StorageError(f"the model in {folder} has {found:,} {name}, and {METRICS} says {expected}")


def _run(model: nn.Module, inputs: Inputs, folder: Path) -> list[torch.Tensor]:
    try:
        return output_tensors(inputs.call(model))
    except Exception as error:  # whatever the model's forward raises
        raise StorageError(f"the model in {folder} does not run: {type(error).__name__}: {error}") from error
