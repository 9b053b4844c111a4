"""What the commands do with their composed configuration."""

from __future__ import annotations

import json
import logging
import shlex
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, nullcontext, redirect_stdout
from dataclasses import asdict
from pathlib import Path
from typing import Any

import hydra
import optuna
import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig
from rich.status import Status

from ..search import Result, parse_budget
from ..search import search as run_search
from ..search.budget import check_reachable
from ..search.engine import check_options, early_header
from ..search.files import SPACE, read_json, write_json
from ..search.fitting import FIRST, described_error
from ..search.formats import FIDELITY
from ..search.front import picked_by
from ..search.latency import LEAST, LatencyModel
from ..search.problem import objective_of
from ..search.progress import SearchProgress
from ..search.samplers import check_sampler
from ..search.stairs import Stairs, override
from ..search.study import Store, check_same_search, ended
from ..search.timing import Timing
from ..spaces import Cost, Space
from ..spaces.devices import CPU
from ..spaces.errors import ConfigError, StorageError
from ..spaces.groups import Group
from ..spaces.inputs import Inputs
from .beside import beside
from .dense import dense_line, discover_for, prepare, scored_dense
from .devices import devices_of, placed
from .display import console, errors, front_table, latency_view, show_load, space_view, stairs_view
from .making import chosen_budget, make_task, plain, sampler_of, timing_of, tuning_of
from .overrides import options_keeper, shown_options, to_be_repeated
from .report import write_report
from .runs import read_run
from .tasks import Task
from .tracking import Guarded

logger = logging.getLogger(__name__)

#: What latency was predicted from, in the run's folder.
LATENCY_FILE = "latency.json"


def search(config: DictConfig) -> float:
    """Search within a budget or along the front, and save the models that were found."""
    run_dir = output_folder()
    budget = chosen_budget(config)
    check_early(config, budget, run_dir)
    devices = devices_of(config)
    keep = options_keeper(run_dir, config)
    task = placed(make_task(config), devices[0] if devices else None)
    if task.device == CPU and not devices and torch.cuda.is_available():
        console.print("the processor runs the models; for the GPU: 'devices=[cuda:0]'", style="dim")
    result = searched(config, budget, task, run_dir, config.start, keep)
    logger.info("%s", result)
    show_result(result, read_run(run_dir), config.n_trials)
    if result.is_interrupted:
        raise KeyboardInterrupt  # what comes next in a script or a multirun was not meant to run
    return result.best.metrics["score"]


def check_early(config: DictConfig, budget: Mapping[str, str], run_dir: Path) -> None:
    """What can be wrong without a model is told before one is trained.

    Raises:
        ConfigError, BudgetError, StorageError: see their messages.
        SearchError: ``run_dir`` has another search.
    """
    parse_budget(budget, Cost(1, 1, 1, 1), may_be_empty=True)
    check_options(config.mode, config.guide, config.n_trials, config.finalists, config.patience, config.lowest, budget)
    if "latency" in budget and "_target_" not in config.target:
        raise ConfigError("budget.latency needs the target to measure on, such as target=onnxruntime")
    check_latency(config)
    if isinstance(config.sampler, str):
        check_sampler(config.sampler, config.mode == "front")
    for run in config.warm_start:
        if not Path(run).is_dir():
            raise StorageError(f"warm_start: {run} does not exist; expected the folder of a run")
    if (run_dir / SPACE).exists():
        there = read_json(run_dir / SPACE).get("search")
        header = early_header(config.mode, budget, config.seed, Store(run_dir, config.storage))
        if isinstance(there, dict):  # else it is damaged, which the search tells
            check_same_search(there, header, f"the run directory {run_dir}")


def check_latency(config: DictConfig) -> None:
    """Raises ConfigError where latency is to be predicted from fewer plans than can be."""
    if config.latency.most < LEAST:
        raise ConfigError(f"latency.most must be at least {LEAST}, not {config.latency.most}")


def output_folder() -> Path:
    """Of the run, as the user would write it; Optuna's messages go to its log file."""
    run_dir = Path(HydraConfig.get().runtime.output_dir)
    optuna.logging.disable_default_handler()
    optuna.logging.enable_propagation()
    if Path.cwd() != Path(hydra.utils.get_original_cwd()):  # hydra.job.chdir: a relative path would lead nowhere later
        return run_dir
    return run_dir.relative_to(Path.cwd()) if run_dir.is_relative_to(Path.cwd()) else run_dir


