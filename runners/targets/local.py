"""Targets on this machine: torch itself, and runtimes that take an ONNX file."""

from __future__ import annotations

import contextlib
import importlib.metadata
import logging
import math
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ...search import protocol
from ...search.measurement import Settings
from ...spaces.copying import copy_model
from ...spaces.devices import CPU, check_device
from ...spaces.errors import ConfigError, TargetError
from ...spaces.inputs import Inputs
from . import runtimes
from .exporting import OutputsDiffer, check_outputs, exported, in_type, named_arrays, on_device
from .process import Answer, read_answer, run_in_group, write_task

logger = logging.getLogger(__name__)

#: Where outputs are wanted, and no times.
_SHORT = Settings(tolerance=math.inf, limit_s=0.0, warm_up_s=0.0, least_rounds=1)
#: What each runtime runs on.
DEVICES = {"onnxruntime": ("cpu", "cuda"), "openvino": ("cpu", "gpu"), "tensorrt": ("cpu", "cuda", "gpu")}
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
        check_threads(self.threads)
        try:
            check_device(self.device)  # others would be timed before they are done
        except ConfigError as error:
            raise TargetError(f"target.device={self.device}: {error}") from error

    @property
    def _is_cuda(self) -> bool:
        return self.device != CPU

    @property
    def description(self) -> Mapping[str, Any]:
        threads = self.threads or torch.get_num_threads()
        return {"target": "torch", "version": torch.__version__, **asdict(self), "threads": threads}

    def times(
        self, models: Sequence[nn.Module], inputs: Inputs, settings: Settings
    ) -> tuple[list[list[float]], dict[str, Any]]:
        facts = {**protocol.conditions(), "runtime": "torch", **dict(self.description)}
        if self._is_cuda:
            facts["gpu"] = torch.cuda.get_device_name(self.device)
        current = torch.cuda.device(self.device) if self._is_cuda else contextlib.nullcontext()
        with torch_threads(self.threads), torch.inference_mode(), current:
            runs = [self._run(model, inputs) for model in models]
            samples, load = protocol.time_side_by_side(runs, **asdict(settings))
        return samples, facts | load

    def _run(self, model: nn.Module, inputs: Inputs) -> Callable[[], float | None]:
        given = model
        model, inputs = on_device(model, inputs, self.device)
        if self.channels_last:
            own = copy_model(model) if model is given else model
            model = own.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
            inputs = inputs.map(_channels_last)
        forward: Any = torch.compile(model, dynamic=False) if self.compile else model
        dtype = PRECISIONS[self.precision]
        kind = "cuda" if self._is_cuda else "cpu"

        def run() -> None:
            with torch.autocast(kind, dtype=dtype) if dtype is not None else contextlib.nullcontext():
                inputs.call(forward)

        return TimedOnCuda(run) if self._is_cuda else run


class TimedOnCuda:
    """``run`` as a CUDA graph where it can be captured; calls return its seconds by events of the device."""

    def __init__(self, run: Callable[[], None]) -> None:
        self._run = run  # holds the weights and inputs that the graph reads: they must not be freed
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                run()
        torch.cuda.synchronize()
        self._replay = run
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                run()
            self._replay = graph.replay
        except RuntimeError:  # synchronises, or allocates by its data
            torch.cuda.synchronize()
        self._begin, self._end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def __call__(self) -> float:
        self._begin.record()
        self._replay()
        self._end.record()
        self._end.synchronize()
        return float(self._begin.elapsed_time(self._end)) / 1e3


