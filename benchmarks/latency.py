"""How well latency is measured, predicted and kept to.

Run: python -m benchmarks.latency [--parts repeatability,model,budget] [--models ...] [--targets ...] [--out out.json]

``repeatability``: a pruned ResNet-50 beside the dense one, measured 20 times: spread of the ratio as prunefront tells
it, as ``torch.utils.benchmark`` gives it (``Timer.blocked_autorange`` of one model after the other) and as two means of
50 runs do. ``model``: latency models from the first 16, 32 and 64 measured plans, their error and Kendall's tau on 40
plans that they have not seen and that are measured longer, beside a straight line through MACs; microseconds a
prediction. ``budget``: a search on the CIFAR ResNet-56 of ``task=cifar_resnet`` (``PRUNEFRONT_DATA`` names the folder
with the weights) with ``budget.latency=60%``; the picked model is measured again afterwards.

Results of models and targets that are not run again stay as they are in ``--out``.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import kendalltau
from torch import nn
from torch.utils.benchmark import Timer

import prunefront
from benchmarks.zoo import machine
from prunefront.runners.targets import OnnxTarget, TorchTarget, runtimes
from prunefront.runners.targets.exporting import exported, named_arrays, on_device
from prunefront.runners.targets.local import torch_threads
from prunefront.runners.tasks.cifar_resnet import CifarResNet, cifar_resnet
from prunefront.search.engine import WIDTH_KINDS
from prunefront.search.fitting import TOGETHER, spread_plans
from prunefront.search.latency import LatencyModel, Measured, Measurements
from prunefront.search.measurement import Measurement, Settings
from prunefront.search.pace import Pace, steady
from prunefront.search.timing import Timing
from prunefront.spaces.inputs import Inputs

Row = dict[str, Any]
COUNTS = (16, 32, 64)
NAIVE_RUNS = 50
BUDGET, SHARE = "60%", 0.6


def imagenet(make: str) -> tuple[nn.Module, torch.Tensor]:
    """A model with random weights, by timm's name."""
    import timm

    return timm.create_model(make).eval(), torch.randn(1, 3, 224, 224)


MODELS: dict[str, Callable[[], tuple[nn.Module, torch.Tensor]]] = {
    "resnet50": lambda: imagenet("resnet50"),
    "mobilenetv3": lambda: imagenet("mobilenetv3_large_100"),
    "vit_small": lambda: imagenet("vit_small_patch16_224"),
    "cifar_resnet56": lambda: (CifarResNet(56).eval(), torch.randn(1, 3, 32, 32)),
}


TORCH: dict[str, Callable[[int | None], TorchTarget]] = {
    "torch": lambda threads: TorchTarget(threads=threads),
    "cuda": lambda threads: TorchTarget("cuda", precision="bfloat16", channels_last=True, threads=threads),
}


def _kind(target: Row) -> str:
    return "cuda" if target.get("device") == "cuda" and target["target"] == "torch" else target["target"]


def repeatability(name: str, target: OnnxTarget | TorchTarget, options: argparse.Namespace) -> Row:
    """Ratios of a model at 60 % of the MACs to the dense one, by three methods in turn."""
    dense, example = MODELS[name]()
    space = prunefront.discover(dense, example, kinds=WIDTH_KINDS, proof="shapes")
    pruned = space.slice(prunefront.project(space, {"macs": BUDGET})).eval()
    inputs = Inputs.of(example)
    settings = Settings(limit_s=options.measurement_s)
    found: dict[str, Row] = {}
    pace = Pace()  # as a search has one

    def both() -> list[Measurement]:
        return list(prunefront.measure([dense, pruned], example, target, settings=settings))

    def note(method: str, function: Callable[[], float]) -> None:
        start = time.perf_counter()
        row = found.setdefault(method, {"ratios": [], "seconds": []})
        row["ratios"].append(function())
        row["seconds"].append(time.perf_counter() - start)

    with (
        torch_threads(target.threads),
        torch.inference_mode(),
        exported([dense, pruned], inputs, traced=True) as paths,
    ):
        first, second = _forwards(target, [dense, pruned], inputs, paths)
        for _ in range(options.repeats):
            note("prunefront", lambda: pace.kept(dense, both)[1].ratio)
            note("torch.utils.benchmark", lambda: _median(second, options) / _median(first, options))
            note(f"mean of {NAIVE_RUNS}", lambda: _mean(second) / _mean(first))
    return {"model": name, "target": dict(target.description), "methods": found}