def searched(
    config: DictConfig,
    budget: dict[str, str],
    task: Task,
    run_dir: Path,
    start: str | Path | None,
    keep: Callable[[], None],
) -> Result:
    """Search in ``run_dir``, with latency measured where the budget or the target asks for it, and write the report.

    ``start``: a saved model that takes the place of the task's. ``keep`` writes down the options, when the search in
    ``run_dir`` is known to be this one.
    """
    began = time.monotonic()
    with console.status("preparing the dense model"):
        space = prepare(task, config, run_dir, start)
        check_reachable(space, budget)  # before it is scored
        dense = scored_dense(task, space, run_dir)
    console.print(dense_line(dense, time.monotonic() - began), style="dim", soft_wrap=True)
    timing, latency = timing_of(config), None
    if "latency" in budget:
        assert timing is not None  # checked early
        with console.status("measuring latency") as status:
            near = budget if config.mode == "budget" else None
            told = measuring(status, timing.most)
            latency = timing.model(space, Inputs.of(task.example_inputs), budget=near, progress=told)
        described = f"latency is predicted from {len(latency.measured)} plans, off by {described_error(latency)}"
        if (even := latency.steps.inputs) > 1 and len(latency.measured) >= FIRST:
            described += f"; widths that are multiples of {even} are faster: space.round_to={even} keeps to them"
        console.print(described, style="dim")
        dense = {**dense, "latency_ms": latency.dense_ms}
    result = tracked_search(config, budget, task, space, dense, run_dir, timing, latency, keep)
    write_report(run_dir)
    return result


def tracked_search(
    config: DictConfig,
    budget: dict[str, str],
    task: Task,
    space: Space,
    dense: dict[str, Any],
    run_dir: Path,
    timing: Timing | None,
    latency: LatencyModel | None,
    keep: Callable[[], None],
) -> Result:
    """Search with a progress bar and the tracker of ``config``."""
    objective = objective_of(budget)
    tracker = Guarded(hydra.utils.instantiate(config.tracker))
    bar = SearchProgress(config.n_trials, objective, dense, console)
    result = None

    others = ExitStack()

    def begin(study: optuna.Study) -> None:
        keep()
        if latency is not None:
            write_json(run_dir / LATENCY_FILE, latency.known.to_json())  # other processes predict the same
        others.enter_context(beside(config.workers, run_dir, devices_of(config)))
        bar.begin(study)
        if study.metric_names and study.metric_names[0] == FIDELITY:
            told = "trials are told the fidelity: minus the divergence from the dense outputs, 0 is the same"
            console.print(told if task.score is None else f"{told}; the best get the score", style="dim")
        elif space.repairs_in_two_efforts:
            told = "trials are scored after a quick repair; the best are repaired thoroughly and scored again"
            console.print(told, style="dim")
        tracker.start({**shown_options(config), "budget": budget}, run_dir, dense, objective)

    try:
        with others, bar as progress:
            result = run_search(
                space.model,
                task.example_inputs,
                **search_options(config, budget, task),
                test=task.test,
                dense=dense,
                run_dir=run_dir,
                space=space,
                timing=timing,
                latency=latency,
                callbacks=(progress, tracker.trial),
                before_trials=begin,
                before_judging=others.close,
                judging=progress.judging,
            )
    finally:
        tracker.finish(result)
    return result


def search_options(config: DictConfig, budget: dict[str, str], task: Task) -> dict[str, Any]:
    """Arguments of :func:`prunefront.search` that the search and its workers share."""
    copied = ("mode", "lowest", "n_trials", "timeout_s", "patience", "guide", "finalists", "seed", "storage")
    return {
        **{name: config[name] for name in copied},
        "score": task.score,
        "budget": budget,
        "sampler": sampler_of(config),
        "warm_start": plain(config.warm_start),
        "tuning": tuning_of(config, task),
        "autocast": task.autocast,
    }


