"""A part of benchmarks.candidate: Kendall's tau of the one-shot score with the accuracy after an epoch of training."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from scipy.stats import kendalltau
from torch import nn
from torch.nn import functional as F

import prunefront
from benchmarks.repair import with_compensation
from prunefront.runners.tasks.cifar_resnet import ARCHIVE, cifar_resnet, data_folder, decode
from prunefront.search.engine import WIDTH_KINDS
from prunefront.spaces.calibration import precision

Row = dict[str, Any]


def training_images() -> tuple[torch.Tensor, torch.Tensor]:
    with np.load(data_folder() / ARCHIVE, allow_pickle=False) as arrays:
        labels = torch.from_numpy(arrays["train_label"].astype(np.int64))
        return decode(arrays["train_jpeg"], arrays["train_offset"], np.arange(len(labels))), labels


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
    scored: Sequence[str] = ("none", "bn", "least_squares", "sequential"),
    tuned: Sequence[str] = ("bn", "sequential"),
    seed: int = 0,
) -> Row:
    """Random plans of one budget (50 % of the MACs, all widths of the network): scored on the search half of the test
    images after every repair, and on the reporting half after one epoch of training that starts from some of them."""
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
        start = time.perf_counter()
        row: Row = {"plan": number, "one_shot": {}, "tuned": {}}
        for method in scored:
            with_compensation(space, method)
            candidate = space.apply(plan).eval()
            with precision(candidate, task.autocast):
                row["one_shot"][method] = 100 * task.score(candidate)
            if method in tuned:
                fine_tune(candidate, images, labels, seed)  # not inside autocast, which would keep the first weights
                with precision(candidate, task.autocast):
                    row["tuned"][method] = 100 * task.test(candidate)
        rows.append({**row, "seconds": time.perf_counter() - start})
        print(rows[-1], flush=True)
    return {"model": f"ResNet-{depth}", "rows": rows}


def table(result: Row) -> str:
    """Kendall's tau of every one-shot score with every fine-tuned accuracy."""
    rows = result["rows"]
    tuned = list(rows[0]["tuned"])

    def column(key: str, method: str) -> list[float]:
        return [row[key][method] for row in rows]

    means = ", ".join(f"{np.mean(column('tuned', method)):.1f} % from {method}" for method in tuned)
    spread = max(np.std(column("tuned", method)) for method in tuned)
    lines = [
        f"{result['model']}, {len(rows)} plans; after one epoch {means}, standard deviation at most {spread:.1f}",
        "",
    ]
    lines.append(f"| one-shot score | mean | {' | '.join(f'tau, tuned from {method}' for method in tuned)} |")
    lines.append("| --- " * (len(tuned) + 2) + "|")
    for method in rows[0]["one_shot"]:
        scores = column("one_shot", method)
        taus = [kendalltau(scores, column("tuned", other)).statistic for other in tuned]
        lines.append(f"| {method} | {np.mean(scores):.1f} % | {' | '.join(f'{tau:.2f}' for tau in taus)} |")
    return "\n".join(lines)
