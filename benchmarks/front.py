"""Whole fronts after the same seconds, and one search of the front beside one for each budget.

Run: python -m benchmarks.front [--depth 56] [--contenders ...] [--seconds 300] [--seeds 0,1] [--singles] [--out FILE]
     (PRUNEFRONT_DATA names the folder of task=cifar_resnet)

Searching is done on the even test images, reporting on the odd ones; no training. A contender's front after so many
seconds: for each of ``BUDGETS`` the candidate within it that the contender itself likes best, of those that it had by
then. Time for repairing all of them is taken off: thoroughly, or quickly where that would be over a third of the time.
``ours``: ``mode=front``. ``ours:nsga2`` and so on: the same with another sampler. ``uniform``: one share
everywhere for each budget, with our order and repair. ``eagleeye``: random widths within random budgets, BatchNorm
recalibrated (Li et al. 2020). ``torch-pruning``: Optuna's NSGA-II suggests a ratio a layer for Torch-Pruning, accuracy
and MACs are the objectives, BatchNorm is recalibrated.

The hypervolume is the mean over all budgets between the least and the largest of the accuracy that the front has
within them, in %: the area under its stairs. ``--singles``: searches for single budgets, each with the time of one
budget's share of the front's.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from torch import nn

import prunefront
from benchmarks.search import discovered, macs_by_torch_pruning, pruned_by_torch_pruning, searched, test_accuracy
from benchmarks.zoo import machine
from prunefront.runners.tasks import Task
from prunefront.runners.tasks.cifar_resnet import cifar_resnet
from prunefront.search.result import planned
from prunefront.search.study import PARTLY, finished

CONTENDERS = ("uniform", "ours", "ours:nsga2", "ours:tpe", "eagleeye", "torch-pruning")
CUTS = (60, 120, 300)
BUDGETS = (0.3, 0.35, 0.4, 0.5, 0.6, 0.7)
SINGLES = (0.7, 0.5, 0.35)
Row = dict[str, Any]


@dataclass(frozen=True)
class Scored:
    """One candidate: when it was there (seconds), its share of the MACs, how much its contender likes it.

    ``repairs``: ways to have it as a model, with their seconds, the best first.
    """

    seconds: float
    share: float
    liking: float
    repairs: Sequence[tuple[float, Callable[[], nn.Module]]]

    def ready(self, cut: float) -> tuple[float, Callable[[], nn.Module]]:
        """When there is a front with it, and the model, for a front after ``cut`` seconds."""
        affordable = (r for r in self.repairs if len(BUDGETS) * r[0] <= cut / 3)
        seconds, build = next(affordable, self.repairs[-1])
        return self.seconds + len(BUDGETS) * seconds, build


def searched_front(task: Task, model: nn.Module, name: str, seconds: float, seed: int) -> list[Scored]:
    """``ours`` with its samplers, or ``eagleeye``."""
    started = time.perf_counter()
    is_ours, sampler = name != "eagleeye", name.partition(":")[2] or "auto"
    space = discovered(task, model, *(() if is_ours else ("l1", "bn")))
    ends: dict[int, float] = {}
    with tempfile.TemporaryDirectory() as run_dir:
        study = prunefront.search(
            model,
            task.example_inputs,
            score=task.score if is_ours else lambda candidate: task.score(candidate),  # type: ignore[misc]
            budget={"macs": f"{100 * BUDGETS[-1]}%"},
            mode="front",
            lowest=f"{100 * BUDGETS[0]}%",
            n_trials=10**6,
            timeout_s=seconds - (time.perf_counter() - started),
            sampler=sampler if is_ours else "random",
            seed=seed,
            run_dir=run_dir,
            space=space,
            autocast=task.autocast,
            callbacks=[lambda _, trial: ends.update({trial.number: time.perf_counter() - started})],
        ).study
        trials = [t for t in finished(study) if PARTLY not in t.user_attrs]
    efforts = {"thorough": 0.0, "quick": 0.0}
    for effort in efforts:
        before = time.perf_counter()
        space.apply(planned(space, trials[0]), effort)
        efforts[effort] = time.perf_counter() - before

    def scored(trial: optuna.trial.FrozenTrial) -> Scored:
        share = trial.user_attrs["costs"]["macs"] / space.dense_cost.macs
        plan = planned(space, trial)
        repairs = [(s, partial(space.apply, plan, effort)) for effort, s in efforts.items()]
        return Scored(ends[trial.number], share, trial.values[0], repairs)

    return [scored(trial) for trial in trials]


def uniform_front(task: Task, model: nn.Module, seconds: float) -> list[Scored]:
    """One model a budget, the smallest first; the largest within a budget is liked best."""
    started = time.perf_counter()
    space = discovered(task, model)
    found: list[Scored] = []
    for budget in BUDGETS:
        plan = prunefront.project(space, {"macs": f"{100 * budget}%"})
        space.apply(plan)
        share = space.cost(plan).macs / space.dense_cost.macs
        found.append(Scored(time.perf_counter() - started, share, share, [(0.0, partial(space.apply, plan))]))
        if found[-1].seconds > seconds:
            break
    return found


def torch_pruning_front(task: Task, model: nn.Module, seconds: float, seed: int) -> list[Scored]:
    """As a user of both would write it today."""
    started = time.perf_counter()
    dense_macs = macs_by_torch_pruning(task, model)
    found: list[Scored] = []

    def objective(trial: optuna.Trial) -> tuple[float, float]:
        candidate, macs, accuracy = pruned_by_torch_pruning(task, model, trial)
        share = macs / dense_macs
        found.append(Scored(time.perf_counter() - started, share, accuracy, [(0.0, lambda: candidate)]))
        return accuracy, share

    study = optuna.create_study(
        directions=["maximize", "minimize"], sampler=optuna.samplers.NSGAIISampler(population_size=20, seed=seed)
    )
    study.optimize(objective, timeout=seconds)
    return found


def at(task: Task, candidates: Sequence[Scored], cut: float) -> Row:
    """The accuracies of the front after ``cut`` seconds, by budget, and its hypervolume."""
    ready = [c for c in candidates if c.ready(cut)[0] <= cut]
    picks = {b: max((c for c in ready if c.share <= b), key=lambda c: c.liking, default=None) for b in BUDGETS}
    measured = {id(c): test_accuracy(task, c.ready(cut)[1]()) for c in {id(p): p for p in picks.values() if p}.values()}
    members = {(c.share, measured[id(c)]) for c in picks.values() if c is not None}
    by_budget = {str(b): None if c is None else measured[id(c)] for b, c in picks.items()}
    return {"candidates": len(ready), "accuracy": by_budget, "hypervolume": hypervolume(members)}


def hypervolume(members: set[tuple[float, float]]) -> float:
    """Mean over the budgets from the least to the largest of the best accuracy within them; 0 where there is none."""
    budgets = np.linspace(BUDGETS[0], BUDGETS[-1], 1001)
    return float(np.mean([max((a for share, a in members if share <= budget), default=0.0) for budget in budgets]))


def measure(task: Task, model: nn.Module, name: str, seconds: float, seed: int) -> Row:
    if name == "uniform":
        candidates = uniform_front(task, model, seconds)
    elif name == "torch-pruning":
        candidates = torch_pruning_front(task, model, seconds, seed)
    else:
        candidates = searched_front(task, model, name, seconds, seed)
    return {str(cut): at(task, candidates, cut) for cut in CUTS if cut <= seconds}


def singles(task: Task, model: nn.Module, seconds: float, seed: int) -> Row:
    share = int(seconds / len(SINGLES))
    rows = {b: searched(task, model, b, "ours", share, seed, (share,)) for b in SINGLES}
    return {str(b): row[str(share)]["accuracy"] if str(share) in row else None for b, row in rows.items()}


def table(results: Row) -> str:
    heads = ["contender", "seconds", "hypervolume", *(f"{b:.0%}" for b in BUDGETS), "candidates"]
    lines = [f"| {' | '.join(heads)} |", "| --- " * len(heads) + "|"]
    for key, row in sorted(results["fronts"].items()):
        for cut, found in row.items():
            accuracies = ["" if a is None else f"{a:.2f}" for a in found["accuracy"].values()]
            cells = [f"{found['hypervolume']:.2f}", *accuracies, str(found["candidates"])]
            lines.append(f"| {key} | {cut} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--depth", type=int, default=56)
    parser.add_argument("--contenders", default=",".join(CONTENDERS))
    parser.add_argument("--seconds", type=float, default=300.0)
    parser.add_argument("--seeds", default="0", help="such as 0,1,2")
    parser.add_argument("--singles", action="store_true", help=f"searches for {SINGLES} of the MACs instead")
    parser.add_argument("--out", type=Path, help="JSON; rows that are not run again stay as they are")
    options = parser.parse_args()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    results: Row = {"fronts": {}, "singles": {}}
    if options.out and options.out.exists():
        results = json.loads(options.out.read_text(encoding="utf-8"))
    results["machine"] = machine()
    task = cifar_resnet(options.depth)
    model = task.make_model()
    results.setdefault("dense", {})[str(options.depth)] = test_accuracy(task, model)
    for seed in map(int, options.seeds.split(",")):
        for name in ["singles"] if options.singles else options.contenders.split(","):
            key = f"ResNet-{options.depth}|{name}|{seed}"
            if options.singles:
                results["singles"][key] = singles(task, model, options.seconds, seed)
            else:
                results["fronts"][key] = measure(task, model, name, options.seconds, seed)
            print(key, json.dumps(results["singles" if options.singles else "fronts"][key]), flush=True)
            if options.out:
                options.out.write_text(json.dumps(results, indent=1), encoding="utf-8")
    print(table(results))


if __name__ == "__main__":
    main()
