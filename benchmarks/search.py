"""One-shot test accuracy of the pick after the same seconds: our search, its samplers, and what others do.

Run: python -m benchmarks.search [--models resnet20,resnet56,vit] [--budgets 0.5] [--contenders ...] [--seconds 300]
     [--seeds 0,1] [--out search.json]     (PRUNEFRONT_DATA names the folder of task=cifar_resnet)

Searching is done on the even test images, reporting on the odd ones; no training. The clock of a contender starts
before it looks at the model. Its pick after so many seconds is the best one that it could have repaired by then.

``ours``: the default. ``ours:gp`` and so on: the same with another sampler. ``uniform``: the same shares everywhere
with our order and repair; ``uniform l1``: by l1 norm, BatchNorm recalibrated; ``global l1``: units of all layers in one
order of their normalised l1 norms. ``eagleeye``: random widths within the budget, BatchNorm recalibrated, the best
accuracy (Li et al. 2020). ``torch-pruning``: Optuna's TPE suggests a ratio a layer, Torch-Pruning prunes a copy by l1,
BatchNorm is recalibrated, and the excess over the budget is taken off the accuracy. Of a vision transformer
(``benchmarks/vit.py``) it prunes the width of heads, and neurons.
"""

from __future__ import annotations

import argparse
import copy
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from torch import nn

import prunefront
from benchmarks.vit import cifar_vit
from benchmarks.zoo import machine
from prunefront.runners.tasks import Task
from prunefront.runners.tasks.cifar_resnet import cifar_resnet
from prunefront.search.engine import WIDTH_KINDS
from prunefront.search.result import planned
from prunefront.search.study import PARTLY, finished
from prunefront.spaces.calibration import Calibration, precision, recalibrate
from prunefront.spaces.criteria import Evidence, unit_scores

CONTENDERS = (
    "uniform",
    "uniform l1",
    "global l1",
    "ours",
    "ours:gp",
    "ours:cmaes",
    "ours:allocation",
    "ours:random",
    "eagleeye",
    "torch-pruning",
)
MODELS: dict[str, tuple[str, Callable[[], Task]]] = {
    "resnet20": ("ResNet-20", lambda: cifar_resnet(20)),
    "resnet56": ("ResNet-56", lambda: cifar_resnet(56)),
    "vit": ("ViT", cifar_vit),
}
CUTS = (60, 120, 300)
PARTS = ("ask", "project", "build", "recalibrate", "score", "tell")
Row = dict[str, Any]


def test_accuracy(task: Task, model: nn.Module) -> float:
    assert task.test is not None
    with precision(model, task.autocast):
        return 100 * task.test(model.eval())


def discovered(
    task: Task, model: nn.Module, criterion: str = "auto", compensation: str = "auto", round_to: int = 1
) -> prunefront.Space:
    return prunefront.discover(
        model,
        task.example_inputs,
        kinds=WIDTH_KINDS,
        calibration=task.calibration,
        autocast=task.autocast,
        criterion=criterion,
        compensation=compensation,
        round_to=round_to,
    )


def fixed(task: Task, model: nn.Module, budget: float, name: str) -> Row:
    """What needs no search."""
    started = time.perf_counter()
    simple = () if name == "uniform" else ("l1", "bn")
    space = discovered(task, model, *simple)
    plan = prunefront.project(space, {"macs": f"{100 * budget}%"})
    if name == "global l1":
        plan = global_l1(space, budget)
    candidate = space.apply(plan)
    seconds = time.perf_counter() - started
    return {"seconds": seconds, "macs": macs_share(space, plan), "accuracy": test_accuracy(task, candidate)}


def global_l1(space: prunefront.Space, budget: float) -> prunefront.Plan:
    """The largest number of units, by l1 norm over the mean of their group, that holds the budget."""
    evidence = Evidence(space.model, space._structure, None)
    scores = [values / values.mean() for values in unit_scores("l1", evidence)]
    every = np.sort(np.concatenate(scores))
    low, high = 0, len(every) - 1
    while low < high:
        middle = (low + high) // 2
        if space.cost(_above(space, scores, every[middle])).macs <= budget * space.dense_cost.macs:
            high = middle
        else:
            low = middle + 1
    return _above(space, scores, every[low])


