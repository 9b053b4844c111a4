"""Another machine as a target, over the system's ssh: host keys, users and ports as ``~/.ssh/config`` has them."""

from __future__ import annotations

import io
import json
import logging
import shlex
import subprocess
import tarfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from ...search import protocol
from ...search.measurement import Settings
from ...spaces.errors import TargetError
from ...spaces.inputs import Inputs
from . import remote, runtimes
from .exporting import arrays_for
from .local import check_runtime, exported

logger = logging.getLogger(__name__)

#: ssh's own exit status for a connection that fails or breaks.
CONNECTION_LOST = 255
ATTEMPTS = 3
_SCRIPTS = tuple(Path(str(module.__file__)) for module in (protocol, runtimes, remote))
#: Unpacks standard input into a folder of its own, measures there, and removes it, also when the connection is cut.
_SCRIPT = (
    'd=$(mktemp -d) && trap "rm -rf $d" EXIT HUP INT TERM PIPE && tar -xf - -C "$d" && {python} "$d/remote.py" "$d"'
)


@dataclass(frozen=True)
class SshTarget:
    """``host``: as for ssh, ``user@name`` or an alias. ``runtime``: one that takes ONNX files, installed there; nothing
    else is needed but Python with numpy (``python``: its command). ``options``: more arguments for ssh."""

    host: str = ""
    runtime: str = "onnxruntime"
    python: str = "python3"
    threads: int | None = None
    precision: str = "float32"
    device: str = "cpu"
    connect_timeout_s: int = 15
    timeout_s: float = 600.0
    options: Sequence[str] = ()

    def __post_init__(self) -> None:
        check_runtime(self.runtime, self.precision)
        if not self.host or self.host.startswith("-"):
            raise TargetError(f"target.host must be a host for ssh, such as pi@raspberry, not {self.host!r}")

    @property
    def description(self) -> Mapping[str, Any]:
        names = ("host", "runtime", "threads", "precision", "device")
        return {"target": "ssh", **{name: getattr(self, name) for name in names}}

    def times(
        self, models: Sequence[nn.Module], inputs: Inputs, settings: Settings
    ) -> tuple[list[list[float]], dict[str, Any]]:
        with exported(models, inputs) as paths:
            task = {
                "runtime": self.runtime,
                "options": {"threads": self.threads, "precision": self.precision, "device": self.device},
                "settings": asdict(settings),
                "models": [path.name for path in paths],
            }
            package = packed(task, paths, arrays_for(paths[0], inputs))
        answer = self._ask(package)
        if "error" in answer:
            hint = f"; install it there: {self.python} -m pip install {self.runtime}" if answer["missing"] else ""
            raise TargetError(f"{self.host}: {answer['error']}{hint}")
        return answer["samples"], {**answer["conditions"], "host": self.host}

    def _ask(self, package: bytes) -> dict[str, Any]:
        for attempt in range(1, ATTEMPTS + 1):
            ended = self._run(package)
            if ended.returncode != CONNECTION_LOST:
                return self._answer(ended)
            reason = _last_line(ended.stderr)
            if _is_final(reason):
                break
            logger.warning("%s: attempt %d of %d: %s", self.host, attempt, ATTEMPTS, reason)
        raise TargetError(
            f"ssh {self.host} fails: {reason}. Try `ssh {self.host} true`; host keys and users are those of ssh itself"
        )

    def _run(self, package: bytes) -> subprocess.CompletedProcess[bytes]:
        command = ["ssh", "-o", "BatchMode=yes", "-o", f"ConnectTimeout={self.connect_timeout_s}"]
        command += ["-o", "ServerAliveInterval=10", "-o", "ServerAliveCountMax=3", *self.options, self.host]
        script = _SCRIPT.format(python=shlex.quote(self.python))
        try:
            return subprocess.run(
                [*command, f"sh -c {shlex.quote(script)}"],
                input=package,
                capture_output=True,
                timeout=self.timeout_s,
                check=False,
            )
        except FileNotFoundError as error:
            raise TargetError("target=ssh needs the ssh command of your system, which is not installed") from error
        except subprocess.TimeoutExpired as error:
            raise TargetError(
                f"{self.host} did not answer within {self.timeout_s:.0f} s; raise target.timeout_s"
            ) from error

    def _answer(self, ended: subprocess.CompletedProcess[bytes]) -> dict[str, Any]:
        for line in ended.stdout.decode(errors="replace").splitlines():
            if line.startswith("prunefront "):
                answer: dict[str, Any] = json.loads(line.removeprefix("prunefront "))
                return answer
        raise TargetError(f"{self.host} measured nothing (status {ended.returncode}): {_last_line(ended.stderr)}")


def packed(task: Mapping[str, Any], models: Sequence[Path], arrays: Sequence[Any]) -> bytes:
    """A tar archive of the scripts, the models and the task."""
    held = io.BytesIO()
    np.savez(held, **{f"input{index}": value for index, value in enumerate(arrays)})
    contents = {"task.json": json.dumps(task).encode(), "inputs.npz": held.getvalue()}
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w") as tar:
        for script in _SCRIPTS:
            tar.add(script, script.name)
        for path in models:
            tar.add(path, path.name)
        for name, data in contents.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
    return archive.getvalue()


def _last_line(text: bytes) -> str:
    lines = text.decode(errors="replace").strip().splitlines()
    return lines[-1] if lines else "no message"


def _is_final(reason: str) -> bool:
    """Whether trying again cannot help: refused keys and unknown names do not heal."""
    return any(word in reason for word in ("verification failed", "Permission denied", "Could not resolve", "Bad "))
