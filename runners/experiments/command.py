"""``prunefront experiment NAME``: a published system, reproduced."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from ..commands import plain
from ..display import console, errors

#: Modules of this folder with a function ``run(run_dir, ...)`` and one that describes what it returns.
EXPERIMENTS = ("li2016", "michel2019")


def command(config: DictConfig) -> None:
    """Reproduce a published system of structured pruning, with its figure."""
    run_dir = Path(HydraConfig.get().runtime.output_dir)
    name = HydraConfig.get().runtime.choices["experiment"]
    options: dict[str, Any] = plain(config.experiment)
    module = importlib.import_module(f"{__package__}.{name}")
    with errors.status(f"{name}: the log is in {run_dir}"):
        results = module.run(run_dir, **options)
    console.print(module.described(results), soft_wrap=True)
    console.print(f"results and figures  {run_dir}", soft_wrap=True, highlight=False)
