"""``prunefront dashboard``: Optuna's own dashboard on the study of a run."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from omegaconf import DictConfig

from ..search.study import JOURNAL, read_study, storage_of
from ..spaces.errors import ConfigError
from .display import console


def command(config: DictConfig) -> None:
    """Open optuna-dashboard on the study of a run, finished or not: all trials with plans, costs and constraints."""
    run_dir = Path(config.run)
    study = read_study(run_dir)
    if importlib.util.find_spec("optuna_dashboard") is None:
        raise ConfigError("the dashboard is Optuna's: pip install 'prunefront[dashboard]'")
    from optuna_dashboard import run_server

    console.print(f"{len(study.get_trials(deepcopy=False))} trials of {run_dir}")
    console.print(f"http://{config.host}:{config.port}/dashboard  (Ctrl-C ends)", soft_wrap=True)
    try:
        run_server(storage_of(run_dir / JOURNAL), host=config.host, port=config.port)
    except OSError as error:
        told = f"{config.host}:{config.port} cannot be listened to: {error.strerror or error}"
        raise ConfigError(f"{told}; try another port=") from error
