"""Published systems, each by one command.

``prunefront experiment NAME`` composes ``conf/experiment/NAME.yaml`` and runs the function ``run`` of the module
of that name here.
"""

from __future__ import annotations

import importlib

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

EXPERIMENTS = ("li2016", "michel2019", "shearing")


def command(config: DictConfig) -> None:
    """Reproduce a published system in several steps: tables, figures and models."""
    name = str(HydraConfig.get().job.config_name).rpartition("/")[2]
    importlib.import_module(f"{__name__}.{name}").run(config)
