"""``prunefront worker``: one more process on a search that another has begun, on this machine or another."""

from __future__ import annotations

import time
from pathlib import Path

from omegaconf import DictConfig

from ..search.engine import work
from ..search.files import DENSE, METRICS, read_json
from ..search.latency import LatencyModel, Measurements
from ..search.study import JOIN_WAIT_S
from ..spaces import Space
from ..spaces.errors import ConfigError, StorageError
from .commands import LATENCY_FILE, search_options
from .dense import prepare
from .devices import devices_of, placed
from .display import console, errors
from .making import chosen_budget, make_task, timing_of
from .overrides import is_unused


def command(config: DictConfig) -> None:
    """Join a search that another process has begun, from this machine or another, until it is over."""
    run_dir, devices = Path(config.run_dir), devices_of(config)
    if len(devices) > 1 or config.workers not in (None, 1):
        raise ConfigError("a worker is one process on one device: start one for each, without workers=")
    task = placed(make_task(config), devices[0] if devices else None)
    if task.trains and not (run_dir / DENSE / METRICS).exists():
        what = f"{run_dir} does not exist" if is_unused(run_dir) else f"{run_dir / DENSE} is missing"
        raise StorageError(f"{what}: the task trains its model, so copy that folder of the search")
    with errors.status("preparing the dense model"):
        space = prepare(task, config, run_dir, config.start, joins=True)
    budget = chosen_budget(config)
    work(
        space.model,
        task.example_inputs,
        **search_options(config, budget, task),
        run_dir=run_dir,
        space=space,
        timing=timing_of(config),
        latency=known_latency(space, run_dir) if "latency" in budget else None,
    )
    console.print(f"done with {run_dir}")


def known_latency(space: Space, run_dir: Path) -> LatencyModel:
    """As the search writes it when it has measured. Raises StorageError where it does not within ``JOIN_WAIT_S``."""
    deadline = time.monotonic() + JOIN_WAIT_S
    while not (run_dir / LATENCY_FILE).exists() and time.monotonic() < deadline:
        time.sleep(0.5)
    held = read_json(run_dir / LATENCY_FILE)
    try:
        return LatencyModel(space, Measurements.from_json(held, len(space.dimensions)))
    except (KeyError, TypeError, ValueError) as error:
        raise StorageError(f"{run_dir / LATENCY_FILE} is damaged: {error}") from error
