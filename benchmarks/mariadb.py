"""A MariaDB server of our own on loopback, for tests: Debian's programs, no installation needed."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmarks.postgresql import free_port

START_S = 60


def is_installed() -> bool:
    return _program("mariadbd") is not None and _program("mariadb-install-db") is not None


@contextlib.contextmanager
def mariadb() -> Iterator[tuple[str, Callable[[], None]]]:
    """Its URL, and a function that kills and restarts it. Anybody may log in."""
    server, install = _program("mariadbd"), _program("mariadb-install-db")
    assert server is not None and install is not None, "MariaDB is not installed (Debian: apt install mariadb-server)"
    folder = Path(tempfile.mkdtemp(prefix="mariadb-"))
    port = free_port()
    user = ["--user=mysql"] if os.geteuid() == 0 else []  # the server refuses to run as root
    if user:
        shutil.chown(folder, "mysql")
    data = [f"--datadir={folder / 'data'}", *user]
    subprocess.run([install, "--no-defaults", "--skip-test-db", *data], check=True, stdout=subprocess.DEVNULL)
    places = [f"--socket={folder / 'socket'}", f"--pid-file={folder / 'pid'}", "--bind-address=127.0.0.1"]
    command = [server, "--no-defaults", "--skip-grant-tables", f"--port={port}", *places, *data]

    def start() -> subprocess.Popen[bytes]:
        with (folder / "log").open("ab") as log:
            process = subprocess.Popen(command, stdout=log, stderr=log)
        deadline = time.monotonic() + START_S
        while not _answers(port):
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError((folder / "log").read_text(errors="replace")[-2000:])
            time.sleep(0.1)
        return process

    running = [start()]

    def restart() -> None:
        running[0].kill()
        running[0].wait()
        running[0] = start()

    try:
        with contextlib.closing(_connection(port)) as connection:
            connection.cursor().execute("CREATE DATABASE studies")
        yield f"mysql://tester@127.0.0.1:{port}/studies", restart
    finally:
        running[0].kill()
        running[0].wait()
        shutil.rmtree(folder, ignore_errors=True)


def _program(name: str) -> str | None:
    return shutil.which(name, path=os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin"]))


def _connection(port: int) -> Any:
    import pymysql

    return pymysql.connect(host="127.0.0.1", port=port, user="tester")


def _answers(port: int) -> bool:
    import pymysql

    try:
        _connection(port).close()
    except pymysql.err.OperationalError:
        return False
    return True