def show_result(result: Result, run: Mapping[str, Any], n_trials: int) -> None:
    """``n_trials``: how many were wanted."""
    rows = [{"name": entry.name, **entry.metrics} for entry in result.front]
    console.print(
        front_table(rows, result.best.name, run["dense"], run["score_name"], picked_by(result.has_budget, len(rows)))
    )
    for remark in result.remarks:
        console.print(remark, style="dim", soft_wrap=True)
    total = sum(result.seconds.values()) or 1.0
    parts = ", ".join(f"{name} {seconds / total:.0%}" for name, seconds in result.seconds.items())
    console.print(f"{total:.1f} s: {parts}", style="dim")
    console.print(f"run     {result.run_dir}", soft_wrap=True)
    console.print(f"report  {result.run_dir}/report.html", soft_wrap=True)
    show_load(result.run_dir)
    more = shlex.join([f"resume={result.run_dir}", *to_be_repeated(result.run_dir)])
    done, _ = ended(result.study.get_trials(deepcopy=False))
    wanted = n_trials if done < n_trials else 2 * done
    console.print(f"more    prunefront search {more} n_trials={wanted}", soft_wrap=True)


def space(config: DictConfig) -> None:
    """Show what can be pruned, at which share of the cost, what cannot and why, and how small the model can get."""
    status = nullcontext() if config.json else errors.status("preparing the dense model")
    with redirect_stdout(sys.stderr), status:  # stdout is for the result alone
        task = make_task(config)
        found = discover_for(task, task.make_model(), config)
    if config.json:
        print(json.dumps(described_space(found), indent=1))
    else:
        console.print(space_view(found))


def described_space(space: Space) -> dict[str, Any]:
    """Everything that the tree shows and more, as plain JSON values."""
    whole = space.dense_cost
    least = space.smallest_costs()

    def described(group: Group) -> dict[str, Any]:
        (low, high), share = space.options.bounds(group), space.share_of_cost(group)
        return {
            "name": group.name,
            "kind": group.kind,
            "size": group.size,
            "low": low,
            "high": high,
            "step": space.options.step(group),
            "exact": group.exact,
            "members": [[member.tensor, member.dim] for member in group.members],
            "blocks": list(group.blocks),
            "share_of_macs": share.macs / max(whole.macs, 1),
            "share_of_params": share.params / max(whole.params, 1),
        }

    return {
        "dense_cost": asdict(whole),
        "smallest_cost": {name: int(value) for name, value in zip(asdict(whole), least, strict=True)},
        "seconds": space.seconds,
        "dimensions": list(space.dimensions),
        "groups": [described(group) for group in space.groups],
        "frozen": [asdict(frozen) for frozen in space.frozen],
    }


def measure(config: DictConfig) -> None:
    """Measure plans of a model on a target until their latency can be predicted, and show how well it can."""
    if config.steps and config.refresh:
        raise ConfigError("steps=true keeps nothing to refresh; leave one of them out")
    check_latency(config)
    status = nullcontext() if config.json else errors.status("measuring latency")
    timing = timing_of(config)
    if timing is None:
        raise ConfigError("there is nothing to measure on with target=none; try target=onnxruntime")
    with redirect_stdout(sys.stderr), status as shown:
        task = make_task(config)
        found = discover_for(task, task.make_model().eval(), config)
        inputs = Inputs.of(task.example_inputs)
        if config.steps:
            stairs = timing.stairs(found, inputs)
        else:
            progress = measuring(shown, timing.most)
            model = timing.model(found, inputs, refresh=config.refresh, progress=progress)
    if config.steps:
        show_stairs(stairs, timing, config.json)
    elif config.json:
        print(json.dumps({**model.to_json(), "target": dict(timing.target.description)}, indent=1))
    else:
        console.print(latency_view(model, timing.target.description))


def measuring(status: Status | None, most: int) -> Callable[[int], None]:
    """Shows how many plans are measured."""
    return lambda done: None if status is None else status.update(f"measuring latency: {done} of at most {most} plans")


def show_stairs(stairs: Sequence[Stairs], timing: Timing, as_json: bool) -> None:
    if as_json:
        described = [found.to_json() for found in stairs]
        target = dict(timing.target.description)
        print(json.dumps({"steps": described, "override": override(stairs), "target": target}, indent=1))
    else:
        console.print(stairs_view(stairs, timing.target.description))
