"""Whether the process that runs a trial is still there: journal storage has no heartbeats."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Mapping
from typing import Any

from optuna.trial import FrozenTrial

#: The attribute of a trial that says who runs it.
WORKER = "worker"
#: Of a process on another host nothing is known: its trial is given up after so long, or so many times the longest
#: that others took.
OTHER_HOST_S, OTHER_HOST_TIMES = 3600.0, 5
#: A trial without the attribute: its process was killed between asking and writing it.
UNSIGNED_S = 60.0


def this_process() -> dict[str, Any]:
    """Host, process id, and when the process started (0.0 where the system does not say)."""
    return {"host": socket.gethostname(), "pid": os.getpid(), "started": _started(os.getpid()) or 0.0}


def is_stale(trial: FrozenTrial, longest_s: float = 0.0) -> bool:
    """Whether nobody runs a trial that is said to be running. ``longest_s``: what trials of the study have taken."""
    start = trial.datetime_start
    age_s = 0.0 if start is None else max(0.0, time.time() - start.timestamp())
    signed = trial.user_attrs.get(WORKER)
    if not isinstance(signed, Mapping):
        return age_s > UNSIGNED_S
    if signed.get("host") != socket.gethostname():
        return age_s > max(OTHER_HOST_S, OTHER_HOST_TIMES * longest_s)
    return not is_alive(signed)


def is_alive(signed: Mapping[str, Any]) -> bool:
    """Whether a process of this host, as :func:`this_process` describes it, is running."""
    pid, started = int(signed.get("pid", 0)), float(signed.get("started", 0.0))
    now = _started(pid)
    if now is not None:
        return now == started  # ids are used again
    if os.path.isdir("/proc/self"):
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _started(pid: int) -> float | None:
    """Clock ticks from the start of the machine to that of the process."""
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8") as file:
            fields = file.read().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else float(fields[19])  # zombies have ended
