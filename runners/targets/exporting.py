"""Models as ONNX files, and their outputs beside torch's."""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import tempfile
import warnings
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from ...spaces.copying import copy_model
from ...spaces.errors import TargetError
from ...spaces.inputs import Inputs, output_tensors

logger = logging.getLogger(__name__)

#: Largest difference from torch's outputs, relative to the largest of them.
TOLERANCE = {"float32": 1e-3, "bfloat16": 0.1, "float16": 0.05}


class OutputsDiffer(TargetError):
    """A runtime computes something else than torch."""


class OfTensors(nn.Module):
    """``model`` as a function of the tensors among ``inputs``, to a tuple of the outputs that matter."""

    def __init__(self, model: nn.Module, inputs: Inputs) -> None:
        super().__init__()
        self.model, self.training = model, False
        leaves, self._tree = tree_flatten((inputs.args, dict(inputs.kwargs or {})))
        self._is_tensor = [isinstance(leaf, torch.Tensor) for leaf in leaves]
        self._leaves = [None if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]

    def forward(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        given = iter(tensors)
        leaves = [next(given) if own else leaf for own, leaf in zip(self._is_tensor, self._leaves, strict=True)]
        args, kwargs = tree_unflatten(leaves, self._tree)
        return tuple(output_tensors(self.model(*args, **kwargs)))


def export_onnx(model: nn.Module, inputs: Inputs, path: Path, traced: bool = False) -> None:
    """Write ``model`` to ``path``, weights included, with the inputs of :func:`named_arrays`.

    ``traced``: by torch's tracing exporter where it can, which takes a quarter of the time and promises less: compare
    the outputs, and export again without it where they differ.

    Raises:
        TargetError: the model cannot be exported, or onnxscript is missing.
    """
    if importlib.util.find_spec("onnxscript") is None:
        raise TargetError("this target exports to ONNX: pip install 'prunefront[onnx]'")
    if traced:
        try:
            return write_onnx(model, inputs, path, traced=True)
        except Exception as error:  # it has no root of its errors
            logger.info("exported without tracing, since that fails: %s", _first_line(error))
    try:
        write_onnx(model, inputs, path, traced=False)
    except Exception as error:
        raise TargetError(
            f"the model cannot be exported to ONNX: {_first_line(error)}; use target=torch, or make its forward "
            "exportable (torch.export.export says where it fails)"
        ) from error


def write_onnx(model: nn.Module, inputs: Inputs, path: Path, traced: bool, batched: Collection[int] = ()) -> None:
    """As :func:`export_onnx`, by one exporter, with its errors. ``batched``: numbers of the tensors whose first
    dimension may have another size."""
    names, tensors = list(named_arrays(inputs)), tuple(inputs.tensors())
    options: dict[str, Any] = {"dynamo": not traced}
    if batched and traced:
        options["dynamic_axes"] = {names[index]: {0: "batch"} for index in batched}
    elif batched:
        batch = torch.export.Dim("batch")
        options["dynamic_shapes"] = {"tensors": tuple({0: batch} if i in batched else {} for i in range(len(tensors)))}
    if not traced:
        options["external_data"] = False
    with torch.no_grad(), quiet(), _plain_attention():
        torch.onnx.export(OfTensors(model, inputs), tensors, str(path), input_names=names, verbose=False, **options)


@contextlib.contextmanager
def _plain_attention() -> Iterator[None]:
    """Without the fused operators of torch's own transformer layers, which ONNX does not have."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


@contextlib.contextmanager
def exported(
    models: Sequence[nn.Module], inputs: Inputs, traced: bool = False, dtype: torch.dtype | None = None
) -> Iterator[list[Path]]:
    """The models as ONNX files in a folder that is removed afterwards; with weights and inputs of ``dtype``, or without
    it their own (see :func:`widened`)."""
    with tempfile.TemporaryDirectory(prefix="prunefront-") as folder:
        paths = [Path(folder) / f"model{index}.onnx" for index in range(len(models))]
        for model, path in zip(models, paths, strict=True):
            model, here = widened(*on_device(model, inputs, "cpu"))
            if dtype is not None:
                model = copy_model(model).to(dtype)
            export_onnx(model, in_type(here, dtype), path, traced)
        yield paths


def on_device(model: nn.Module, inputs: Inputs, device: str) -> tuple[nn.Module, Inputs]:
    """Both on ``device``; a model that lies elsewhere is copied."""
    if any(tensor.device != torch.empty(0, device=device).device for tensor in model.state_dict().values()):
        model = copy_model(model).to(device)
    return model, inputs.to(device)


def in_type(inputs: Inputs, dtype: torch.dtype | None) -> Inputs:
    """``inputs`` with floating-point numbers of ``dtype``; None: as they are."""
    return inputs.map(lambda leaf: leaf.to(dtype) if torch.is_tensor(leaf) and leaf.is_floating_point() else leaf)


def widened(model: nn.Module, inputs: Inputs) -> tuple[nn.Module, Inputs]:
    """Both in float32 if the model is of bfloat16: NumPy, from which runtimes take their inputs, does not have that."""
    if not is_bfloat16(model):
        return model, inputs
    return copy_model(model).float(), in_type(inputs, torch.float32)


def is_bfloat16(model: nn.Module) -> bool:
    return any(tensor.dtype == torch.bfloat16 for tensor in model.state_dict().values())


def named_arrays(inputs: Inputs) -> dict[str, NDArray[Any]]:
    """The tensors of ``inputs`` in order, by their names in exported models; bfloat16 as float32."""
    return {f"input{index}": as_array(tensor) for index, tensor in enumerate(inputs.tensors())}


def as_array(tensor: torch.Tensor) -> NDArray[Any]:
    """Of NumPy, which has no bfloat16."""
    tensor = tensor.detach().cpu()
    return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()


def check_outputs(model: nn.Module, inputs: Inputs, outputs: Sequence[Any], precision: str, where: str) -> None:
    """Raises OutputsDiffer where floating-point ``outputs`` of a runtime that computes in ``precision`` differ from
    those of ``model``, by more than the coarser of both explains."""
    model, inputs = on_device(model, inputs, "cpu")
    with torch.no_grad():
        expected = output_tensors(inputs.call(model))
    if len(outputs) != len(expected):
        raise OutputsDiffer(f"{where} gives {len(outputs)} outputs, torch {len(expected)}")
    for found, wanted in zip(outputs, expected, strict=True):
        if tuple(found.shape) != tuple(wanted.shape):
            raise OutputsDiffer(f"{where} gives an output of shape {tuple(found.shape)}, torch {tuple(wanted.shape)}")
        if not wanted.is_floating_point() or not wanted.numel():
            continue
        right = wanted.float().numpy()
        difference = float(np.abs(found.astype(np.float32) - right).max() / max(float(np.abs(right).max()), 1e-12))
        own = str(wanted.dtype).removeprefix("torch.")
        if not difference <= max(TOLERANCE[precision], TOLERANCE.get(own, 0.0)):
            raise OutputsDiffer(f"the outputs of {where} differ from torch's by {difference:.2g} of the largest one")


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"


@contextlib.contextmanager
def quiet() -> Iterator[None]:
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