def _above(space: prunefront.Space, scores: list[Any], threshold: float) -> prunefront.Plan:
    widths = {g.name: max(1, int((s >= threshold).sum())) for g, s in zip(space.groups, scores, strict=True)}
    return space.plan(widths)


def searched(
    task: Task, model: nn.Module, budget: float, name: str, seconds: float, seed: int, cuts: tuple[int, ...]
) -> Row:
    """``ours`` with its samplers, or ``eagleeye``."""
    started = time.perf_counter()
    _, _, sampler = name.partition(":")
    is_ours = name != "eagleeye"
    space = discovered(task, model, *(() if is_ours else ("l1", "bn")))
    ends: dict[int, float] = {}
    with tempfile.TemporaryDirectory() as run_dir:
        result = prunefront.search(
            model,
            task.example_inputs,
            score=task.score if is_ours else lambda candidate: task.score(candidate),  # type: ignore[misc]
            budget={"macs": f"{100 * budget}%"},
            n_trials=10**6,
            timeout_s=seconds - (time.perf_counter() - started),
            finalists=1,
            sampler=(sampler or "auto") if is_ours else "random",
            seed=seed,
            run_dir=run_dir,
            space=space,
            autocast=task.autocast,
            callbacks=[lambda _, trial: ends.update({trial.number: time.perf_counter() - started})],
        )
        trials = [t for t in finished(result.study) if PARTLY not in t.user_attrs]
        parts = result.seconds
    before = time.perf_counter()
    space.apply(planned(space, trials[0]))
    repair_s = time.perf_counter() - before
    row: Row = {"trials": len(ends), "partly": len(ends) - len(trials), "repair_s": repair_s, "seconds": dict(parts)}
    running = parts["recalibrate"] + parts["score"]
    row["outside_model"] = 1 - running / sum(
        parts[k] for k in ("ask", "project", "build", "recalibrate", "score", "tell")
    )
    for cut in cuts:
        ready = [t for t in trials if ends[t.number] <= cut - repair_s]
        if ready:
            plan = planned(space, max(ready, key=lambda t: t.values[0]))
            accuracy = test_accuracy(task, space.apply(plan))
            row[str(cut)] = {"accuracy": accuracy, "macs": macs_share(space, plan), "trials": len(ready)}
    return row


def torch_pruning(task: Task, model: nn.Module, budget: float, seconds: float, seed: int, cuts: tuple[int, ...]) -> Row:
    """As a user of both would write it today."""
    started = time.perf_counter()
    dense_macs = macs_by_torch_pruning(task, model)
    best: list[tuple[float, float, float, nn.Module]] = []

    def objective(trial: optuna.Trial) -> float:
        candidate, macs, accuracy = pruned_by_torch_pruning(task, model, trial)
        share = macs / dense_macs
        value = accuracy - max(0.0, share - budget) * 10
        if share <= budget * 1.005:
            best.append((time.perf_counter() - started, accuracy, share, candidate))
        return value

    study = optuna.create_study(direction="maximize", sampler=optuna.samplers.TPESampler(seed=seed))
    study.optimize(objective, timeout=seconds)
    row: Row = {"trials": len(study.trials), "within_budget": len(best)}
    for cut in cuts:
        ready = [entry for entry in best if entry[0] <= cut]
        if ready:
            _, _, share, candidate = max(ready, key=lambda entry: entry[1])
            row[str(cut)] = {"accuracy": test_accuracy(task, candidate), "macs": share, "trials": len(ready)}
    return row


