"""Models as ONNX files, checked against torch."""

from __future__ import annotations

import importlib.util
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from ...spaces.errors import TargetError
from ...spaces.inputs import Inputs, output_tensors

#: Largest difference from torch's outputs, relative to the largest of them.
TOLERANCE = {"float32": 1e-3, "bfloat16": 0.1, "float16": 0.05}


def export_onnx(model: nn.Module, inputs: Inputs, path: Path) -> None:
    """Write ``model`` to ``path``, weights included.

    Raises:
        TargetError: the model cannot be exported, or onnxscript is missing.
    """
    if importlib.util.find_spec("onnxscript") is None:
        raise TargetError("this target exports to ONNX: pip install 'prunefront[onnx]'")
    try:
        with torch.no_grad(), _quiet():
            torch.onnx.export(
                model,
                inputs.args,
                str(path),
                kwargs=dict(inputs.kwargs or {}),
                dynamo=True,
                external_data=False,
                verbose=False,
            )
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else ""
        raise TargetError(
            f"the model cannot be exported to ONNX: {type(error).__name__}: {reason}; use target=torch, or make its "
            "forward exportable (torch.export.export says where it fails)"
        ) from error


def arrays_for(path: Path, inputs: Inputs) -> list[NDArray[Any]]:
    """Tensors of the inputs, in the order in which the exported model in ``path`` takes them."""
    import onnx

    names = [value.name for value in onnx.load(str(path)).graph.input]
    named = {name: value for name, value in (inputs.kwargs or {}).items() if isinstance(value, torch.Tensor)}
    unnamed = iter(Inputs(inputs.args).tensors())
    chosen = [named[name] if name in named else next(unnamed) for name in names]
    return [tensor.detach().cpu().numpy() for tensor in chosen]


def check_outputs(model: nn.Module, inputs: Inputs, outputs: Any, precision: str, where: str) -> None:
    """Raises TargetError where ``outputs`` of a runtime differ from those of ``model``."""
    with torch.no_grad():
        expected = output_tensors(inputs.call(model))[0].float().cpu().numpy()
    found = outputs[0]
    found = np.asarray(found.float().cpu() if isinstance(found, torch.Tensor) else found, dtype=np.float32)
    if found.shape != expected.shape:
        raise TargetError(f"{where} gives an output of shape {found.shape}, torch one of {expected.shape}")
    difference = float(np.abs(found - expected).max() / max(float(np.abs(expected).max()), 1e-12))
    if not difference <= TOLERANCE[precision]:
        raise TargetError(f"the outputs of {where} differ from torch's by {difference:.2g} of the largest one")


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporter's progress messages."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
