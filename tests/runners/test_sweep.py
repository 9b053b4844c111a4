"""The sweep file, turned into commands by W&B's own functions: no server is needed to see that they run."""

import itertools
from pathlib import Path

from wandb.sdk.launch.sweeps.utils import create_sweep_command, create_sweep_command_args, load_sweep_config

from prunefront.runners.cli import main

SWEEP = load_sweep_config(str(Path(__file__).parents[2] / "examples" / "sweep.yaml"))


def commands() -> list[list[str]]:
    """What an agent runs for every point of the grid."""
    choices = {key: given.get("values", [given.get("value")]) for key, given in SWEEP["parameters"].items()}
    found = []
    for values in itertools.product(*choices.values()):
        arguments = create_sweep_command_args(
            {"args": {key: {"value": value} for key, value in zip(choices, values, strict=True)}}
        )
        parts = create_sweep_command(list(SWEEP["command"]))
        found.append([text for part in parts for text in arguments.get(part.strip("${}"), [part])])
    return found


def test_every_point_of_the_sweep_is_a_search(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = commands()
    assert len({tuple(command) for command in found}) == 6
    assert found[0] == ["prunefront", "search", "task=digits", "budget.macs=30%", "seed=0", "n_trials=100"]
    small = ["n_trials=2", "task.width=4", "task.epochs=1", "tracker=none", "sampler=random"]
    assert main([*found[0][1:-1], *small, "run_dir=runs/0"]) == 0
    assert (tmp_path / "runs/0/result.json").exists()