def pruned_by_torch_pruning(
    task: Task, model: nn.Module, trial: optuna.Trial, round_to: int | None = None
) -> tuple[nn.Module, float, float]:
    """A copy of ``model`` that loses of every layer what ``trial`` suggests, its MACs, and its score."""
    import torch_pruning as tp

    candidate = copy.deepcopy(model)
    modules = dict(candidate.named_modules())
    tp.pruner.MagnitudePruner(
        candidate,
        task.example_inputs[0],
        importance=tp.importance.MagnitudeImportance(p=1),
        pruning_ratio=0.0,
        pruning_ratio_dict={modules[name]: trial.suggest_float(name, 0.0, 0.9) for name in _layers(model)},
        ignored_layers=[m for m in modules.values() if isinstance(m, nn.Linear)][-1:],
        num_heads={m.qkv: m.num_heads for m in modules.values() if hasattr(m, "qkv")},
        round_to=round_to,
    ).step()
    for attention in [m for m in candidate.modules() if hasattr(m, "qkv")]:
        attention.head_dim = attention.qkv.out_features // (3 * attention.num_heads)
        attention.attn_dim = attention.num_heads * attention.head_dim
    with precision(candidate, task.autocast):
        recalibrate(candidate, Calibration(task.calibration))  # type: ignore[arg-type]
        return candidate, macs_by_torch_pruning(task, candidate), float(task.score(candidate.eval()))  # type: ignore[misc]


def macs_by_torch_pruning(task: Task, model: nn.Module) -> float:
    import torch_pruning as tp

    macs, _ = tp.utils.count_ops_and_params(model, *task.example_inputs)
    return float(macs)


def _layers(model: nn.Module) -> list[str]:
    """Those that Torch-Pruning gets a ratio for: convolutions, or of a transformer what makes heads and neurons."""
    if hasattr(model, "blocks"):
        return [name for name, _ in model.named_modules() if name.endswith((".qkv", ".fc1"))]
    return [name for name, module in model.named_modules() if isinstance(module, nn.Conv2d)]


def macs_share(space: prunefront.Space, plan: prunefront.Plan) -> float:
    return space.cost(plan).macs / space.dense_cost.macs


def measure(task: Task, model: nn.Module, budget: float, name: str, seconds: float, seed: int) -> Row:
    cuts = tuple(cut for cut in CUTS if cut <= seconds)
    if name in ("uniform", "uniform l1", "global l1"):
        return fixed(task, model, budget, name)
    if name == "torch-pruning":
        return torch_pruning(task, model, budget, seconds, seed, cuts)
    return searched(task, model, budget, name, seconds, seed, cuts)


def table(results: dict[str, Any]) -> str:
    """All rows that have been measured."""
    lines = [f"| model, MACs | contender | {' | '.join(f'{cut} s' for cut in CUTS)} | trials |"]
    lines.append("| --- " * (len(CUTS) + 3) + "|")
    for key, row in sorted(results["rows"].items()):
        model, name = key.split("|")[:2]
        cells = [f"{row[str(cut)]['accuracy']:.2f}" if str(cut) in row else "" for cut in CUTS]
        if "accuracy" in row:
            cells = [f"{row['accuracy']:.2f}"] + [""] * (len(CUTS) - 1)
        lines.append(f"| {model} | {name} | {' | '.join(cells)} | {row.get('trials', '')} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="resnet20,resnet56", help=f"of {', '.join(MODELS)}")
    parser.add_argument("--budgets", default="0.5")
    parser.add_argument("--contenders", default=",".join(CONTENDERS))
    parser.add_argument("--seconds", type=float, default=300.0)
    parser.add_argument("--seeds", default="0", help="such as 0,1,2")
    parser.add_argument("--out", type=Path, help="JSON; rows that are not run again stay as they are")
    options = parser.parse_args()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    results: dict[str, Any] = {"rows": {}}
    if options.out and options.out.exists():
        results = json.loads(options.out.read_text(encoding="utf-8"))
    results["machine"] = machine()
    jobs: list[tuple[str, Callable[[], Row]]] = []
    for chosen in options.models.split(","):
        title, make_task = MODELS[chosen]
        task = make_task()
        model = task.make_model()
        results.setdefault("dense", {})[chosen] = test_accuracy(task, model)
        for seed in map(int, options.seeds.split(",")):
            for budget in map(float, options.budgets.split(",")):
                for name in options.contenders.split(","):
                    key = f"{title}, {budget:.0%}|{name}|{seed}"
                    arguments = (task, model, budget, name, options.seconds, seed)
                    jobs.append((key, lambda a=arguments: measure(*a)))
    for key, job in jobs:
        results["rows"][key] = job()
        print(key, json.dumps(results["rows"][key]), flush=True)
        if options.out:
            options.out.write_text(json.dumps(results, indent=1), encoding="utf-8")
    print(table(results))


if __name__ == "__main__":
    main()
