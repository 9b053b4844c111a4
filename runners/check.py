"""``load-check``: a saved model loads, has the size that was written down, and runs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn

from ..search.files import METRICS, read_json, resolve
from ..search.saved import load
from ..spaces.errors import StorageError
from ..spaces.inputs import Inputs, output_tensors
from .counting import counted
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
    outputs, costs = _run(model, stored_inputs(folder), folder)
    for key, unit in (("params", "parameters"), ("macs", "MACs by torch's flop counter")):
        if costs[key] != metrics.get(key):
            raise StorageError(
                f"the model in {folder} has {costs[key]:,} {unit}, and {METRICS} says {metrics.get(key)}"
            )
        yield f"{costs[key]:,} {unit}, as {METRICS} says"
    if not all(bool(torch.isfinite(output).all()) for output in outputs):
        raise StorageError(f"the model in {folder} gives outputs that are not finite")
    shapes = ", ".join(str(tuple(output.shape)) for output in outputs)
    yield f"random inputs of the stored shapes give finite outputs {shapes}"


def _run(model: nn.Module, inputs: Inputs, folder: Path) -> tuple[list[torch.Tensor], dict[str, int]]:
    try:
        output, costs = counted(model, inputs)
    except Exception as error:  # whatever the model's forward raises
        raise StorageError(f"the model in {folder} does not run: {type(error).__name__}: {error}") from error
    return output_tensors(output), costs