def _forwards(
    target: OnnxTarget | TorchTarget, models: Sequence[nn.Module], inputs: Inputs, paths: Sequence[Path]
) -> list[Callable[[], Any]]:
    """The same work as functions of this process, for the methods that know nothing of targets."""
    if isinstance(target, TorchTarget) and target.device == "cpu":
        return [lambda model=model: inputs.call(model) for model in models]
    if isinstance(target, TorchTarget):
        placed = [on_device(model, inputs, target.device) for model in models]
        return [lambda pair=pair: (pair[1].call(pair[0]), torch.cuda.synchronize()) for pair in placed]
    arrays = named_arrays(inputs)
    return [runtimes.load(target.runtime, str(path), arrays, **target.options)[0] for path in paths]


def _median(forward: Callable[[], Any], options: argparse.Namespace) -> float:
    timer = Timer("forward()", globals={"forward": forward}, num_threads=options.threads or torch.get_num_threads())
    return float(timer.blocked_autorange(min_run_time=options.measurement_s / 2).median)


def _mean(forward: Callable[[], Any]) -> float:
    start = time.perf_counter()
    for _ in range(NAIVE_RUNS):
        forward()
    return (time.perf_counter() - start) / NAIVE_RUNS


def repeatability_table(rows: Sequence[Row]) -> str:
    heads = ["model", "target", "method", "ratio", "standard deviation", "largest - smallest", "seconds"]
    lines = _heading(heads)
    for row in rows:
        for method, found in row["methods"].items():
            ratios = np.array(found["ratios"])
            middle = float(np.median(ratios))
            spread = f"{ratios.std() / middle:.2%} | {np.ptp(ratios) / middle:.2%}"
            seconds = np.mean(found["seconds"])
            lines.append(
                f"| {row['model']} | {row['target']['target']} | {method} | {middle:.3f} | {spread} | {seconds:.1f} |"
            )
    return "\n".join(lines)


def model(name: str, target: OnnxTarget | TorchTarget, options: argparse.Namespace) -> Row:
    """Errors on plans that were not seen, by how many were."""
    dense, example = MODELS[name]()
    space = prunefront.discover(dense, example, kinds=WIDTH_KINDS, proof="shapes")
    seen = spread_plans(space, options.plans, seed=0)
    unseen = spread_plans(space, options.held_out + 1, seed=1)[1:]  # the first is the smallest plan, which is seen
    settings = Settings(limit_s=options.measurement_s)
    longer = replace(settings, tolerance=settings.tolerance / 2, limit_s=2 * settings.limit_s)
    timing = Timing(target, settings=settings, batch_size=options.batch_size)
    start = time.perf_counter()
    todo = [(seen, settings, i) for i in range(0, len(seen), TOGETHER)]
    todo += [(unseen, longer, i) for i in range(0, len(unseen), TOGETHER)]
    ratios, times = {id(rows): np.full(len(rows), np.nan) for rows in (seen, unseen)}, []
    dense_times = {rows: values.copy() for rows, values in ratios.items()}
    for number in np.random.default_rng(0).permutation(len(todo)):  # what changes with time changes both alike
        widths, how, first = todo[number]
        plans = [space.plan(dict(zip(space.dimensions, row, strict=True))) for row in widths[first : first + TOGETHER]]
        outcomes, dense_ms = replace(timing, settings=how).measured(space, Inputs.of(example), plans)
        ratios[id(widths)][first : first + TOGETHER] = [np.nan if isinstance(o, str) else o for o in outcomes]
        dense_times[id(widths)][first : first + TOGETHER] = dense_ms or np.nan
        times += [] if dense_ms is None else [dense_ms]
        print(
            f"{name} {target.description['target']}: {len(times)} of {len(todo)}, dense {dense_ms:.4g} ms", flush=True
        )
    is_usual = dict(zip(times, steady(times), strict=True))
    for rows, beside in dense_times.items():
        ratios[rows][[not is_usual.get(ms, False) for ms in beside]] = np.nan
    known, truth = ratios[id(seen)], ratios[id(unseen)]
    left_out = int(np.isnan(known).sum() + np.isnan(truth).sum())
    unseen, truth = unseen[np.isfinite(truth)], truth[np.isfinite(truth)]
    return {
        "model": name,
        "target": dict(target.description),
        "batch_size": options.batch_size,
        "dimensions": len(space.dimensions),
        "dense_ms": float(np.median(times)),
        "dense_ms_spread": [min(times), max(times)],
        "seconds": time.perf_counter() - start,
        "left_out": left_out,
        "seen": _pairs(seen, known),
        "held_out": _pairs(unseen, truth),
        "counts": [
            _fitted(space, seen[:count], known[:count], unseen, truth, times)
            for count in COUNTS
            if count <= options.plans
        ],
    }