@dataclass(frozen=True)
class OnnxTarget:
    """A runtime that takes an ONNX file: onnxruntime, openvino or tensorrt.

    It measures in a process of its own, which is killed after ``timeout_s``: no candidate that crashes or hangs ends
    the search.
    """

    runtime: str = "onnxruntime"
    threads: int | None = None
    precision: str = "float32"
    device: str = "cpu"
    timeout_s: float = 300.0

    def __post_init__(self) -> None:
        check_runtime(self.runtime, self.precision)
        check_threads(self.threads)
        if self.device not in DEVICES[self.runtime]:
            allowed = " or ".join(DEVICES[self.runtime])
            raise TargetError(f"target.device of {self.runtime} is {allowed}, not {self.device!r}")

    @property
    def description(self) -> Mapping[str, Any]:
        return {"target": self.runtime, "version": _version(self.runtime), **self.options}

    @property
    def options(self) -> dict[str, Any]:
        """Of :func:`.runtimes.load`."""
        return {"threads": self.threads, "precision": self.precision, "device": self.device}

    @property
    def _dtype(self) -> torch.dtype | None:
        """Of the exported model: TensorRT computes in the types of the file; others are told what to compute in."""
        return PRECISIONS[self.precision] if self.runtime == "tensorrt" else None

    def times(
        self, models: Sequence[nn.Module], inputs: Inputs, settings: Settings
    ) -> tuple[list[list[float]], dict[str, Any]]:
        try:
            return self._times(models, inputs, settings, traced=True)
        except OutputsDiffer as error:
            logger.info("exported and measured again without tracing: %s", error)
            return self._times(models, inputs, settings, traced=False)

    def _times(
        self, models: Sequence[nn.Module], inputs: Inputs, settings: Settings, traced: bool
    ) -> tuple[list[list[float]], dict[str, Any]]:
        with exported(models, inputs, traced, self._dtype) as paths:
            answer = self.answer(models, inputs, paths, settings)
        return answer.samples, answer.conditions

    def answer(self, models: Sequence[nn.Module], inputs: Inputs, paths: Sequence[Path], settings: Settings) -> Answer:
        """What the runtime finds of the exported models. Raises TargetError where its outputs are not torch's."""
        folder, arrays = paths[0].parent, named_arrays(in_type(inputs, self._dtype))
        write_task(folder, paths, arrays, self.runtime, self.options, settings)
        answer = self._ask(folder, len(models))
        for model, outputs in zip(models, answer.outputs, strict=True):
            check_outputs(model, inputs, outputs, self.precision, self.runtime)
        return answer

    def _ask(self, folder: Path, models: int) -> Answer:
        """Measure what is in ``folder``."""
        try:
            ended = run_in_group([sys.executable, str(folder / "remote.py"), str(folder)], self.timeout_s)
        except subprocess.TimeoutExpired as error:
            raise TargetError(
                f"{self.runtime} took longer than {self.timeout_s:g} s and was killed; raise target.timeout_s if it "
                "does not hang"
            ) from error
        install = f"target={self.runtime} needs the runtime: pip install {self.runtime}"
        return read_answer(ended, models, self.runtime, install)


def gives_same_outputs(models: Sequence[nn.Module], inputs: Inputs, paths: Sequence[Path]) -> bool:
    """Whether ONNX Runtime finds torch's outputs in the exported files."""
    try:
        OnnxTarget().answer(models, inputs, paths, _SHORT)
    except TargetError as error:
        logger.info("exported again without tracing: %s", error)
        return False
    return True


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


def check_threads(threads: int | None) -> None:
    if threads is not None and threads < 1:
        raise TargetError(f"target.threads must be positive, or null for the runtime's own choice, not {threads}")


def check_runtime(runtime: str, precision: str) -> None:
    """Raises TargetError for what a runtime cannot do."""
    check_precision(precision)
    if runtime not in runtimes.LOADERS:
        raise TargetError(f"unknown runtime {runtime!r}; expected one of {', '.join(runtimes.LOADERS)}")
    allowed = {"onnxruntime": ("float32",), "tensorrt": ("float32", "float16")}.get(runtime, tuple(PRECISIONS))
    if precision not in allowed:
        raise TargetError(f"{runtime} runs ONNX files in {', '.join(allowed)}, not in {precision}")


def _version(runtime: str) -> str | None:
    try:
        return importlib.metadata.version(runtime)
    except importlib.metadata.PackageNotFoundError:
        return None


def _channels_last(leaf: Any) -> Any:
    is_image = isinstance(leaf, torch.Tensor) and leaf.dim() == 4
    return leaf.contiguous(memory_format=torch.channels_last) if is_image else leaf
