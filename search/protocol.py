"""How models are timed side by side. Needs Python alone: this file travels to the machine that measures.

Rounds run every model once, in an order that is drawn anew, so that what disturbs the machine disturbs all alike, and
the first model is the reference: ratios are those of one round. Rounds go on until the 95 % interval of every median
ratio is narrow enough, or the time is over. Intervals are those of order statistics, which assume no distribution.

Disturbances that last are another matter: where another process takes one of two processors, the threads of a model
wait for each other, and all models take alike long. So the kernel's counters are read all the while, and rounds beside
other work are left out if there are enough without.
"""

from __future__ import annotations

import math
import os
import random
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

Run = Callable[[], Any]

#: Before every sample the model runs untimed for so long: caches hold what the model before it left there, and its size
#: must not decide. With less, the same plan came out 8 % faster beside four others than beside one.
SETTLE_S = 3e-3
#: A sample is the mean of runs that take so long together.
SAMPLE_S = 5e-3
#: Rounds are judged together that take so long: the kernel counts in hundredths of a second.
WINDOW_S = 0.25
#: Other work on so many processors disturbs.
BUSY = 0.3


def time_side_by_side(
    runs: Sequence[Run],
    tolerance: float = 0.01,
    limit_s: float = 10.0,
    warm_up_s: float = 0.3,
    least_rounds: int = 12,
    seed: int = 0,
) -> tuple[list[list[float]], dict[str, Any]]:
    """Seconds of every run, ``[[seconds of a round, ...] for each of runs]``, and what else the machine did meanwhile:
    ``load``, the processors busy with other work (None where the system does not say), and ``rounds_left_out``.

    ``runs``: functions without arguments that return when the work is done; or that return its seconds themselves.
    Those of which one run is a sample, since they warm up on their own, go with ``warm_up_s=0``.
    """
    for run in runs:
        start = time.perf_counter()
        for count in range(1000):
            run()
            if count >= 2 and time.perf_counter() - start > warm_up_s:
                break
    repeats = [_repeats(run) if warm_up_s else (0, 1) for run in runs]
    shuffled = list(range(len(runs)))
    rng = random.Random(seed)
    quiet, disturbed = _empty(runs), _empty(runs)
    loads: list[tuple[int, float | None]] = []
    start = time.perf_counter()
    while True:
        window, watch = _empty(runs), Watch()
        while not window[0] or watch.seconds < WINDOW_S:
            rng.shuffle(shuffled)
            for index in shuffled:
                run, (settling, timed) = runs[index], repeats[index]
                for _ in range(settling):
                    run()
                window[index].append(_seconds(run, timed))
        load = watch.load
        loads.append((len(window[0]), load))
        for kept, new in zip(quiet if (load or 0.0) <= BUSY else disturbed, window, strict=True):
            kept += new
        is_over = time.perf_counter() - start > limit_s
        if len(quiet[0]) >= least_rounds:
            if is_over or all(_is_narrow(samples, quiet[0], tolerance) for samples in quiet):
                return quiet, {"load": _mean(loads, BUSY), "rounds_left_out": len(disturbed[0])}
        elif is_over and len(quiet[0]) + len(disturbed[0]) >= least_rounds:
            every = [a + b for a, b in zip(quiet, disturbed, strict=True)]
            return every, {"load": _mean(loads, math.inf), "rounds_left_out": 0}


class Watch:
    """What other processes have done since it was made."""

    def __init__(self) -> None:
        self._start, self._others = time.perf_counter(), _others_s()

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self._start

    @property
    def load(self) -> float | None:
        """Processors busy with other work, or taken away by a hypervisor."""
        now = _others_s()
        return None if now is None or self._others is None else max(0.0, (now - self._others) / self.seconds)


def _empty(runs: Sequence[Run]) -> list[list[float]]:
    return [[] for _ in runs]


def _mean(loads: Sequence[tuple[int, float | None]], most: float) -> float | None:
    """Of the windows with a load of at most ``most``, weighted by their rounds."""
    kept = [(rounds, load) for rounds, load in loads if load is not None and load <= most]
    total = sum(rounds for rounds, _ in kept)
    return round(sum(rounds * load for rounds, load in kept) / total, 2) if total else None


def _repeats(run: Run) -> tuple[int, int]:
    """How many runs in a row settle before a sample, and how many make it."""
    seconds = max(min(_seconds(run, 1) for _ in range(3)), 1e-7)
    return math.ceil(SETTLE_S / seconds), math.ceil(SAMPLE_S / seconds)


def _seconds(run: Run, repeats: int) -> float:
    start = time.perf_counter()
    own = 0.0
    for _ in range(repeats):
        result = run()
        own += result if isinstance(result, float) else 0.0
    return (own or time.perf_counter() - start) / repeats


def _is_narrow(samples: list[float], reference: list[float], tolerance: float) -> bool:
    if samples is reference:  # its ratio to itself is 1: its own spread counts instead, less strictly
        low, middle, high = interval(samples)
        return high - low <= 4 * tolerance * middle
    low, middle, high = interval([a / b for a, b in zip(samples, reference, strict=True)])
    return high - low <= 2 * tolerance * middle


def interval(values: Sequence[float]) -> tuple[float, float, float]:
    """``(low, median, high)``: a 95 % confidence interval of the median, by order statistics."""
    ordered = sorted(values)
    count = len(ordered)
    reach = 0.98 * math.sqrt(count)  # 1.96 standard deviations of a binomial of one half
    low = max(0, math.floor((count - 1) / 2 - reach))
    high = min(count - 1, math.ceil((count - 1) / 2 + reach))
    return ordered[low], statistics.median(ordered), ordered[high]


def conditions() -> dict[str, Any]:
    """What of the machine bears on time: its name, processors, clock governor, temperature in degrees C."""
    found: dict[str, Any] = {"cpu": _cpu(), "cores": os.cpu_count(), "machine": os.uname().machine}
    governor = _read("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")
    temperature = _read("/sys/class/thermal/thermal_zone0/temp")
    if governor:
        found["governor"] = governor
    if temperature and temperature.lstrip("-").isdigit():
        found["temperature_c"] = int(temperature) / 1000
    return found


def _cpu() -> str:
    for line in (_read("/proc/cpuinfo") or "").splitlines():
        if line.startswith(("model name", "Model", "Hardware")):
            return line.partition(":")[2].strip()
    return os.uname().machine


def _others_s() -> float | None:
    """Processor seconds of all processes but this one and its children that have ended, since the machine started."""
    busy, own = _busy(), os.times()
    return None if busy is None else busy - own.user - own.system - own.children_user - own.children_system


def _busy() -> float | None:
    line = (_read("/proc/stat") or "").partition("\n")[0].split()
    if len(line) < 8 or line[0] != "cpu":
        return None
    ticks = [int(value) for value in line[1:9]]
    return (sum(ticks) - ticks[3] - ticks[4]) / os.sysconf("SC_CLK_TCK")


def _read(path: str) -> str | None:
    try:
        with open(path, encoding="utf-8") as file:
            return file.read().strip()
    except OSError:
        return None
