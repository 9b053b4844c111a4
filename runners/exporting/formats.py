"""Files of other programs: each is written, run on fresh inputs of several batch sizes, and compared with torch."""

from __future__ import annotations

import importlib.util
import inspect
import itertools
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from ...spaces.errors import ConfigError, TargetError
from ...spaces.inputs import Inputs, output_tensors
from ..targets.exporting import as_array, check_outputs, in_type, is_bfloat16, named_arrays, widened, write_onnx

logger = logging.getLogger(__name__)

#: Inputs by batch size; the first is exported with: a dimension of size one would be taken for a constant.
Examples = Sequence[Inputs]


def export_onnx(model: nn.Module, examples: Examples, path: Path) -> None:
    """With a dynamic batch where there are several ``examples``; by torch.export, or by tracing where that fails.

    Raises:
        ConfigError: neither gives the outputs of torch, or a package is missing.
    """
    for package in ("onnx", "onnxruntime", "onnxscript"):
        if importlib.util.find_spec(package) is None:
            raise ConfigError("format=onnx needs onnx, onnxscript and onnxruntime: pip install 'prunefront[onnx]'")
    model, examples = _widened(model, examples)
    reasons = []
    for is_traced in (False, True):
        try:
            write_onnx(model, examples[0], path, is_traced, _batched(examples))
            _check(model, examples, lambda inputs: _run_onnx(path, inputs), "onnxruntime")
        except Exception as error:  # exporters and runtimes have errors without a root
            reasons.append(f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}")
            logger.info("onnx, traced=%s: %s", is_traced, reasons[-1])
        else:
            return
    path.unlink(missing_ok=True)
    raise ConfigError(f"the model cannot be exported to ONNX: {reasons[0]}; by tracing: {reasons[1]}{_hint(examples)}")


def _run_onnx(path: Path, inputs: Inputs) -> list[Any]:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    known = {value.name for value in session.get_inputs()}  # exporters drop inputs that nothing uses
    return list(session.run(None, {name: array for name, array in named_arrays(inputs).items() if name in known}))


def export_openvino(model: nn.Module, examples: Examples, path: Path) -> None:
    """OpenVINO's XML, and the weights beside it, in float32; by way of ONNX."""
    if importlib.util.find_spec("openvino") is None:
        raise ConfigError("format=openvino needs openvino: pip install 'prunefront[openvino]'")
    import openvino

    model, examples = _widened(model, examples)
    between = path.with_suffix(".onnx")
    try:
        export_onnx(model, examples, between)
        openvino.save_model(openvino.convert_model(str(between)), str(path), compress_to_fp16=False)
    finally:
        between.unlink(missing_ok=True)
    compiled = openvino.Core().compile_model(str(path), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})

    def run(inputs: Inputs) -> list[Any]:
        names = {name for port in compiled.inputs for name in port.get_names()}
        found = compiled({name: array for name, array in named_arrays(inputs).items() if name in names})
        return [found[port] for port in compiled.outputs]

    _check(model, examples, run, "openvino")


def export_pt2(model: nn.Module, examples: Examples, path: Path) -> None:
    """A program of torch.export, which ``torch.export.load(path).module()`` runs without the model's code."""
    first = examples[0]
    try:
        dynamic = _dynamic_shapes(model, examples) if len(examples) > 1 else None
        program = torch.export.export(model, first.args, dict(first.kwargs or {}), dynamic_shapes=dynamic)
        torch.export.save(program, path)
    except Exception as error:  # torch.export's errors have no root
        reason = (str(error).splitlines() or [""])[0]
        raise ConfigError(
            f"torch.export cannot take the model: {type(error).__name__}: {reason}{_hint(examples)}"
        ) from error
    loaded = torch.export.load(path).module()

    def run(inputs: Inputs) -> list[Any]:
        return [as_array(tensor) for tensor in output_tensors(inputs.call(loaded))]

    _check(model, examples, run, "torch.export")


def export_safetensors(model: nn.Module, examples: Examples, path: Path) -> None:
    """The weights alone, by the names of the model's ``state_dict``, which loads them; shared ones under every name."""
    named = model.state_dict().items()
    tensors = {n: tensor.cpu().contiguous().clone() for n, tensor in named if isinstance(tensor, torch.Tensor)}
    save_file(tensors, path)
    written = load_file(path)
    if written.keys() != tensors.keys() or not all(torch.equal(written[name], tensors[name]) for name in tensors):
        raise ConfigError(f"{path} does not hold what was written; the disk may be damaged")


#: Name of a format -> what writes it, and the ending of its file.
FORMATS: dict[str, tuple[Callable[[nn.Module, Examples, Path], None], str]] = {
    "onnx": (export_onnx, ".onnx"),
    "openvino": (export_openvino, ".xml"),
    "pt2": (export_pt2, ".pt2"),
    "safetensors": (export_safetensors, ".safetensors"),
}


def _dynamic_shapes(model: nn.Module, examples: Examples) -> dict[str, Any]:
    """What torch.export is told of the arguments by name, in the order of the forward's signature."""
    batched, batch = _batched(examples), torch.export.Dim("batch")
    numbers = itertools.count()

    def shape(leaf: Any) -> Any:
        return {0: batch} if isinstance(leaf, torch.Tensor) and next(numbers) in batched else None

    shapes = examples[0].map(shape)
    return dict(inspect.signature(model.forward).bind(*shapes.args, **(shapes.kwargs or {})).arguments)


def _widened(model: nn.Module, examples: Examples) -> tuple[nn.Module, Examples]:
    if not is_bfloat16(model):
        return model, examples
    logger.warning(
        "the model is of bfloat16 and the file of float32: runtimes take inputs from NumPy, which has no bfloat16"
    )
    wide, _ = widened(model, examples[0])
    return wide, [in_type(inputs, torch.float32) for inputs in examples]


def _batched(examples: Examples) -> list[int]:
    """Numbers of the tensors whose first dimension is the batch: it differs between the examples."""
    lengths = [[tensor.shape[:1] for tensor in inputs.tensors()] for inputs in examples]
    return [index for index, found in enumerate(zip(*lengths, strict=True)) if len(set(found)) > 1]


def _check(model: nn.Module, examples: Examples, run: Callable[[Inputs], list[Any]], where: str) -> None:
    for inputs in examples:
        try:
            check_outputs(model, inputs, run(inputs), "float32", where)
        except TargetError as error:
            raise ConfigError(str(error)) from error


def _hint(examples: Examples) -> str:
    return "; try dynamic_batch=false, if its forward has the batch size written in it" if len(examples) > 1 else ""
