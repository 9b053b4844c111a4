"""A part of benchmarks.candidate: Kendall's tau of the one-shot score with the accuracy after one epoch of fine-tuning."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import kendalltau
from torch import nn
from torch.nn import functional as F

import prunefront
from benchmarks.repair import with_compensation_kept
from prunefront.runners.tasks.cifar_resnet import _decode, cifar_resnet
from prunefront.search.engine import WIDTH_KINDS
from prunefront.spaces.calibration import precision

Row = dict[str, Any]


def training_images() -> tuple[torch.Tensor, torch.Tensor]:
    folder = Path(os.environ.get("PRUNEFRONT_DATA", "../shared/data"))
    with np.load(folder / "cifar10_jpeg.npz", allow_pickle=False) as arrays:
        labels = torch.from_numpy(arrays["train_label"].astype(np.int64))
        return _decode(arrays["train_jpeg"], arrays["train_offset"], np.arange(len(labels))), labels


def fine_tune(model: nn.Module, images: torch.Tensor, labels: torch.Tensor, seed: int, rate: float = 0.02) -> None:
    """One epoch of SGD with flips and shifts, in bfloat16."""
    generator = torch.Generator().manual_seed(seed)
    batches = len(images) // 128
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9, weight_decay=5e-4, nesterov=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=batches, pct_start=0.2)
    for chosen in torch.randperm(len(images), generator=generator).tensor_split(batches):
        batch = images[chosen]
        if torch.rand((), generator=generator) < 0.5:
            batch = batch.flip(3)
        down, right = torch.randint(9, (2,), generator=generator).tolist()
        batch = F.pad(batch, (4, 4, 4, 4))[:, :, down : down + 32, right : right + 32]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = F.cross_entropy(model(batch.contiguous(memory_format=torch.channels_last)).float(), labels[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    model.eval()


def measure(
    depth: int = 20,
    plans: int = 16,
    methods: Sequence[str] = ("bn", "least_squares", "sequential"),
    seed: int = 0,
) -> Row:
    """Random plans of one budget (50 % of the MACs, all widths of the network), each repaired in every way, scored on the
    search half of the test images, fine-tuned for one epoch, and scored on the reporting half."""
    task = cifar_resnet(depth)
    model = task.make_model()
    options = {"calibration": task.calibration, "loss": task.loss, "autocast": task.autocast}
    space = prunefront.discover(
        model, task.example_inputs, kinds=list(WIDTH_KINDS), criterion="reconstruction", **options
    )
    images, labels = training_images()
    generator = np.random.default_rng(seed)
    rows: list[Row] = []
    for number in range(plans):
        shares = dict(zip(space.dimensions, np.exp(generator.uniform(-1.2, 0, len(space.dimensions))), strict=True))
        plan = prunefront.project(space, {"macs": "50%"}, shares)
        for method in methods:
            with_compensation_kept(space, method)
            candidate = space.apply(plan).eval()
            start = time.perf_counter()
            with precision(candidate, task.autocast):
                before = 100 * task.score(candidate)
                fine_tune(candidate, images, labels, seed)
                after = 100 * task.test(candidate)
            seconds = time.perf_counter() - start
            row = {"plan": number, "compensation": method, "one_shot": before, "tuned": after, "seconds": seconds}
            rows.append(row)
            print(row, flush=True)
    return {"model": f"ResNet-{depth}", "plans": plans, "rows": rows}


def table(result: Row) -> str:
    """Kendall's tau of every one-shot score with every fine-tuned accuracy."""
    methods = list(dict.fromkeys(row["compensation"] for row in result["rows"]))

    def column(method: str, key: str) -> list[float]:
        return [row[key] for row in result["rows"] if row["compensation"] == method]

    heads = [f"tau, tuned from {method}" for method in methods]
    lines = [f"| one-shot score with | mean | mean after one epoch | {' | '.join(heads)} |"]
    lines.append("| --- " * (len(methods) + 3) + "|")
    for method in methods:
        taus = [kendalltau(column(method, "one_shot"), column(other, "tuned")).statistic for other in methods]
        means = [np.mean(column(method, key)) for key in ("one_shot", "tuned")]
        cells = [f"{means[0]:.1f} %", f"{means[1]:.1f} %", *(f"{tau:.2f}" for tau in taus)]
        lines.append(f"| {method} | {' | '.join(cells)} |")
    return "\n".join(lines)