def _pairs(widths: NDArray[np.int64], ratios: NDArray[np.float64]) -> list[Any]:
    return [[row, float(ratio)] for row, ratio in zip(widths.tolist(), ratios, strict=True) if np.isfinite(ratio)]


def _fitted(
    space: prunefront.Space,
    widths: NDArray[np.int64],
    ratios: NDArray[np.float64],
    unseen: NDArray[np.int64],
    truth: NDArray[np.float64],
    times: Sequence[float],
) -> Row:
    good = np.isfinite(ratios)
    widths, ratios = widths[good], ratios[good]
    dense_ms = float(np.median(times))
    measured = tuple(Measured(tuple(row), float(r), dense_ms) for row, r in zip(widths.tolist(), ratios, strict=True))
    start = time.perf_counter()
    found = LatencyModel(space, Measurements(measured))
    fit_s = time.perf_counter() - start

    def macs(rows: NDArray[np.int64]) -> NDArray[np.float64]:
        return space.cost_batch(rows)[:, 0] / space.dense_cost.macs

    line = np.polyfit(macs(widths), ratios, 1)
    batch = spread_plans(space, 1024, seed=2)[:1000]
    return {
        "measured": len(widths),
        "model": _errors(found.ratios(unseen), truth),
        "line_through_macs": _errors(np.polyval(line, macs(unseen)), truth),
        "macs_alone": _errors(macs(unseen), truth),
        "cross_validated": found.error,
        "fit_s": fit_s,
        "us_in_a_batch": _microseconds(lambda: found.ratios(batch)) / len(batch),
        "us_alone": _microseconds(lambda: found.ratios(batch[:1])),
    }


def _errors(predicted: NDArray[np.float64], truth: NDArray[np.float64]) -> Row:
    return {
        "error": float(np.abs(predicted / truth - 1).mean()),
        "tau": float(kendalltau(predicted, truth).statistic),
    }


def _microseconds(function: Callable[[], Any]) -> float:
    return 1e6 * float(Timer("function()", globals={"function": function}).blocked_autorange().median)


def model_table(rows: Sequence[Row]) -> str:
    heads = ["model", "target", "dense", "plans", "error", "tau", "error by MACs", "tau by MACs", "cross-validated"]
    lines = _heading([*heads, "us, batch", "us, one"])
    for row in rows:
        for found in row["counts"]:
            parts = [f"{found[key]['error']:.1%} | {found[key]['tau']:.3f}" for key in ("model", "line_through_macs")]
            lines.append(
                f"| {row['model']} | {row['target']['target']} | {row['dense_ms']:.3g} ms | {found['measured']} | "
                f"{' | '.join(parts)} | {found['cross_validated']:.1%} | {found['us_in_a_batch']:.1f} | "
                f"{found['us_alone']:.0f} |"
            )
    return "\n".join(lines)


def budget(name: str, target: OnnxTarget | TorchTarget, options: argparse.Namespace) -> Row:
    """The picked model of a search within a budget of latency, measured once more."""
    task = cifar_resnet(int(name.removeprefix("cifar_resnet")))
    dense = task.make_model()
    timing = Timing(target, most=options.plans, settings=Settings(limit_s=options.measurement_s))
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as run_dir:
        result = prunefront.search(
            dense,
            task.example_inputs,
            score=task.score,
            test=task.test,
            calibration=task.calibration,
            budget={"latency": BUDGET},
            n_trials=options.trials,
            run_dir=run_dir,
            autocast=task.autocast,
            round_to=options.round_to,
            timing=timing,
        )
        seconds = time.perf_counter() - start
        picked = result.best.model()
    again = prunefront.measure(
        picked, task.example_inputs, target, dense, Settings(tolerance=0.003, limit_s=4 * options.measurement_s)
    )
    return {
        "model": name,
        "target": dict(target.description),
        "budget": BUDGET,
        "picked": dict(result.best.metrics),
        "front": len(result.front),
        "dense_test": task.test(dense),
        "macs_share": result.best.metrics["macs"] / result.space.dense_cost.macs,
        "measured_again": again.to_json(),
        "trials": options.trials,
        "round_to": options.round_to,
        "seconds": seconds,
        "seconds_by_part": dict(result.seconds),
    }


