"""Accuracy after fine-tuning: the uniform plan and the picks of given searches, with and without distillation.

Run: python -m benchmarks.finetune [--depth 56] [--macs 70,50,40] [--epochs 1,3,5] [--runs runs/a ...]
         [--device cuda] [--folder DIR] [--part 1/4] [--out FILE]
     python -m benchmarks.finetune --show FILE ...

``PRUNEFRONT_DATA`` names the folder of ``task=cifar_resnet``. At every share of the MACs the uniform plan over all
widths is trained, and the plan with the highest search score within that share that ``--runs`` (searches of the same
network) have found; both are repaired here (reconstruction, sequential). Accuracy in % on the reporting half of the
test images. Every training has its own schedule.

With ``--folder`` trainings are kept there: a benchmark that was killed goes on. ``--part 1/4`` does the first of four
parts of the trainings, for processes side by side; ``--show`` makes one table of the files that they write.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

import prunefront
from benchmarks.zoo import machine
from prunefront.runners.devices import placed
from prunefront.runners.finetuning import Finetuned
from prunefront.runners.runs import read_run
from prunefront.runners.tasks import Task
from prunefront.runners.tasks.base import Epoch
from prunefront.runners.tasks.cifar_resnet import augment, cifar_resnet
from prunefront.search.engine import WIDTH_KINDS
from prunefront.search.files import read_plan
from prunefront.spaces import Plan, Space
from prunefront.spaces.calibration import precision

Row = dict[str, Any]
DISTILL = prunefront.Distill(weight=0.5, temperature=4.0)
UNIFORM, SEARCHED = "uniform", "searched"


@dataclass(frozen=True)
class Job:
    """One training. ``share`` of the MACs; ``start``: the name of what is trained."""

    share: str
    start: str
    epochs: float
    is_distilled: bool

    @property
    def schedule(self) -> str:
        return f"{self.epochs:g}{', distilled' if self.is_distilled else ''}"

    @property
    def folder(self) -> str:
        name = f"{self.share.strip('%')}-{self.start}-{self.schedule}"
        return name.replace("/", "-").replace(", ", "-")


class Benchmark:
    """``runs``: folders of searches. ``images``: so many training images, spread over the classes; None: all."""

    def __init__(
        self, depth: int, device: str, runs: Sequence[Path], lr: float, images: int | None, folder: Path | None
    ) -> None:
        self.task = placed(cifar_resnet(depth), device)
        self.found = [(run_dir, read_run(run_dir)) for run_dir in runs]
        self.lr = lr
        self.folder = None if folder is None else folder / f"{depth}-{images or 'all'}"
        self.dense = self.task.make_model()
        self.training = self.task.training
        if images is not None:
            assert self.training is not None
            pixels, labels = self.training(0).images, self.training(0).labels
            step = len(labels) // images
            self.training = partial(Epoch, pixels[::step][:images], labels[::step][:images], augment, 128)
        self.space = _space(self.task, self.dense)
        self._made: dict[tuple[str, str], nn.Module] = {}

    def jobs(self, shares: Sequence[str], epochs: Sequence[float]) -> list[Job]:
        """Long ones first: parts then take alike long."""
        return [
            Job(share, start, length, is_distilled)
            for length in sorted(epochs, reverse=True)
            for is_distilled in (False, True)
            for share in shares
            for start in ((SEARCHED, UNIFORM) if self.found else (UNIFORM,))
        ]

    def start(self, job: Job) -> nn.Module:
        """The model that is trained."""
        key = (job.share, job.start)
        if key not in self._made:
            self._made[key] = self.space.apply(self._plan(job)).eval()
        return self._made[key]

    def _plan(self, job: Job) -> Plan:
        if job.start == UNIFORM:
            return prunefront.project(self.space, {"macs": job.share})
        limit = float(job.share.strip("%")) / 100 * self.space.dense_cost.macs
        entries = [
            (entry["score"], run_dir / "front" / entry["name"])
            for run_dir, run in self.found
            for entry in run["front"]
            if entry["macs"] <= limit
        ]
        _, folder = max(entries)
        return Plan.from_json(read_plan(folder)["plan"])

    def tuned(self, job: Job) -> Finetuned:
        assert self.training is not None
        distill = DISTILL if job.is_distilled else prunefront.Distill()
        return prunefront.finetune(
            self.start(job),
            training=self.training,
            loss=self.task.loss,
            score=self.task.score,
            test=self.task.test,
            recipe=prunefront.Recipe(lr=self.lr, epochs=job.epochs, distill=distill),
            teacher=self.dense if job.is_distilled else None,
            autocast=self.task.autocast,
            example_inputs=self.task.example_inputs,
            run_dir=None if self.folder is None else self.folder / job.folder,
        )

    def accuracy(self, model: nn.Module) -> float:
        """On the reporting half, in %."""
        assert self.task.test is not None
        with precision(model, self.task.autocast):
            return 100 * self.task.test(model)


def _space(task: Task, model: nn.Module) -> Space:
    return prunefront.discover(
        model,
        task.example_inputs,
        kinds=WIDTH_KINDS,
        criterion="reconstruction",
        calibration=task.calibration,
        compensation="sequential",
        autocast=task.autocast,
    )


def table(rows: Sequence[Row]) -> str:
    """A line for every model and budget, a column for every schedule."""
    keys = sorted({row["schedule"] for row in rows}, key=lambda key: ("distilled" in key, float(key.split(",")[0])))
    lines = [f"| MACs | model | one-shot | {' | '.join(keys)} |", "| --- " * (len(keys) + 3) + "|"]
    for share, start in dict.fromkeys((row["macs"], row["model"]) for row in rows):
        own = {row["schedule"]: row for row in rows if (row["macs"], row["model"]) == (share, start)}
        cells = [f"{next(iter(own.values()))['one_shot']:.2f}"]
        cells += [f"{own[key]['tuned']:.2f}" if key in own else "" for key in keys]
        lines.append(f"| {share} | {start} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--depth", type=int, default=56)
    parser.add_argument("--macs", default="70,50,40", help="shares of the dense model's, in %%")
    parser.add_argument("--epochs", default="1,3,5")
    parser.add_argument("--runs", type=Path, nargs="*", default=[])
    parser.add_argument("--lr", type=float, default=0.05)
    parser.add_argument("--images", type=int, help="train on so many images only")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--folder", type=Path, help="keep trainings here, and go on with those of before")
    parser.add_argument("--part", default="1/1", help="of the trainings: 2/4 is the second of four parts")
    parser.add_argument("--out", type=Path, help="JSON, written after every training")
    parser.add_argument("--show", type=Path, nargs="*", help="what parts have written, as one table")
    chosen = parser.parse_args()
    if chosen.show:
        parts_found = [json.loads(path.read_text(encoding="utf-8")) for path in chosen.show]
        return print(table([row for found in parts_found for row in found["rows"]]))
    benchmark = Benchmark(chosen.depth, chosen.device, chosen.runs, chosen.lr, chosen.images, chosen.folder)
    shares = [f"{share}%" for share in chosen.macs.split(",")]
    part, parts = (int(number) for number in chosen.part.split("/"))
    dense = benchmark.accuracy(benchmark.dense)
    rows: list[Row] = []
    for job in benchmark.jobs(shares, [float(count) for count in chosen.epochs.split(",")])[part - 1 :: parts]:
        found = benchmark.tuned(job)
        row = {"macs": job.share, "model": job.start, "one_shot": benchmark.accuracy(benchmark.start(job))}
        row |= {"schedule": job.schedule, "tuned": 100 * found.metrics["test"], "seconds": found.metrics["seconds"]}
        rows.append(row)
        print(json.dumps(row), flush=True)
        if chosen.out:
            gpu = torch.cuda.get_device_name(chosen.device) if chosen.device.startswith("cuda") else None
            described = {"machine": machine(), "gpu": gpu, "lr": chosen.lr, "images": chosen.images}
            written = {"model": f"ResNet-{chosen.depth}", "dense": dense, **described, "rows": rows}
            chosen.out.write_text(json.dumps(written, indent=1), encoding="utf-8")
    print(f"\nResNet-{chosen.depth}, dense {dense:.2f} %; columns: epochs\n\n{table(rows)}")


if __name__ == "__main__":
    main()
