"""What the commands do with their composed configuration."""

from __future__ import annotations

import json
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
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from rich.status import Status
from torch import nn

from ..search import Result, load, parse_budget
from ..search import search as run_search
from ..search.candidates import score_dense
from ..search.engine import check_options
from ..search.fitting import described_error
from ..search.guidance import FIDELITY
from ..search.latency import LatencyModel
from ..search.measurement import Settings
from ..search.problem import objective_of
from ..search.progress import SearchProgress
from ..search.samplers import check_sampler
from ..search.saved import METRICS, load_with, read_json, save_model, write_json
from ..search.stairs import Stairs, override
from ..search.timing import Timing
from ..spaces import Cost, Space, discover
from ..spaces.devices import CPU
from ..spaces.errors import ConfigError, PrunefrontError, SearchError, StorageError
from ..spaces.groups import Group
from ..spaces.inputs import Inputs
from .beside import beside
from .devices import devices_of, placed
from .display import console, errors, front_table, latency_view, show_load, space_view, stairs_view
from .finetuning.trial import TrialTuning
from .modules import look_in_current_folder
from .overrides import options_keeper, to_be_repeated
from .picking import picked_by
from .report import write_report
from .runs import DENSE, read_run
from .tasks import Task
from .tracking import Guarded

#: The budget of a search that names none.
DEFAULT_BUDGET = {"macs": "50%"}
#: What latency was predicted from, in the run's folder.
LATENCY_FILE = "latency.json"
#: Keys of a task that a search makes no use of: other values are no other task.
TRAINING_KEYS = ("training", "batch_size")


def search(config: DictConfig) -> float:
    """Search within a budget or along the front, and save the models that were found."""
    run_dir = output_folder()
    budget = chosen_budget(config)
    check_early(config, budget)
    devices = devices_of(config)
    keep = options_keeper(run_dir, config)
    task = placed(make_task(config), devices[0] if devices else None)
    if task.device == CPU and not devices and torch.cuda.is_available():
        console.print("the processor runs the models; for the GPU: 'devices=[cuda:0]'", style="dim", highlight=False)
    result = searched(config, budget, task, run_dir, config.start, keep)
    show_result(result, read_run(run_dir), bool(budget))
    return result.best.metrics["score"]


def check_early(config: DictConfig, budget: Mapping[str, str]) -> None:
    """What can be wrong without a model is told before one is trained.

    Raises:
        ConfigError, BudgetError, StorageError: see their messages.
    """
    parse_budget(budget, Cost(1, 1, 1, 1), may_be_empty=True)
    check_options(config.mode, config.guide, config.n_trials, config.finalists, config.patience, config.lowest, budget)
    if "latency" in budget and "_target_" not in config.target:
        raise ConfigError("budget.latency needs the target to measure on, such as target=onnxruntime")
    if isinstance(config.sampler, str):
        check_sampler(config.sampler, config.mode == "front")
    for run in config.warm_start:
        if not Path(run).is_dir():
            raise StorageError(f"warm_start: {run} does not exist; expected the folder of a run")


def output_folder() -> Path:
    """Of the run, as the user would write it; Optuna's messages go to its log file."""
    run_dir = Path(HydraConfig.get().runtime.output_dir)
    optuna.logging.disable_default_handler()
    optuna.logging.enable_propagation()
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
        dense = scored_dense(task, space, run_dir)
    console.print(dense_line(dense, time.monotonic() - began), style="dim", highlight=False, soft_wrap=True)
    timing, latency = timing_of(config), None
    if "latency" in budget:
        assert timing is not None  # checked early
        with console.status("measuring latency") as status:
            near = budget if config.mode == "budget" else None
            told = measuring(status, timing.most)
            latency = timing.model(space, Inputs.of(task.example_inputs), budget=near, progress=told)
        described = f"latency is predicted from {len(latency.measured)} plans, off by {described_error(latency)}"
        if (even := latency.steps.inputs) > 1:
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
            console.print(
                told if task.score is None else f"{told}; the best get the score", style="dim", highlight=False
            )
        tracker.start(plain(config), run_dir, dense, objective)

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


