"""Processes that a search starts beside itself."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from hydra.core.hydra_config import HydraConfig

from .overrides import config_dir_among, key_of, quoted

logger = logging.getLogger(__name__)

#: Seconds that processes have to see that a search is over, and to end after they were interrupted.
GRACE_S, END_S = 3, 60


class Others:
    """The processes beside this one."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.processes: list[subprocess.Popen[bytes]] = []

    def end(self) -> None:
        """Wait until they are gone; those that are still preparing, or in the middle of a trial, are interrupted."""
        deadline = time.monotonic() + GRACE_S
        while time.monotonic() < deadline and any(process.poll() is None for process in self.processes):
            time.sleep(0.05)
        for process in self.processes:
            if process.poll() is None:
                process.send_signal(signal.SIGINT)
        for number, process in enumerate(self.processes, 1):
            try:
                process.wait(END_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            if process.returncode not in (0, 130, -signal.SIGINT, -signal.SIGKILL):
                log = self.folder / f"{number}.log"
                logger.warning("worker %d failed; %s says: %s", number, log, _mistake(log))
        self.processes.clear()


@contextlib.contextmanager
def beside(workers: int | None, run_dir: Path, devices: Sequence[str]) -> Iterator[Others]:
    """``workers`` processes on the search in ``run_dir``, this one included, until it is left; None: one a device. They
    take ``devices``, if there are any, in turn, this one the first.

    They share the processors, and are given the options of this command line: no file of the run decides what they do.
    One that fails is told of, and the search goes on without it. Models are verified when they have ended.
    """
    workers = max(1, len(devices)) if workers is None else workers
    others = Others(run_dir / "workers")
    if workers == 1:
        yield others
        return
    threads = max(1, (os.cpu_count() or 1) // workers)
    command = [sys.executable, "-m", "prunefront", "worker", *_overrides(run_dir)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    others.folder.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as files, _threads(threads):
        for number in range(1, workers):
            log = files.enter_context((others.folder / f"{number}.log").open("wb"))
            # A session of their own: Ctrl-C reaches them through this process, once.
            started = subprocess.Popen(
                [*command, *([f"devices=[{devices[number % len(devices)]}]"] if devices else [])],
                env=environment,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            others.processes.append(started)
        try:
            yield others
        finally:
            others.end()


def _mistake(log: Path) -> str:
    """The line with the error; its explanation may have more lines."""
    lines = log.read_text(errors="replace").strip().splitlines() or ["nothing"]
    return next((line for line in lines if line.startswith("error ")), lines[-1])


def _overrides(run_dir: Path) -> list[str]:
    own, hydra = ("run_dir", "workers", "devices"), HydraConfig.get()
    given = [text for text in hydra.overrides.task if key_of(text) not in own]
    return [*config_dir_among(hydra.runtime.config_sources), *given, f"run_dir={quoted(str(run_dir))}"]


@contextlib.contextmanager
def _threads(threads: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)
