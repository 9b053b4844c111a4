"""Targets on this machine: torch itself, and runtimes that take an ONNX file."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ...search import protocol
from ...search.measurement import Settings
from ...spaces.copying import copy_model
from ...spaces.errors import TargetError
from ...spaces.inputs import Inputs
from . import runtimes
from .exporting import arrays_for, check_outputs, export_onnx

PRECISIONS = {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class TorchTarget:
    """PyTorch in this process. ``threads``: of one operator, None for torch's own choice."""

    device: str = "cpu"
    compile: bool = False
    precision: str = "float32"
    channels_last: bool = False
    threads: int | None = None

    def __post_init__(self) -> None:
        check_precision(self.precision)
        if self.device.startswith("cuda") and not torch.cuda.is_available():
            raise TargetError("target.device=cuda: torch sees no CUDA device; use target.device=cpu")

    @property
    def description(self) -> Mapping[str, Any]:
        return {"target": "torch", "version": torch.__version__, **asdict(self)}

    def times(
        self, models: Sequence[nn.Module], inputs: Inputs, settings: Settings
    ) -> tuple[list[list[float]], dict[str, Any]]:
        facts = {**protocol.conditions(), "runtime": "torch", **dict(self.description)}
        facts["threads"] = self.threads or torch.get_num_threads()
        with torch_threads(self.threads), torch.inference_mode():
            runs = [self._run(model, inputs) for model in models]
            return protocol.time_side_by_side(runs, **asdict(settings)), facts

    def _run(self, model: nn.Module, inputs: Inputs) -> Callable[[], float | None]:
        where = {name: tensor.device for name, tensor in model.state_dict().items()}
        if any(device.type != torch.device(self.device).type for device in where.values()):
            raise TargetError(f"the model is on {next(iter(where.values()))}; move it to {self.device} to measure it")
        if self.channels_last:
            model = copy_model(model).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
            inputs = inputs.map(_channels_last)
        inputs = inputs.map(lambda leaf: leaf.to(self.device) if isinstance(leaf, torch.Tensor) else leaf)
        forward: Any = torch.compile(model, dynamic=False) if self.compile else model
        dtype = PRECISIONS[self.precision]
        kind = torch.device(self.device).type

        def run() -> None:
            with torch.autocast(kind, dtype=dtype) if dtype is not None else contextlib.nullcontext():
                inputs.call(forward)

        return run if kind == "cpu" else timed_on_cuda(run)


def timed_on_cuda(run: Callable[[], None]) -> Callable[[], float]:
    """``run`` as a CUDA graph where it can be captured; returns its seconds by events of the device."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.synchronize()
    try:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
        replay = graph.replay
    except RuntimeError:  # synchronises, or allocates by its data
        torch.cuda.synchronize()
        replay = run
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)

    def timed() -> float:
        begin.record()
        replay()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end)) / 1e3

    return timed


@dataclass(frozen=True)
class OnnxTarget:
    """A runtime on this machine that takes an ONNX file: onnxruntime, openvino or tensorrt."""

    runtime: str = "onnxruntime"
    threads: int | None = None
    precision: str = "float32"
    device: str = "cpu"

    def __post_init__(self) -> None:
        check_runtime(self.runtime, self.precision)

    @property
    def description(self) -> Mapping[str, Any]:
        return {"target": self.runtime, **asdict(self)}

    @property
    def options(self) -> dict[str, Any]:
        return {"threads": self.threads, "precision": self.precision, "device": self.device}

    def times(
        self, models: Sequence[nn.Module], inputs: Inputs, settings: Settings
    ) -> tuple[list[list[float]], dict[str, Any]]:
        with exported(models, inputs) as paths:
            arrays = arrays_for(paths[0], inputs)
            try:
                loaded = [runtimes.load(self.runtime, str(path), arrays, **self.options) for path in paths]
            except ImportError as error:
                raise missing(self.runtime, error) from error
            except Exception as error:
                raise TargetError(f"{self.runtime} cannot load the model: {type(error).__name__}: {error}") from error
            for model, (run, _) in zip(models, loaded, strict=True):
                check_outputs(model, inputs, run(), self.precision, self.runtime)
            facts = protocol.conditions()
            runs = [forward for forward, _ in loaded]
            return protocol.time_side_by_side([_without_result(run) for run in runs], **asdict(settings)), {
                **facts,
                **loaded[0][1],
            }


@contextlib.contextmanager
def exported(models: Sequence[nn.Module], inputs: Inputs) -> Iterator[list[Path]]:
    """The models as ONNX files in a folder that is removed afterwards."""
    with tempfile.TemporaryDirectory(prefix="prunefront-") as folder:
        paths = [Path(folder) / f"model{index}.onnx" for index in range(len(models))]
        for model, path in zip(models, paths, strict=True):
            export_onnx(model, inputs, path)
        yield paths


@contextlib.contextmanager
def torch_threads(threads: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def check_precision(precision: str) -> None:
    if precision not in PRECISIONS:
        raise TargetError(f"unknown precision {precision!r}; expected one of {', '.join(PRECISIONS)}")


def check_runtime(runtime: str, precision: str) -> None:
    """Raises TargetError for what a runtime cannot do."""
    check_precision(precision)
    if runtime not in runtimes.LOADERS:
        raise TargetError(f"unknown runtime {runtime!r}; expected one of {', '.join(runtimes.LOADERS)}")
    allowed = {"onnxruntime": ("float32",), "tensorrt": ("float32", "float16")}.get(runtime, tuple(PRECISIONS))
    if precision not in allowed:
        raise TargetError(f"{runtime} runs ONNX files in {', '.join(allowed)}, not in {precision}")


def missing(runtime: str, error: Exception) -> TargetError:
    return TargetError(f"target={runtime} needs the runtime: pip install {runtime} ({error})")


def _without_result(run: Callable[[], Any]) -> Callable[[], None]:
    def timed() -> None:
        run()

    return timed


def _channels_last(leaf: Any) -> Any:
    is_image = isinstance(leaf, torch.Tensor) and leaf.dim() == 4
    return leaf.contiguous(memory_format=torch.channels_last) if is_image else leaf