def dense_line(dense: Mapping[str, Any], seconds: float) -> str:
    """What the search starts from, and how long it took to get there: a task may train its model first."""
    scores = f"{dense['score_name']} {dense['score']:.4f}"
    if "test" in dense:
        scores += f" (test {dense['test']:.4f})"
    return f"dense: {scores}, {dense['macs']:,} MACs, {dense['params']:,} params, ready in {seconds:.1f} s"


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


def instantiated(config: DictConfig, name: str, own: type[PrunefrontError]) -> Any:
    """What ``_target_`` makes. Errors of the kind ``own`` are raised as they are, others as ConfigError."""
    try:
        return hydra.utils.instantiate(config, _convert_="all")
    except HydraException as error:
        if isinstance(error.__cause__, own):
            raise error.__cause__ from None
        raise ConfigError(f"the {name} cannot be made: {str(error).strip()}") from error


def sampler_of(config: DictConfig) -> Any:
    """A name, or what ``_target_`` makes. Raises ConfigError for what is no sampler."""
    if isinstance(config.sampler, str):
        return config.sampler
    sampler = instantiated(config.sampler, "sampler", ConfigError)
    if not isinstance(sampler, optuna.samplers.BaseSampler):
        raise ConfigError(f"sampler._target_ must make an Optuna sampler, not {type(sampler).__name__}")
    return sampler


def tuning_of(config: DictConfig, task: Task) -> TrialTuning | None:
    """A moment of training for every candidate, or None. Raises ConfigError where the task cannot be trained on."""
    if not config.finetune_steps:
        return None
    return TrialTuning(task, config.finetune_steps, config.finetune_lr, config.seed)


def timing_of(config: DictConfig) -> Timing | None:
    """What measures latency, or None. Raises TargetError for what the target cannot do."""
    if "_target_" not in config.target:
        return None
    target = instantiated(config.target, "target", PrunefrontError)
    options = config.latency
    return Timing(
        target,
        error=options.error,
        most=options.most,
        limit_s=options.limit_s,
        settings=Settings(tolerance=options.tolerance, limit_s=options.measurement_s, seed=config.seed),
        cache=Path(options.cache).expanduser(),
        batch_size=options.batch_size,
        input_shapes=plain(options.input_shapes),
    )


def make_task(config: DictConfig) -> Task:
    """Raises ConfigError for whatever keeps the task from being made."""
    look_in_current_folder()
    task = instantiated(config.task, "task", ConfigError)
    if not isinstance(task, Task):
        raise ConfigError(f"task._target_ must make a prunefront Task, not {type(task).__name__}")
    return task


def prepare(
    task: Task, config: DictConfig, run_dir: Path, start: str | Path | None = None, joins: bool = False
) -> Space:
    """The space of the dense model, which the run keeps in ``dense`` before anything of it can fail: it may have been
    trained.

    ``start``: a saved model that is the dense one instead of the task's. ``joins``: the run is another process's.

    Raises:
        SearchError: the run directory belongs to another task.
    """
    folder, described = run_dir / DENSE, described_task(config, start)
    kept = read_json(folder / METRICS) if folder.exists() else None
    if kept is not None and kept.get("task") != described:
        if joins or "score" in kept:
            raise SearchError(f"{run_dir} belongs to another task: {kept.get('task')}; choose another run_dir")
        kept = None  # nothing has come of it: its score failed, for example
    if kept is not None:
        return discover_for(task, kept_model(folder, task, start), config)
    model = task.make_model() if start is None else load(Path(start)).to(task.device)
    save_model(folder, model, None, {"task": described}, task.example_inputs)
    if task.device == CPU:  # where all processes can share the file
        model = kept_model(folder, task, start, model)
    return discover_for(task, model, config)


