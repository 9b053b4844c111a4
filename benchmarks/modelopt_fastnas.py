"""NVIDIA ModelOpt's FastNAS on the models and data of benchmarks/search.py.

Run: PYTHON -m benchmarks.modelopt_fastnas [--depth 56] [--budget 0.5] [--divisor 4]     (PRUNEFRONT_DATA as there)

PYTHON is that of an environment which has `nvidia-modelopt` (0.47 was tried) and `torchprofile==0.0.4` beside
prunefront's own packages. Settings are those of its ResNet-20 notebook: FastNAS with batches that calibrate BatchNorm,
and the accuracy on the search split as the score function. Prints one line of JSON: the test accuracy as exported, and
after BatchNorm was calibrated again.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.search import test_accuracy
from prunefront.runners.tasks.cifar_resnet import cifar_resnet
from prunefront.spaces.calibration import Calibration, precision, recalibrate


def macs(model: nn.Module, example: torch.Tensor) -> int:
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        model(example)
    return int(counter.get_total_flops()) // 2


def main() -> None:
    import modelopt.torch.prune as mtp

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--depth", type=int, default=56)
    parser.add_argument("--budget", type=float, default=0.5)
    parser.add_argument("--divisor", type=int, default=4, help="of the channels; its default is 32")
    options = parser.parse_args()
    task = cifar_resnet(options.depth)
    model, example = task.make_model().to(memory_format=torch.contiguous_format), task.example_inputs[0]
    dense = macs(model, example)
    images = torch.cat([batch[0] for batch in task.calibration or ()])
    labels = torch.cat([batch[1] for batch in task.calibration or ()])
    evaluations = 0

    def score(candidate: nn.Module) -> float:
        nonlocal evaluations
        evaluations += 1
        with precision(candidate, task.autocast):
            return float(task.score(candidate.eval()))  # type: ignore[misc]

    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        pruned, _ = mtp.prune(
            model=model,
            mode=[
                (
                    "fastnas",
                    {
                        "nn.Conv2d": {"*": {"channel_divisor": options.divisor}},
                        "nn.BatchNorm2d": {"*": {"feature_divisor": options.divisor}},
                    },
                )
            ],
            constraints={"flops": f"{100 * options.budget:g}%"},
            dummy_input=example,
            config={
                "data_loader": DataLoader(TensorDataset(images, labels), batch_size=128, shuffle=True),
                "score_func": score,
                "checkpoint": str(Path(folder) / "search.pth"),
                "verbose": False,
            },
        )
    seconds = time.perf_counter() - start
    found = {
        "seconds": seconds,
        "evaluations": evaluations,
        "macs": macs(pruned, example) / dense,
        "accuracy": test_accuracy(task, pruned),
    }
    with precision(pruned, task.autocast):
        recalibrate(pruned, Calibration(task.calibration))  # type: ignore[arg-type]
    print(json.dumps({**found, "recalibrated": test_accuracy(task, pruned)}))


if __name__ == "__main__":
    main()