def budget_table(rows: Sequence[Row]) -> str:
    heads = ["model", "target", "budget", "predicted", "verified (upper end)", "measured again", "off the budget"]
    lines = _heading([*heads, "MACs", "test", "dense"])
    for row in rows:
        picked, again = row["picked"], row["measured_again"]
        dense_ms = picked["latency_ms"] / picked["latency_ratio"]
        lines.append(
            f"| {row['model']} | {row['target']['target']} | {row['budget']} | "
            f"{picked['latency_predicted_ms'] / dense_ms:.1%} | {picked['latency_ratio']:.1%} "
            f"({picked['latency_ratio_high']:.1%}) | {again['ratio']:.1%} | {again['ratio'] / SHARE - 1:+.1%} | "
            f"{row['macs_share']:.1%} | {picked['test']:.2%} | {row['dense_test']:.2%} |"
        )
    return "\n".join(lines)


def _heading(names: Sequence[str]) -> list[str]:
    return [f"| {' | '.join(names)} |", "| --- " * len(names) + "|"]


#: By part: what measures a model on a target, its table, and the models that it is for unless others are named.
PARTS = {
    "repeatability": (repeatability, repeatability_table, ["resnet50"]),
    "model": (model, model_table, [*MODELS]),
    "budget": (budget, budget_table, ["cifar_resnet56"]),
}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--models", help=f"some of {', '.join(MODELS)}; by default what each part is about")
    parser.add_argument("--targets", default="onnxruntime,torch", help="onnxruntime, openvino, torch, cuda")
    parser.add_argument("--batch-size", type=int, default=1, help="of the latency models")
    parser.add_argument("--threads", type=int, help="of both targets")
    parser.add_argument("--repeats", type=int, default=20, help="of repeatability")
    parser.add_argument("--plans", type=int, default=max(COUNTS), help="measured for the latency model")
    parser.add_argument("--held-out", type=int, default=40)
    parser.add_argument("--trials", type=int, default=100, help="of the search within a budget")
    parser.add_argument("--round-to", type=int, default=4, help="widths of the search are multiples of this")
    parser.add_argument("--measurement-s", type=float, default=10.0, help="at most, of a measurement")
    parser.add_argument("--out", type=Path, help="JSON")
    chosen = parser.parse_args()
    for name, known in (("parts", PARTS), ("models", MODELS), ("targets", (*TORCH, *runtimes.LOADERS))):
        given = [part for part in (getattr(chosen, name) or "").split(",") if part]
        if unknown := set(given) - set(known):
            parser.error(f"unknown {name} {sorted(unknown)}; expected some of {', '.join(known)}")
        setattr(chosen, name, given)
    return chosen


def main() -> None:
    options = arguments()
    results: Row = {}
    if options.out and options.out.exists():
        results = json.loads(options.out.read_text(encoding="utf-8"))
    results["machine"] = machine()
    for part in options.parts:
        run, table, usual = PARTS[part]
        names = [name for name in options.models or usual if part != "budget" or name in usual]
        for name in names:
            for kind in options.targets:
                target = TORCH[kind](options.threads) if kind in TORCH else OnnxTarget(kind, options.threads)
                torch.manual_seed(0)
                row = run(name, target, options)
                own = (name, _kind(row["target"]))
                others = [r for r in results.get(part, []) if (r["model"], _kind(r["target"])) != own]
                results[part] = [*others, row]
                if options.out:
                    options.out.write_text(json.dumps(results, indent=1), encoding="utf-8")
        print(f"## {part}\n\n{table(results.get(part, []))}\n", flush=True)


if __name__ == "__main__":
    main()