def described_task(config: DictConfig, start: str | Path | None) -> str:
    """What says whether another search has the same dense model, as text."""
    described = {key: value for key, value in plain(config.task).items() if key not in TRAINING_KEYS}
    return json.dumps(described if start is None else {**described, "start": str(start)}, sort_keys=True)


def scored_dense(task: Task, space: Space, run_dir: Path) -> dict[str, Any]:
    """Costs and scores of the dense model of ``space``, with their ``score_name``; the run keeps them."""
    path = run_dir / DENSE / METRICS
    kept = read_json(path)
    if "score" not in kept:
        name = FIDELITY if task.score is None else task.score_name
        kept |= {**asdict(space.dense_cost), **dense_scores(task, space.model), "score_name": name}
        write_json(path, kept)
    return {"score_name": task.score_name, **{key: value for key, value in kept.items() if key != "task"}}


def kept_model(folder: Path, task: Task, start: str | Path | None, made: nn.Module | None = None) -> nn.Module:
    """The dense model from the run's folder: on the processor all processes map the same file, so that memory holds its
    weights once. ``made``: the one that was saved there, where this process has done so."""
    try:
        model = load_with(folder, task.make_model if made is None else lambda: made).to(task.device)
    except StorageError:
        if made is not None:
            return made
        if task.trains or start is not None:
            raise
        return task.make_model()  # of a class that has not been imported yet, for example
    if task.held is not None and start is None and task.device == CPU:
        share_weights(task.held, model)
    return model


def share_weights(model: nn.Module, other: nn.Module) -> None:
    """Let ``model`` have the tensors of ``other`` instead of its own, where all are equal."""
    theirs = {**dict(other.named_parameters()), **dict(other.named_buffers())}
    own = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    if own.keys() == theirs.keys() and all(torch.equal(tensor, theirs[name]) for name, tensor in own.items()):
        for name, tensor in own.items():
            tensor.data = theirs[name].data


def discover_for(task: Task, model: nn.Module, config: DictConfig) -> Space:
    return discover(
        model,
        task.example_inputs,
        calibration=task.calibration,
        loss=task.loss,
        autocast=task.autocast,
        seed=config.seed,
        **plain(config.space),
    )


def dense_scores(task: Task, model: nn.Module) -> dict[str, float]:
    """The score and the test score of the dense model. Raises ConfigError when it cannot be scored."""
    # Without a score it is fidelity, and that to itself is known: no difference at all.
    functions = {"score": task.score or (lambda _: 0.0), "test": task.test}
    return {
        name: score_dense(model, function, f"task.{name}", task.autocast)
        for name, function in functions.items()
        if function is not None
    }


def show_result(result: Result, run: Mapping[str, Any], has_budget: bool) -> None:
    rows = [{"name": entry.name, **entry.metrics} for entry in result.front]
    console.print(front_table(rows, result.best.name, run["dense"], run["score_name"], picked_by(has_budget)))
    for remark in result.remarks:
        console.print(remark, style="dim", highlight=False, soft_wrap=True)
    total = sum(result.seconds.values()) or 1.0
    parts = ", ".join(f"{name} {seconds / total:.0%}" for name, seconds in result.seconds.items())
    console.print(f"{total:.1f} s: {parts}", style="dim")
    console.print(f"run     {result.run_dir}", soft_wrap=True, highlight=False)
    console.print(f"report  {result.run_dir}/report.html", soft_wrap=True, highlight=False)
    show_load(result.run_dir)
    more = shlex.join([f"resume={result.run_dir}", *to_be_repeated(result.run_dir)])
    console.print(f"more    prunefront search {more} n_trials=...", soft_wrap=True, highlight=False)


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


def given_budget(config: DictConfig) -> dict[str, str]:
    return {str(key): value for key, value in config.budget.items() if value is not None}


def chosen_budget(config: DictConfig) -> dict[str, str]:
    """The given budget; half of the MACs where a search within a budget has none."""
    return given_budget(config) or ({} if config.mode == "front" else DEFAULT_BUDGET)


def plain(config: DictConfig) -> Any:
    return OmegaConf.to_container(config, resolve=True)
