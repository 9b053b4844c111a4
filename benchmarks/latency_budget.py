"""One-shot test accuracy of the pick within a budget of measured latency, after the same seconds.

Run: python -m benchmarks.latency_budget [--share 0.8] [--contenders uniform,ours,torch-pruning] [--seconds 300]
     [--seeds 0,1] [--out latency-budget.json]     (PRUNEFRONT_DATA names the folder of task=cifar_resnet)

ResNet-56 on ONNX Runtime, eight images at once (one alone waits for the calls of its 56 layers: on two cores of an
Intel Xeon half the MACs take 95 % of the time); widths in multiples of four. Searching is done on the even test images,
reporting on the odd ones; no training. The clock starts before the model is looked at, so that of ``ours`` what fits
the latency model counts too. ``uniform``: the largest equal shares that hold the budget when measured, with our order
and repair. ``torch-pruning``: as in ``benchmarks/search.py``, but the latency of every candidate is measured beside the
dense model, and the excess over the budget is taken off the accuracy. Picks are measured again in the end, for longer.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import optuna
from torch import nn

import prunefront
from benchmarks.search import CUTS, discovered, macs_share, pruned_by_torch_pruning, test_accuracy
from benchmarks.zoo import machine
from prunefront.runners.targets import OnnxTarget
from prunefront.runners.tasks import Task
from prunefront.runners.tasks.cifar_resnet import cifar_resnet
from prunefront.search.measurement import Measurement, Settings
from prunefront.search.result import planned
from prunefront.search.study import PARTLY, finished
from prunefront.search.timing import Timing
from prunefront.spaces.inputs import Inputs

MULTIPLE, BATCH = 4, 8
#: Of candidates, and of picks.
BRIEF, LONG = Settings(limit_s=2), Settings(tolerance=0.003, limit_s=20)
Row = dict[str, Any]


def measured(task: Task, dense: nn.Module, candidate: nn.Module, settings: Settings) -> Measurement:
    found: Measurement = prunefront.measure(
        candidate, task.example_inputs, OnnxTarget(), dense, settings, batch_size=BATCH
    )
    return found


def judged(task: Task, dense: nn.Module, candidate: nn.Module) -> Row:
    """Test accuracy and latency of a pick."""
    found = measured(task, dense, candidate, LONG)
    return {"accuracy": test_accuracy(task, candidate), "latency": found.ratio, "high": found.ratio_high}


def uniform(task: Task, dense: nn.Module, share: float) -> Row:
    """The share of MACs is halved towards the largest that holds the budget, to a hundredth."""
    started = time.perf_counter()
    space = discovered(task, dense, round_to=MULTIPLE)
    low, high = space.smallest_costs()[0] / space.dense_cost.macs + 0.001, 1.0
    while high - low > 0.01:
        middle = (low + high) / 2
        candidate = space.slice(prunefront.project(space, {"macs": f"{100 * middle}%"})).eval()
        if measured(task, dense, candidate, BRIEF).ratio_high <= share:
            low = middle
        else:
            high = middle
    plan = prunefront.project(space, {"macs": f"{100 * low}%"})
    candidate = space.apply(plan)
    seconds = time.perf_counter() - started
    return {"seconds": seconds, "macs": macs_share(space, plan), "pick": judged(task, dense, candidate)}


def ours(task: Task, dense: nn.Module, share: float, seconds: float, seed: int) -> Row:
    started = time.perf_counter()
    space = discovered(task, dense, round_to=MULTIPLE)
    budget = {"latency": f"{100 * share}%"}
    timing = Timing(OnnxTarget(), batch_size=BATCH)
    latency = timing.model(space, Inputs.of(task.example_inputs), budget=budget)
    fitted_s = time.perf_counter() - started
    ends: dict[int, float] = {}
    with tempfile.TemporaryDirectory() as run_dir:
        result = prunefront.search(
            dense,
            task.example_inputs,
            score=task.score,
            budget=budget,
            n_trials=10**6,
            timeout_s=seconds - fitted_s,
            finalists=1,
            seed=seed,
            run_dir=run_dir,
            space=space,
            autocast=task.autocast,
            timing=timing,
            latency=latency,
            callbacks=[lambda _, trial: ends.update({trial.number: time.perf_counter() - started})],
        )
        trials = [t for t in finished(result.study) if PARTLY not in t.user_attrs]
    before = time.perf_counter()
    space.apply(planned(space, trials[0]))
    repair_s = time.perf_counter() - before
    row: Row = {
        "trials": len(ends),
        "fitted_s": fitted_s,
        "measured": len(latency.known.measured),
        "repair_s": repair_s,
    }
    for cut in CUTS:
        ready = [t for t in trials if ends[t.number] <= cut - repair_s]
        if ready and cut <= seconds:
            plan = planned(space, max(ready, key=lambda t: t.values[0]))
            found = judged(task, dense, space.apply(plan))
            row[str(cut)] = found | {"macs": macs_share(space, plan), "trials": len(ready)}
    return row


def torch_pruning(task: Task, dense: nn.Module, share: float, seconds: float, seed: int) -> Row:
    started = time.perf_counter()
    within: list[tuple[float, float, nn.Module]] = []

    def objective(trial: optuna.Trial) -> float:
        candidate, _, accuracy = pruned_by_torch_pruning(task, dense, trial, MULTIPLE)
        latency = measured(task, dense, candidate, BRIEF).ratio_high
        if latency <= share:
            within.append((time.perf_counter() - started, accuracy, candidate))
        return accuracy - max(0.0, latency - share) * 10

    study = optuna.create_study(direction="maximize", sampler=optuna.samplers.TPESampler(seed=seed))
    study.optimize(objective, timeout=seconds)
    row: Row = {"trials": len(study.trials), "within_budget": len(within)}
    for cut in CUTS:
        ready = [entry for entry in within if entry[0] <= cut]
        if ready and cut <= seconds:
            _, _, candidate = max(ready, key=lambda entry: entry[1])
            row[str(cut)] = judged(task, dense, candidate) | {"trials": len(ready)}
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--share", type=float, default=0.8, help="of the dense model's latency")
    parser.add_argument("--contenders", default="uniform,ours,torch-pruning")
    parser.add_argument("--seconds", type=float, default=300.0)
    parser.add_argument("--seeds", default="0", help="such as 0,1,2")
    parser.add_argument("--out", type=Path, help="JSON; rows that are not run again stay as they are")
    options = parser.parse_args()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    results: Row = {"rows": {}}
    if options.out and options.out.exists():
        results = json.loads(options.out.read_text(encoding="utf-8"))
    task = cifar_resnet(56)
    dense = task.make_model()
    results |= {"machine": machine(), "dense": test_accuracy(task, dense)}
    for name in options.contenders.split(","):
        for seed in map(int, options.seeds.split(",")) if name != "uniform" else [0]:
            key = f"{options.share:.0%}|{name}|{seed}"
            if name == "uniform":
                row = uniform(task, dense, options.share)
            else:
                contender = {"ours": ours, "torch-pruning": torch_pruning}[name]
                row = contender(task, dense, options.share, options.seconds, seed)
            results["rows"][key] = row
            print(key, json.dumps(row), flush=True)
            if options.out:
                options.out.write_text(json.dumps(results, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
