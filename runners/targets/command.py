"""The user's own program as a target: it gets an ONNX file and prints milliseconds."""

from __future__ import annotations

import importlib.util
import math
import re
import shutil
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import nn

from ...search import protocol
from ...search.measurement import Settings
from ...spaces.errors import TargetError
from ...spaces.inputs import Inputs
from .exporting import exported, named_arrays
from .local import gives_same_outputs
from .process import last_line, run_in_group, write_arrays

#: Colours of terminals; what looks like a number, with whatever separators; and what is one beyond doubt.
_COLOUR = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")
_LIKE_A_NUMBER = re.compile(r"(?<![A-Za-z\d])[-+]?[.,_\d]*\d[.,_\d]*(?:[eE][-+]?\d+)?")
_NUMBER = re.compile(r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?")


@dataclass(frozen=True)
class CommandTarget:
    """``command``: a list of arguments; ``{model}`` is the path of the ONNX file, ``{inputs}`` that of an .npz with the
    arrays input0, input1, ... The last number of the last line that it prints is the time of one forward pass in ms.

    No shell is involved. A run that takes longer than ``timeout_s`` is killed.
    """

    command: Sequence[str] = ()
    timeout_s: float = 60.0

    def __post_init__(self) -> None:
        if not self.command or not any("{model}" in part for part in self.command):
            raise TargetError("target.command must be a list of arguments, one of them with {model}")

    @property
    def description(self) -> Mapping[str, Any]:
        program = shutil.which(self.command[0])  # of one name there may be several
        return {"target": "command", "command": list(self.command), "program": program and str(Path(program).resolve())}

    def times(
        self, models: Sequence[nn.Module], inputs: Inputs, settings: Settings
    ) -> tuple[list[list[float]], dict[str, Any]]:
        if importlib.util.find_spec("onnxruntime") is not None:  # it tells of tracing what the program's times do not
            with exported(models, inputs, traced=True) as paths:
                if gives_same_outputs(models, inputs, paths):
                    return self._times(paths, inputs, settings)
        with exported(models, inputs) as paths:
            return self._times(paths, inputs, settings)

    def _times(
        self, paths: Sequence[Path], inputs: Inputs, settings: Settings
    ) -> tuple[list[list[float]], dict[str, Any]]:
        arrays = paths[0].with_name("inputs.npz")
        write_arrays(arrays, named_arrays(inputs))
        facts = {**protocol.conditions(), "runtime": "command", "command": " ".join(self.command)}
        # The program warms up and repeats by itself: a run more is a start of a process more.
        options = {**asdict(settings), "warm_up_s": 0.0}
        samples, load = protocol.time_side_by_side([self._run(path, arrays) for path in paths], **options)
        return samples, facts | load

    def _run(self, model: Path, inputs: Path) -> Callable[[], float]:
        values = {"{model}": str(model), "{inputs}": str(inputs)}
        arguments = list(self.command)
        for name, value in values.items():
            arguments = [argument.replace(name, value) for argument in arguments]

        def run() -> float:
            try:
                ended = run_in_group(arguments, self.timeout_s)
            except OSError as error:
                raise TargetError(f"target.command: {arguments[0]} cannot be started: {error}") from error
            except subprocess.TimeoutExpired as error:
                raise TargetError(f"target.command took longer than {self.timeout_s} s; raise timeout_s") from error
            if ended.returncode:
                raise TargetError(
                    f"target.command ended with status {ended.returncode}: {last_line(ended.stderr or ended.stdout)}"
                )
            return milliseconds_in(last_line(ended.stdout)) / 1e3

        return run


def milliseconds_in(line: str) -> float:
    """The last number of the line. Raises TargetError where there is none, or it could be several."""
    found = [text.rstrip(".,_") for text in _LIKE_A_NUMBER.findall(_COLOUR.sub("", line))]
    if found and _NUMBER.fullmatch(found[-1]) and 0 < float(found[-1]) < math.inf:
        return float(found[-1])
    what = f"{found[-1]!r} in its last line is" if found else "its last line has"
    raise TargetError(f"target.command: {what} no positive number of milliseconds such as 1203.7: {line}")
