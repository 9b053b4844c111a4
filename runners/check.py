"""``load-check``: a saved model loads, has the size that was written down, and runs."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from ..search.saved import METRICS, load, read_json, read_plan, resolve
from ..spaces.errors import StorageError
from ..spaces.inputs import Inputs, output_tensors


def check_model(path: Path) -> Iterator[str]:
    """Yields what holds, one line each.

    Raises:
        StorageError: what does not.
    """
    folder = resolve(path)
    content, metrics = read_plan(folder), read_json(folder / METRICS)
    model = load(folder)
    yield f"{folder}: checksums match, all weights loaded"
    params = sum(parameter.numel() for parameter in model.parameters())
    _compare("parameters", params, metrics.get("params"), folder)
    yield f"{params:,} parameters, as {METRICS} says"
    arguments = tuple(_example(described, folder) for described in content["inputs"])
    keywords = {name: _example(described, folder) for name, described in content.get("keyword_inputs", {}).items()}
    inputs = Inputs(arguments, keywords)
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


def _example(described: Any, folder: Path) -> Any:
    if not isinstance(described, dict):
        try:
            return ast.literal_eval(described)  # a plain value
        except (ValueError, SyntaxError) as error:
            raise StorageError(
                f"the model in {folder} was made for an input that is no tensor ({described})"
            ) from error
    dtype = getattr(torch, str(described.get("dtype")), None)
    if not isinstance(dtype, torch.dtype):
        raise StorageError(f"the inputs in {folder} are damaged: {described}")
    shape = described["shape"]
    # Zero is a valid index, token or mask in any model; random numbers are not.
    return torch.randn(shape, dtype=dtype) if dtype.is_floating_point else torch.zeros(shape, dtype=dtype)


def _run(model: nn.Module, inputs: Inputs, folder: Path) -> list[torch.Tensor]:
    try:
        return output_tensors(inputs.call(model))
    except Exception as error:  # whatever the model's forward raises
        raise StorageError(f"the model in {folder} does not run: {type(error).__name__}: {error}") from error
