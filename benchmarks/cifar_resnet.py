"""One-shot accuracy at half the MACs: picked plan, uniform plan, dense model. No fine-tuning.

Run: python benchmarks/cifar_resnet.py [out.json]   (PRUNEFRONT_DATA names the data folder; 20 minutes on two cores)
"""

import json
import sys
import tempfile
import time
from dataclasses import asdict

import prunefront
from prunefront.runners.tasks.cifar_resnet import DEPTHS, cifar_resnet
from prunefront.search.candidates import Candidates
from prunefront.search.engine import WIDTH_KINDS
from prunefront.spaces.calibration import precision

BUDGET, TRIALS = {"macs": "50%"}, 100
#: What running the model takes; all else is overhead.
RUNNING = ("recalibrate", "score")
PARTS = ("ask", "project", "build", "recalibrate", "score", "tell")


def measure(depth: int) -> dict[str, object]:
    task = cifar_resnet(depth)
    model = task.make_model()
    space = prunefront.discover(
        model,
        task.example_inputs,
        kinds=WIDTH_KINDS,
        criterion="reconstruction",
        calibration=task.calibration,
        compensation="sequential",
        autocast=task.autocast,
    )
    uniform = prunefront.project(space, BUDGET)
    candidates = Candidates(space, task.autocast)
    baseline = candidates.prepare(uniform)
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as run_dir:
        result = prunefront.search(
            model,
            task.example_inputs,
            score=task.score,
            test=task.test,
            budget=BUDGET,
            n_trials=TRIALS,
            run_dir=run_dir,
            space=space,
            autocast=task.autocast,
        )
    seconds = {part: result.seconds[part] for part in PARTS}
    overhead = sum(s for part, s in seconds.items() if part not in RUNNING) / sum(seconds.values())
    with precision(model, task.autocast):
        dense_test = task.test(model)
    picked = result.best
    return {
        "model": f"ResNet-{depth}",
        "groups": len(space.groups),
        "trials": TRIALS,
        "macs_share": {
            "uniform": space.cost(uniform).macs / space.dense_cost.macs,
            "picked": picked.metrics["macs"] / space.dense_cost.macs,
        },
        "accuracy": {
            "dense": dense_test,
            "uniform": candidates.score(baseline, task.test, "test"),
            "picked": picked.metrics["test"],
        },
        "costs": {"dense": asdict(space.dense_cost), "picked": dict(picked.metrics)},
        "seconds": seconds,
        "overhead": overhead,
        "total_s": time.perf_counter() - start,
    }


def table(rows: list[dict[str, object]]) -> str:
    """The README's table."""
    lines = ["| model | groups | dense | uniform, 50 % MACs | picked, 50 % MACs | search | overhead |"]
    lines.append("| --- " * 7 + "|")
    for row in rows:
        accuracy, total = row["accuracy"], sum(row["seconds"].values())
        scores = " | ".join(f"{100 * accuracy[name]:.2f} %" for name in ("dense", "uniform", "picked"))
        lines.append(f"| {row['model']} | {row['groups']} | {scores} | {total:.0f} s | {100 * row['overhead']:.1f} % |")
    return "\n".join(lines)


def parts_table(rows: list[dict[str, object]]) -> str:
    """Seconds by part."""
    lines = [f"| model | {' | '.join(PARTS)} |", "| --- " * (len(PARTS) + 1) + "|"]
    for row in rows:
        lines.append(f"| {row['model']} | " + " | ".join(f"{row['seconds'][part]:.1f} s" for part in PARTS) + " |")
    return "\n".join(lines)


def main() -> None:
    rows = [measure(depth) for depth in DEPTHS]
    print(table(rows), parts_table(rows), sep="\n\n")
    if len(sys.argv) > 1:
        with open(sys.argv[1], "w", encoding="utf-8") as file:
            json.dump(rows, file, indent=2)


if __name__ == "__main__":
    main()
