"""Parts of benchmarks.candidate: one-shot accuracy of all criteria with all compensations, and the time of a repair."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

import prunefront
from benchmarks.zoo import timed
from prunefront.runners.tasks import digits
from prunefront.runners.tasks.base import cross_entropy
from prunefront.runners.tasks.cifar_resnet import cifar_resnet
from prunefront.search.scores import accuracy
from prunefront.spaces.calibration import precision
from prunefront.spaces.compensation import METHODS, Compensation
from prunefront.spaces.criteria import CRITERIA

Row = dict[str, Any]

RATIOS = (0.3, 0.5, 0.7)


#: By evidence, which the compensation keeps alive, and method.
_MADE: dict[tuple[int, str], Compensation] = {}


def with_compensation(space: prunefront.Space, method: str) -> None:
    """Repair candidates of ``space`` with ``method``; moments, orders, targets and factors are kept."""
    key = (id(space._evidence), method)
    if key not in _MADE:
        _MADE[key] = Compensation(space._evidence, method)
    space._compensation = _MADE[key]


def compared(space: prunefront.Space, score: Callable[[nn.Module], float], ratios: Sequence[float]) -> list[Row]:
    """Accuracy of uniform plans, for all criteria and compensations."""
    rows = []
    dense = space.dense_cost.macs
    for method in METHODS:
        with_compensation(space, method)
        for ratio in ratios:
            for criterion in space.criteria:
                plan = space.uniform(ratio, criterion=criterion)
                value = 100 * score(space.apply(plan).eval())
                macs = space.cost(plan).macs / dense
                rows.append(
                    {"ratio": ratio, "macs": macs, "criterion": criterion, "compensation": method, "accuracy": value}
                )
                print(rows[-1], flush=True)
    return rows


def cifar_space(depth: int, criteria: Sequence[str]) -> tuple[prunefront.Space, Callable[[nn.Module], float], float]:
    task = cifar_resnet(depth)
    model = task.make_model()

    def score(candidate: nn.Module) -> float:
        with precision(candidate, task.autocast):
            return task.test(candidate)

    options = {"calibration": task.calibration, "loss": task.loss, "autocast": task.autocast}
    space = prunefront.discover(
        model, task.example_inputs, include=["layer*.conv1"], criterion=list(criteria), **options
    )
    return space, score, 100 * score(model)


def cifar(depth: int) -> Row:
    space, score, dense = cifar_space(depth, list(CRITERIA))
    seconds = dict(space.seconds)
    return {"model": f"ResNet-{depth}", "dense": dense, "seconds": seconds, "rows": compared(space, score, RATIOS)}


def preparation(depth: int, rounds: int = 15, seed: int = 0) -> Row:
    """Medians of seconds a candidate; every round another plan."""
    space, _, _ = cifar_space(depth, ["l1"])
    images = torch.cat(list(cifar_resnet(depth).score.keywords["images"].split(1000))[:1])
    generator = np.random.default_rng(seed)
    found: dict[str, list[float]] = {}

    def dense_pass() -> None:
        with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
            space.model(images)

    def note(name: str, function: Callable[[], Any]) -> Any:
        seconds, result = timed(function)
        found.setdefault(name, []).append(seconds)
        return result

    for number in range(rounds + 2):
        shares = dict(zip(space.dimensions, generator.uniform(0.3, 1.0, len(space.dimensions)), strict=True))
        plan = prunefront.project(space, {"macs": "50%"}, shares)
        note("dense pass over 1,000 images", dense_pass)
        for method in METHODS:
            with_compensation(space, method)
            candidate = note(f"{method}: build", lambda plan=plan: space.build(plan))
            note(f"{method}: repair", lambda candidate=candidate, plan=plan: space.repair(candidate, plan))
        if number < 2:
            found.clear()  # moments, targets and factors are made by the first candidate
    medians = {name: statistics.median(values) for name, values in found.items()}
    return {"model": f"ResNet-{depth}", "seconds": medians}


class VisionTransformer(nn.Module):
    """``(batch, 1, 8, 8)`` to ``(batch, 10)``; 16 patches of 2 x 2."""

    def __init__(self, width: int = 64, heads: int = 4, depth: int = 4) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, width, 2, 2)
        self.positions = nn.Parameter(0.02 * torch.randn(1, 16, width))
        self.layers = nn.ModuleList(Layer(width, heads) for _ in range(depth))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2) + self.positions
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x).mean(1))


class Layer(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, _ = x.shape
        q, k, v = self.qkv(self.norm1(x)).reshape(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, length, -1)
        x = x + self.proj(attended)
        return x + self.down(F.gelu(self.up(self.norm2(x))))


def trained_transformer(images: torch.Tensor, labels: torch.Tensor, epochs: int, seed: int = 0) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = VisionTransformer()
        batches = len(images) // 64
        optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.05)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=epochs * batches)
        for _ in range(epochs):
            for chosen in torch.randperm(len(images)).tensor_split(batches):
                loss = F.cross_entropy(model(digits.shifted(images[chosen])), labels[chosen], label_smoothing=0.1)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
    return model.eval()


def transformer(epochs: int = 60) -> Row:
    train, search, test = digits.splits(0)
    model = trained_transformer(*train, epochs)
    held_out = [torch.cat(pair) for pair in zip(search, test, strict=True)]

    def score(candidate: nn.Module) -> float:
        return accuracy(*held_out)(candidate)

    calibration = list(zip(*(values.split(256) for values in train), strict=True))
    space = prunefront.discover(
        model,
        train[0][:1],
        kinds=["head", "neuron"],
        criterion=list(CRITERIA),
        calibration=calibration,
        loss=cross_entropy,
    )
    return {"model": "ViT on digits", "dense": 100 * score(model), "rows": compared(space, score, RATIOS)}


def table(result: Row) -> str:
    """Accuracy in %: a line a criterion, a column a ratio and compensation."""
    rows = {(r["ratio"], r["compensation"], r["criterion"]): r for r in result["rows"]}
    ratios = sorted({key[0] for key in rows})
    macs = {ratio: next(r["macs"] for key, r in rows.items() if key[0] == ratio) for ratio in ratios}
    lines = [f"{result['model']}, dense {result['dense']:.2f} %"]
    for ratio in ratios:
        lines += ["", f"| ratio {ratio}, {macs[ratio]:.0%} of the MACs | {' | '.join(METHODS)} |"]
        lines.append("| --- " * (len(METHODS) + 1) + "|")
        for criterion in CRITERIA:
            cells = [f"{rows[ratio, method, criterion]['accuracy']:.1f}" for method in METHODS]
            lines.append(f"| {criterion} | {' | '.join(cells)} |")
    return "\n".join(lines)


def preparation_table(rows: list[Row]) -> str:
    """Seconds a candidate, and their share of a dense pass."""
    lines = ["| model | compensation | build | repair | of a dense pass over 1,000 images |", "| --- " * 5 + "|"]
    for row in rows:
        seconds = row["seconds"]
        dense = seconds["dense pass over 1,000 images"]
        for method in METHODS:
            build, repair = seconds[f"{method}: build"], seconds[f"{method}: repair"]
            share = (build + repair) / dense
            lines.append(f"| {row['model']} | {method} | {1e3 * build:.1f} ms | {1e3 * repair:.0f} ms | {share:.2f} |")
        lines.append(f"| {row['model']} | dense pass | | {1e3 * dense:.0f} ms | 1 |")
    return "\n".join(lines)
