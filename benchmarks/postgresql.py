"""A PostgreSQL server of our own on loopback, for benchmarks and tests: Debian's programs, no installation needed."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path


def free_port() -> int:
    """One of loopback that nobody listens at."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def programs() -> Path | None:
    """The folder of the newest version that is installed."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin"))
    return found[-1] if found else None


@contextlib.contextmanager
def postgresql(*options: str) -> Iterator[tuple[str, Callable[[], None]]]:
    """Its URL, and a function that kills and restarts it. ``options``: of the server, such as ``fsync=off``."""
    where = programs()
    assert where is not None, "PostgreSQL is not installed (Debian: apt install postgresql)"
    folder = Path(tempfile.mkdtemp(prefix="postgresql-"))
    as_user: list[str] = []
    if os.geteuid() == 0:  # the server refuses to run as root
        shutil.chown(folder, "postgres")
        as_user = ["runuser", "-u", "postgres", "--"]
    port = free_port()
    data = str(folder / "data")
    settings = ["listen_addresses=127.0.0.1", f"unix_socket_directories={folder}", *options]

    def run(*command: str) -> None:
        subprocess.run([*as_user, str(where / command[0]), *command[1:]], check=True, stdout=subprocess.DEVNULL)

    def start() -> None:
        flags = " ".join([f"-p {port}", *(f"-c {setting}" for setting in settings)])
        run("pg_ctl", "start", "-w", "-D", data, "-l", str(folder / "log"), "-o", flags)

    def stop() -> None:
        run("pg_ctl", "stop", "-m", "immediate", "-D", data)

    def restart() -> None:
        stop()
        start()

    run("initdb", "-D", data, "-U", "tester", "-A", "trust")
    start()
    try:
        yield f"postgresql://tester@127.0.0.1:{port}/postgres", restart
    finally:
        stop()
        shutil.rmtree(folder, ignore_errors=True)
