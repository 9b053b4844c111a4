"""``prunefront rounds``: prune and fine-tune by turns, a little at a time, down to the budget."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from ..search.budget import KEYS, LATENCY, parse_budget
from ..search.files import METRICS, read_json, write_json
from ..spaces import Cost
from ..spaces.errors import ConfigError
from .commands import output_folder, searched
from .dense import discover_for
from .devices import placed, use_device
from .display import console, errors, finetuned_table, show_load
from .finetuning.command import got_worse, trained
from .making import chosen_budget, make_task
from .overrides import options_keeper
from .runs import DENSE, read_run

#: The costs that rounds approach, with their places in a cost.
_COSTS = {"macs": "macs", "params": "params", "memory": "memory_bytes", "size": "size_bytes"}


def command(config: DictConfig) -> None:
    """Search and fine-tune in rounds of ever smaller budgets, each from the model of the one before."""
    if config.rounds < 1:
        raise ConfigError(f"rounds must be at least 1, not {config.rounds}")
    if config.mode != "budget":
        raise ConfigError("rounds go down to a budget; mode=front has none")
    if config.workers not in (None, 1) or config.devices or config.storage is not None:
        raise ConfigError(
            "rounds run in one process on one device=, with a journal each: leave workers, devices and storage to "
            "prunefront search"
        )
    use_device(config.device)
    run_dir, budget = output_folder(), chosen_budget(config)
    parse_budget(budget, Cost(1, 1, 1, 1))
    if (run_dir / DENSE).exists():
        raise ConfigError(f"{run_dir} is the run of a search; rounds need a folder of their own")
    keep = options_keeper(run_dir, config)
    task = placed(make_task(config), config.device)
    with console.status("preparing the dense model"):
        dense = discover_for(task, task.make_model(), config).dense_cost if not _is_begun(run_dir) else _dense(run_dir)
    start: Path | None = None if config.start is None else Path(config.start)
    history: list[dict[str, Any]] = []
    rows: dict[str, Mapping[str, Any]] = {}
    for number, limits in enumerate(budgets(budget, dense, config.rounds), 1):
        folder = run_dir / f"round{number}"
        console.print(f"round {number} of {config.rounds}: {described(limits, dense)}", style="bold")
        result = searched(config, limits, task, folder, start, keep)
        if result.is_interrupted:
            raise KeyboardInterrupt
        picked = result.best.name
        (found,) = trained(config, task, folder, [picked], history).values()
        rows[f"{folder.name}/{picked}"] = found.metrics
        start = found.path
        if got_worse(found.metrics):
            start = folder / "front" / picked
            told = f"round {number} got worse by fine-tuning, which is left out: try a lower finetune.lr or more epochs"
            errors.print(told, style="yellow", highlight=False, soft_wrap=True)
        assert start is not None
        scores = _scores(read_json(start / METRICS))
        history.append({"round": number, "budget": limits, "model": str(start.relative_to(run_dir)), **scores})
        write_json(run_dir / "rounds.json", {"dense": vars(dense), "rounds": history})
    console.print(finetuned_table(rows, read_run(run_dir / "round1")["dense"], task.score_name))
    show_load(str(start))


def budgets(budget: Mapping[str, str], dense: Cost, rounds: int) -> list[dict[str, str]]:
    """Of every round: limits that fall by the same factor from ``dense`` to ``budget``.

    Raises:
        ConfigError: a budget of latency, which is measured against the dense model of its own round.
    """
    if LATENCY in budget:
        raise ConfigError("rounds have budgets of macs, flops, params, memory or size; search for a latency in the end")
    limits = parse_budget(budget, dense).values
    costs = {key: getattr(dense, name) for key, name in _COSTS.items() if limits[KEYS[key][0]] < float("inf")}
    shares = {key: min(1.0, limits[KEYS[key][0]] / cost) for key, cost in costs.items()}
    return [
        {key: f"{costs[key] * share ** (number / rounds):.0f}" for key, share in shares.items()}
        for number in range(1, rounds + 1)
    ]


def described(limits: Mapping[str, str], dense: Cost) -> str:
    return ", ".join(f"{key} {float(limit) / getattr(dense, _COSTS[key]):.1%}" for key, limit in limits.items())


def _scores(metrics: Mapping[str, Any]) -> dict[str, Any]:
    return {key: metrics[key] for key in ("score_before", "score", "test", "macs", "params") if key in metrics}


def _is_begun(run_dir: Path) -> bool:
    path = run_dir / "round1" / DENSE / METRICS
    return path.exists() and "macs" in read_json(path)


def _dense(run_dir: Path) -> Cost:
    kept = read_json(run_dir / "round1" / DENSE / METRICS)
    return Cost(**{name: kept[name] for name in Cost.__dataclass_fields__})
