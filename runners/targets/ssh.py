"""Another machine as a target, over the system's ssh: host keys, users and ports as ``~/.ssh/config`` has them."""

from __future__ import annotations

import io
import logging
import shlex
import subprocess
import tarfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ...spaces.errors import TargetError
from .local import OnnxTarget
from .process import Answer, last_line, read_answer, run_in_group

logger = logging.getLogger(__name__)

#: ssh's own exit status for a connection that fails or breaks.
CONNECTION_LOST = 255
ATTEMPTS = 3
#: Unpacks standard input into a folder of its own, measures there, and removes it, also when the connection is cut.
_SCRIPT = (
    'd=$(mktemp -d) && trap "rm -rf $d" EXIT HUP INT TERM PIPE && tar -xf - -C "$d" && {python} "$d/remote.py" "$d"'
)


@dataclass(frozen=True)
class SshTarget(OnnxTarget):
    """``host``: as for ssh, ``user@name`` or an alias. The runtime is installed there, and nothing else is needed but
    Python with numpy (``python``: its command). ``ssh_options``: more arguments for ssh."""

    timeout_s: float = 600.0
    host: str = ""
    python: str = "python3"
    connect_timeout_s: int = 15
    ssh_options: Sequence[str] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.host or self.host.startswith("-"):
            raise TargetError(f"target.host must be a host for ssh, such as pi@raspberry, not {self.host!r}")

    @property
    def description(self) -> Mapping[str, Any]:
        """With what decides which machine is reached, and what runs there."""
        reached = {"host": self.host, "ssh_options": list(self.ssh_options), "python": self.python}
        return {"target": "ssh", **reached, "runtime": self.runtime, **self.options}

    def _ask(self, folder: Path, models: int) -> Answer:
        package = packed(folder)
        for attempt in range(1, ATTEMPTS + 1):
            ended = self._send(package)
            if ended.returncode != CONNECTION_LOST:
                install = f"install it there: {self.python} -m pip install {self.runtime}"
                answer = read_answer(ended, models, self.host, install)
                return replace(answer, conditions={**answer.conditions, "host": self.host})
            reason = last_line(ended.stderr)
            if _is_final(reason):
                break
            logger.warning("%s: attempt %d of %d: %s", self.host, attempt, ATTEMPTS, reason)
        raise TargetError(
            f"ssh {self.host} fails: {reason}. Try `ssh {self.host} true`; host keys and users are those of ssh itself"
        )

    def _send(self, package: bytes) -> subprocess.CompletedProcess[bytes]:
        command = ["ssh", "-o", "BatchMode=yes", "-o", f"ConnectTimeout={self.connect_timeout_s}"]
        command += ["-o", "ServerAliveInterval=10", "-o", "ServerAliveCountMax=3", *self.ssh_options, self.host]
        script = _SCRIPT.format(python=_quoted(self.python))
        try:
            return run_in_group([*command, f"sh -c {shlex.quote(script)}"], self.timeout_s, package)
        except FileNotFoundError as error:
            raise TargetError("target=ssh needs the ssh command of your system, which is not installed") from error
        except subprocess.TimeoutExpired as error:
            raise TargetError(
                f"{self.host} did not answer within {self.timeout_s:.0f} s; raise target.timeout_s"
            ) from error


def _quoted(python: str) -> str:
    """For a shell, which shall still know whose home ``~/`` is."""
    if python.startswith("~/"):
        return '"$HOME"/' + shlex.quote(python.removeprefix("~/"))
    return shlex.quote(python)


def packed(folder: Path) -> bytes:
    """The files of ``folder`` as a tar archive."""
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w") as tar:
        for path in sorted(folder.iterdir()):
            tar.add(path, path.name)
    return archive.getvalue()


def _is_final(reason: str) -> bool:
    """Whether trying again cannot help: refused keys and unknown names do not heal."""
    return any(word in reason for word in ("verification failed", "Permission denied", "Could not resolve", "Bad "))
