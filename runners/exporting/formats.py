"""Files of other programs: each is written, run on fresh inputs of several batch sizes, and compared with torch."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from ...spaces.errors import ConfigError, TargetError
from ...spaces.inputs import Inputs
from ...spaces.surgery import tensors_of
from ..targets.exporting import OfTensors, check_outputs, named_arrays, quiet

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
    reasons = []
    for is_traced in (False, True):
        try:
            _write_onnx(model, examples, path, is_traced)
            _check(model, examples, lambda inputs: _run_onnx(path, inputs), "onnxruntime")
        except Exception as error:  # exporters and runtimes have errors without a root
            reasons.append(f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}")
            logger.info("onnx, traced=%s: %s", is_traced, reasons[-1])
        else:
            return
    path.unlink(missing_ok=True)
    raise ConfigError(f"the model cannot be exported to ONNX: {reasons[0]}; by tracing: {reasons[1]}{_hint(examples)}")


def _write_onnx(model: nn.Module, examples: Examples, path: Path, is_traced: bool) -> None:
    first = examples[0]
    names, tensors = list(named_arrays(first)), tuple(first.tensors())
    shared = _shared(tensors) if len(examples) > 1 else []
    options: dict[str, Any] = {"dynamo": not is_traced}
    if shared and is_traced:
        options["dynamic_axes"] = {names[index]: {0: "batch"} for index in shared}
    elif shared:
        batch = torch.export.Dim("batch")
        options["dynamic_shapes"] = {"tensors": tuple({0: batch} if i in shared else {} for i in range(len(tensors)))}
    if not is_traced:
        options["external_data"] = False
    with torch.no_grad(), quiet():
        torch.onnx.export(OfTensors(model, first), tensors, str(path), input_names=names, verbose=False, **options)


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
    shared = set(_shared(first.tensors())) if len(examples) > 1 else set()
    batch = torch.export.Dim("batch")
    tensors = iter(range(len(first.tensors())))

    def shape(leaf: Any) -> Any:
        return ({0: batch} if next(tensors) in shared else None) if isinstance(leaf, torch.Tensor) else None

    shapes = first.map(shape)
    dynamic = (*shapes.args, *dict(shapes.kwargs or {}).values()) if shared else None
    try:
        program = torch.export.export(model, first.args, dict(first.kwargs or {}), dynamic_shapes=dynamic)
        torch.export.save(program, path)
    except Exception as error:  # torch.export's errors have no root
        reason = (str(error).splitlines() or [""])[0]
        raise ConfigError(
            f"torch.export cannot take the model: {type(error).__name__}: {reason}{_hint(examples)}"
        ) from error
    loaded = torch.export.load(path).module()

    def run(inputs: Inputs) -> list[Any]:
        from ...spaces.inputs import output_tensors

        return [tensor.detach().numpy() for tensor in output_tensors(inputs.call(loaded))]

    _check(model, examples, run, "torch.export")


def export_safetensors(model: nn.Module, examples: Examples, path: Path) -> None:
    """The weights alone, by the names of the model's ``state_dict``."""
    tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors_of(model).items()}
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


def _shared(tensors: Sequence[torch.Tensor]) -> list[int]:
    """Those whose first dimension is the batch: as long as that of the first tensor."""
    sizes = [tensor.shape[0] if tensor.dim() else None for tensor in tensors]
    return [index for index, size in enumerate(sizes) if size is not None and size == sizes[0]]


def _check(model: nn.Module, examples: Examples, run: Callable[[Inputs], list[Any]], where: str) -> None:
    for inputs in examples:
        try:
            check_outputs(model, inputs, run(inputs), "float32", where)
        except TargetError as error:
            raise ConfigError(str(error)) from error


def _hint(examples: Examples) -> str:
    return "; try dynamic_batch=false, if its forward has the batch size written in it" if len(examples) > 1 else ""
