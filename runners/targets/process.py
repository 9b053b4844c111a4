"""Measuring in a process of its own: the folder that it reads, its end, and its answer."""

from __future__ import annotations

import base64
import io
import json
import math
import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...search import protocol
from ...search.measurement import Settings
from ...spaces.errors import TargetError
from . import remote, runtimes

#: What measures: it travels with the models.
SCRIPTS = tuple(Path(str(module.__file__)) for module in (protocol, runtimes, remote))


#: How often to look whether the process has ended while its children hold the pipe.
CHILDREN_S = 0.5


@dataclass(frozen=True)
class Answer:
    """``samples``: seconds by model and round; ``outputs``: arrays by model."""

    samples: list[list[float]]
    conditions: dict[str, Any]
    outputs: list[list[NDArray[Any]]]


def write_task(
    folder: Path,
    models: Sequence[Path],
    arrays: Mapping[str, NDArray[Any]],
    runtime: str,
    options: Mapping[str, Any],
    settings: Settings,
) -> None:
    """Put the scripts, the inputs and what to do beside the ``models`` in ``folder``."""
    for script in SCRIPTS:
        (folder / script.name).write_bytes(script.read_bytes())
    write_arrays(folder / "inputs.npz", arrays)
    task = {
        "runtime": runtime,
        "options": dict(options),
        "settings": asdict(settings),
        "models": [path.name for path in models],
    }
    (folder / "task.json").write_text(json.dumps(task), encoding="utf-8")


def write_arrays(path: Path, arrays: Mapping[str, NDArray[Any]]) -> None:
    named: dict[str, Any] = dict(arrays)
    np.savez(path, **named)


def run_in_group(command: Sequence[str], timeout_s: float, data: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    """``subprocess.run`` that leaves no process behind: not where it is left early, and none that the command started.

    Raises:
        subprocess.TimeoutExpired: it took longer than ``timeout_s``.
        FileNotFoundError: the command does not exist.
    """
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, start_new_session=True) as process:
        try:
            stdout, stderr = _communicate(process, data, timeout_s)
        finally:
            _kill_group(process)
    return subprocess.CompletedProcess(command, process.returncode, stdout, stderr)


def _communicate(process: subprocess.Popen[bytes], data: bytes, timeout_s: float) -> tuple[bytes, bytes]:
    """What the process prints until it ends, though its children may keep the pipe open."""
    deadline = time.monotonic() + timeout_s
    given: bytes | None = data
    while True:
        try:
            return process.communicate(given, timeout=max(0.0, min(CHILDREN_S, deadline - time.monotonic())))
        except subprocess.TimeoutExpired as error:
            given = None  # communication goes on where it was
            if process.poll() is not None:
                _kill_group(process)
                return process.communicate()
            if time.monotonic() >= deadline:
                raise subprocess.TimeoutExpired(process.args, timeout_s) from error


def _kill_group(process: subprocess.Popen[bytes]) -> None:
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)


def read_answer(ended: subprocess.CompletedProcess[bytes], models: int, where: str, install: str) -> Answer:
    """What the process measured of so many models. ``install``: how to get a runtime that is missing.

    Raises:
        TargetError: it measured nothing, or its answer is not whole.
    """
    lines = ended.stdout.decode(errors="replace").splitlines()
    found = [line.removeprefix("prunefront ") for line in lines if line.startswith("prunefront ")]
    if not found:
        raise TargetError(f"{where} measured nothing: it {_how_it_ended(ended.returncode)}: {last_line(ended.stderr)}")
    try:
        answer = json.loads(found[-1])
        if "error" in answer:
            raise TargetError(f"{where}: {answer['error']}" + (f"; {install}" if answer["missing"] else ""))
        samples = [[float(value) for value in row] for row in answer["samples"]]
        outputs = [[_decoded(text) for text in texts] for texts in answer["outputs"]]
        conditions = dict(answer["conditions"])
    except (ValueError, KeyError, TypeError, OSError, EOFError) as error:
        raise TargetError(f"{where} gave an answer that cannot be read: {type(error).__name__}: {error}") from error
    rounds = {len(row) for row in samples}
    plausible = all(math.isfinite(value) and value > 0 for row in samples for value in row)
    if len(samples) != models or len(outputs) != models or len(rounds) != 1 or rounds == {0} or not plausible:
        raise TargetError(f"{where} gave an answer that is not whole: {len(samples)} of {models} models were measured")
    return Answer(samples, conditions, outputs)


def last_line(text: bytes) -> str:
    lines = text.decode(errors="replace").strip().splitlines()
    return lines[-1] if lines else "no message"


def _decoded(text: str) -> NDArray[Any]:
    array: NDArray[Any] = np.load(io.BytesIO(base64.b64decode(text, validate=True)), allow_pickle=False)
    return array


def _how_it_ended(status: int) -> str:
    if status >= 0:
        return f"ended with status {status}"
    try:
        return f"was killed by {signal.Signals(-status).name}"
    except ValueError:
        return f"was killed by signal {-status}"
