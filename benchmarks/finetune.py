"""Accuracy after fine-tuning: the uniform plan and the picks of given searches, with and without distillation.

Run: python -m benchmarks.finetune [--depth 56] [--macs 70,50,40] [--epochs 1,3,5] [--runs runs/a ...] [--out FILE]

``PRUNEFRONT_DATA`` names the folder of ``task=cifar_resnet``. At every share of the MACs the uniform plan over all
widths (reconstruction, sequential) is trained, and of ``--runs`` (searches of the same network) the model with the
highest search score within that share. Accuracy in % on the reporting half of the test images. Every training has its
own schedule. With ``--folder`` trainings are kept there: a benchmark that was killed goes on.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

import prunefront
from benchmarks.zoo import machine
from prunefront.runners.picking import best, within
from prunefront.runners.runs import read_run
from prunefront.runners.tasks import Task
from prunefront.runners.tasks.base import Epoch
from prunefront.runners.tasks.cifar_resnet import augment, cifar_resnet
from prunefront.search.engine import WIDTH_KINDS
from prunefront.spaces.calibration import precision

Row = dict[str, Any]
DISTILL = prunefront.Distill(weight=0.5, temperature=4.0)


def starts(task: Task, model: nn.Module, share: str, runs: Sequence[Path]) -> dict[str, nn.Module]:
    """The models that are trained, by name."""
    space = prunefront.discover(
        model,
        task.example_inputs,
        kinds=WIDTH_KINDS,
        criterion="reconstruction",
        calibration=task.calibration,
        compensation="sequential",
        autocast=task.autocast,
    )
    found = {"uniform": space.apply(prunefront.project(space, {"macs": share})).eval()}
    for run_dir in runs:
        run = read_run(run_dir)
        name = best(within(run, {"macs": share}, run["front"]))["name"]
        found[f"{run_dir.name}/{name}"] = prunefront.load(run_dir / "front" / name)
    return found


def measure(
    depth: int,
    shares: Sequence[str],
    epochs: Sequence[float],
    runs: Sequence[Path],
    lr: float,
    images: int | None,
    folder: Path | None,
    report: Callable[[Row], None],
) -> Row:
    """``images``: so many training images, spread over the classes; None: all."""
    task = cifar_resnet(depth)
    dense = task.make_model()
    training = task.training
    assert training is not None and task.test is not None
    if images is not None:
        pixels, labels = training(0).images, training(0).labels
        step = len(labels) // images
        training = partial(Epoch, pixels[::step][:images], labels[::step][:images], augment, 128)
    rows: list[Row] = []
    for share in shares:
        for name, model in starts(task, dense, share, runs).items():
            with precision(model, task.autocast):
                row: Row = {
                    "macs": share,
                    "model": name,
                    "one_shot": 100 * task.test(model),
                    "tuned": {},
                    "seconds": {},
                }
            for length in epochs:
                for distill in (prunefront.Distill(), DISTILL):
                    key = f"{length:g}{', distilled' if distill else ''}"
                    recipe = prunefront.Recipe(
                        lr=lr, epochs=length, distill=DISTILL if distill else prunefront.Distill()
                    )
                    kept = f"{depth}-{share.strip('%')}-{name}-{key}-{images}".replace("/", "-").replace(", ", "-")
                    found = prunefront.finetune(
                        model,
                        training=training,
                        loss=task.loss,
                        score=task.score,
                        test=task.test,
                        recipe=recipe,
                        teacher=dense if distill else None,
                        autocast=task.autocast,
                        example_inputs=task.example_inputs,
                        run_dir=None if folder is None else folder / kept,
                    )
                    row["tuned"][key] = 100 * found.metrics["test"]
                    row["seconds"][key] = found.metrics["seconds"]
            rows.append(row)
            report(row)
    with precision(dense, task.autocast):
        accuracy = 100 * task.test(dense)
    return {"model": f"ResNet-{depth}", "dense": accuracy, "lr": lr, "images": images, "rows": rows}


def table(result: Row) -> str:
    keys = list(result["rows"][0]["tuned"])
    lines = [f"{result['model']}, dense {result['dense']:.2f} %; columns: epochs", ""]
    lines += [f"| MACs | model | one-shot | {' | '.join(keys)} |", "| --- " * (len(keys) + 3) + "|"]
    for row in result["rows"]:
        cells = [f"{value:.2f}" for value in (row["one_shot"], *row["tuned"].values())]
        lines.append(f"| {row['macs']} | {row['model']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--depth", type=int, default=56)
    parser.add_argument("--macs", default="70,50,40", help="shares of the dense model's, in %%")
    parser.add_argument("--epochs", default="1,3,5")
    parser.add_argument("--runs", type=Path, nargs="*", default=[])
    parser.add_argument("--lr", type=float, default=0.05)
    parser.add_argument("--images", type=int, help="train on so many images only")
    parser.add_argument("--folder", type=Path, help="keep trainings here, and go on with those of before")
    parser.add_argument("--out", type=Path, help="JSON")
    chosen = parser.parse_args()
    shares = [f"{share}%" for share in chosen.macs.split(",")]
    epochs = [float(count) for count in chosen.epochs.split(",")]
    result = measure(
        chosen.depth, shares, epochs, chosen.runs, chosen.lr, chosen.images, chosen.folder, partial(print, flush=True)
    )
    print(table(result))
    if chosen.out:
        chosen.out.write_text(json.dumps({"machine": machine(), **result}, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
