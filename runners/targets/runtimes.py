"""Runtimes that take an ONNX file. Needs Python and the runtime: this file travels to the machine that measures."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from typing import Any

#: Numpy arrays by the names of the model's inputs.
Arrays = Mapping[str, Any]
#: A function that computes a forward pass and returns the outputs, and what runs it.
Loaded = tuple[Callable[[], Any], dict[str, Any]]


def load(
    runtime: str,
    path: str,
    inputs: Arrays,
    threads: int | None = None,
    precision: str = "float32",
    device: str = "cpu",
) -> Loaded:
    """The model in ``path``, ready to run on ``inputs``. Raises ImportError where the runtime is missing."""
    return LOADERS[runtime](path, inputs, threads, precision, device)


def load_onnxruntime(path: str, inputs: Arrays, threads: int | None, precision: str, device: str) -> Loaded:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or 0
    options.log_severity_level = 3
    # Spinning threads of one model would take the processors from the next one.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    wanted = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}[device]
    if wanted not in onnxruntime.get_available_providers():
        raise ImportError(f"this onnxruntime has no {wanted}; it has {onnxruntime.get_available_providers()}")
    session = onnxruntime.InferenceSession(path, options, providers=[wanted])
    feed = _fed([value.name for value in session.get_inputs()], inputs)
    facts = {"runtime": "onnxruntime", "version": onnxruntime.__version__, "provider": session.get_providers()[0]}
    return lambda: session.run(None, feed), {**facts, "threads": threads or os.cpu_count(), "precision": "float32"}


def load_openvino(path: str, inputs: Arrays, threads: int | None, precision: str, device: str) -> Loaded:
    import openvino

    core = openvino.Core()
    kinds = {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}
    settings: dict[str, Any] = {"INFERENCE_PRECISION_HINT": kinds[precision], "PERFORMANCE_HINT": "LATENCY"}
    if threads:
        settings["INFERENCE_NUM_THREADS"] = threads
    name = {"cpu": "CPU", "gpu": "GPU"}[device]
    compiled = core.compile_model(core.read_model(path), name, settings)
    request = compiled.create_infer_request()
    feed = _fed([port.get_any_name() for port in compiled.inputs], inputs)
    request.infer(feed)
    facts = {"runtime": "openvino", "version": openvino.__version__, "threads": threads or os.cpu_count()}
    return lambda: list(request.infer(feed).values()), {**facts, "precision": precision}


def load_tensorrt(path: str, inputs: Arrays, threads: int | None, precision: str, device: str) -> Loaded:
    import tensorrt
    import torch

    logger = tensorrt.Logger(tensorrt.Logger.ERROR)
    builder = tensorrt.Builder(logger)
    # Types are those of the file. TensorRT 11 knows nothing else, and ignores the flag.
    network = builder.create_network(1 << int(tensorrt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = tensorrt.OnnxParser(network, logger)
    if not parser.parse_from_file(path):
        raise RuntimeError(f"TensorRT cannot read the model: {parser.get_error(0)}")
    built = builder.build_serialized_network(network, builder.create_builder_config())
    if built is None:
        raise RuntimeError("TensorRT cannot build an engine of the model; its messages are above")
    engine = tensorrt.Runtime(logger).deserialize_cuda_engine(built)
    context = engine.create_execution_context()
    names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
    given = [name for name in names if engine.get_tensor_mode(name) == tensorrt.TensorIOMode.INPUT]
    held = {name: torch.from_numpy(value).cuda() for name, value in _fed(given, inputs).items()}
    for name in names:
        if name not in held:
            dtype = getattr(torch, tensorrt.nptype(engine.get_tensor_dtype(name)).__name__)
            held[name] = torch.empty(tuple(engine.get_tensor_shape(name)), dtype=dtype, device="cuda")
        context.set_tensor_address(name, held[name].data_ptr())
    stream = torch.cuda.Stream()

    def run() -> list[Any]:
        context.execute_async_v3(stream.cuda_stream)
        stream.synchronize()
        return [held[name] for name in names if name not in given]

    device_name = torch.cuda.get_device_name()
    facts = {"runtime": "tensorrt", "version": tensorrt.__version__, "device": device_name, "precision": precision}
    return run, facts


LOADERS = {"onnxruntime": load_onnxruntime, "openvino": load_openvino, "tensorrt": load_tensorrt}


def _fed(names: Iterable[str], inputs: Arrays) -> dict[str, Any]:
    """Of the inputs those that the model takes: an exporter leaves out what has no effect."""
    return {name: inputs[name] for name in names}
