"""One small search from the command line, which many tests look at."""

from pathlib import Path

import pytest

from prunefront.runners.cli import main

TINY = ["task.width=4", "task.epochs=2", "n_trials=6", "sampler=random"]


@pytest.fixture
def tiny() -> list[str]:
    return TINY


@pytest.fixture(scope="session")
def digits_run(tmp_path_factory) -> Path:
    """A finished digits search with an offline W&B run. Read only."""
    run_dir = tmp_path_factory.mktemp("runs") / "digits"
    assert main(["search", *TINY, f"run_dir={run_dir}", "tracker.mode=offline"]) == 0
    return run_dir
