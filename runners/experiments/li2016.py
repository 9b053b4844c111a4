"""Li et al. 2016, Pruning Filters for Efficient ConvNets (arXiv 1608.08710): ResNet-56 on CIFAR-10.

The first convolution of every residual block loses the filters of the smallest l1 norm, sensitive layers fewer. The
paper chooses ratios by looking at the sensitivity of every layer, by stages and without the worst layers, and reaches
27.6 % fewer MACs (its ResNet-56-pruned-B: 93.04 % before, 93.06 % after 40 epochs of retraining). Here the same
sensitivities decide by one rule: every layer loses as many filters as cost it the same accuracy alone.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from omegaconf import DictConfig
from torch import nn

from ...search.files import write_json
from ...search.saved import save_model
from ...search.scores import SampleScore
from ...spaces import Plan, Space, discover
from ...spaces.calibration import precision
from ...spaces.errors import ConfigError
from ...spaces.groups import Group
from ..commands import plain
from ..display import console, errors
from ..finetuning import Recipe, finetune
from ..tasks import Task
from ..tasks.cifar_resnet import cifar_resnet
from .charts import Line, line_chart
from .steps import Steps

logger = logging.getLogger(__name__)

RATIOS = tuple(round(0.1 * step, 1) for step in range(10))
PAPER = {"dense": 93.04, "pruned": 93.06, "macs": 0.724}


def run(config: DictConfig) -> None:
    options = plain(config)
    run_dir = Path(options.pop("run_dir"))
    with errors.status(f"results go to {run_dir}"):
        results = reproduce(run_dir, **options)
    console.print(described(results), soft_wrap=True)
    console.print(f"results and figures  {run_dir}", soft_wrap=True, highlight=False)


def reproduce(
    run_dir: Path,
    depth: int = 56,
    data: str | None = None,
    macs: float = 0.724,
    images: int = 1000,
    compensation: str = "none",
    epochs: float = 5.0,
    lr: float = 0.02,
    batch_size: int = 128,
    seed: int = 0,
) -> dict[str, Any]:
    """Measure sensitivities on ``images`` of the search split, prune to a share ``macs`` of the MACs, train back.

    Leaves ``sensitivity-<layer>.json``, ``sensitivity.svg`` (accuracy against ratio, a line a layer), the models
    ``pruned`` and ``retrained``, and ``results.json``, which is returned.

    Raises:
        ConfigError: the inner layers alone cannot reach ``macs``.
    """
    options = {key: value for key, value in locals().items() if key not in ("run_dir", "data")}
    steps = Steps(run_dir, options)
    task = cifar_resnet(depth, data, seed=seed, batch_size=batch_size)
    dense = task.make_model()
    space = discover(
        dense,
        task.example_inputs,
        criterion="l1",
        calibration=task.calibration,
        compensation=compensation,
        autocast=task.autocast,
        include=["layer*.*.conv1"],
        seed=seed,
    )
    assert isinstance(task.score, SampleScore) and task.training is not None
    score = task.score.in_parts(images)
    curves = {
        group.name: steps.kept(f"sensitivity-{group.name}", partial(sensitivity, space, group, score, task))
        for group in space.groups
    }
    draw(curves, run_dir / "sensitivity.svg")
    plan = allocated(space, curves, macs)
    pruned = space.apply(plan).eval()
    one_shot = steps.kept("one_shot", lambda: {"dense": accuracies(task, dense), "pruned": accuracies(task, pruned)})
    save_model(run_dir / "pruned", pruned, plan, one_shot["pruned"], task.example_inputs)
    tuned = finetune(
        pruned,
        training=task.training,
        loss=task.loss,
        score=task.score,
        test=task.test,
        recipe=Recipe(lr=lr, epochs=epochs, seed=seed),
        autocast=task.autocast,
        example_inputs=task.example_inputs,
        plan=plan,
        run_dir=run_dir / "retrained",
    )
    cost = space.cost(plan)
    results = {
        "paper": PAPER,
        "macs": cost.macs / space.dense_cost.macs,
        "params": cost.params / space.dense_cost.params,
        "dense": 100 * one_shot["dense"]["test"],
        "pruned": 100 * one_shot["pruned"]["test"],
        "retrained": 100 * tuned.metrics["test"],
        "epochs": epochs,
        "ratios": {
            group.name: 1 - width / group.size
            for group, width in zip(space.groups, plan_widths(space, plan), strict=True)
        },
    }
    write_json(run_dir / "results.json", results)
    return results


def sensitivity(space: Space, group: Group, score: SampleScore, task: Task) -> list[float]:
    """Accuracy when one layer alone loses each of :data:`RATIOS` of its filters."""
    widths = [max(1, round(group.size * (1 - ratio))) for ratio in RATIOS]
    found = [scored(space.apply(space.plan({group.name: width})), score, task) for width in widths]
    logger.info("%s: %s", group.name, " ".join(f"{accuracy:.3f}" for accuracy in found))
    return found


def scored(model: nn.Module, score: Any, task: Task) -> float:
    with precision(model.eval(), task.autocast):
        return float(score(model))


def accuracies(task: Task, model: nn.Module) -> dict[str, float]:
    assert task.score is not None and task.test is not None
    return {"score": scored(model, task.score, task), "test": scored(model, task.test, task)}


def allocated(space: Space, curves: dict[str, list[float]], macs: float) -> Plan:
    """The plan within the share ``macs`` in which every layer has lost the same accuracy alone.

    Raises:
        ConfigError: there is none.
    """
    drops = [monotone(curves[group.name]) for group in space.groups]

    def at(drop: float) -> Plan:
        ratios = [float(np.interp(drop, values, RATIOS)) for values in drops]
        sizes = {group.name: max(1, round(group.size * (1 - r))) for group, r in zip(space.groups, ratios, strict=True)}
        return space.plan(sizes)

    def share(plan: Plan) -> float:
        return space.cost(plan).macs / space.dense_cost.macs

    low, high = 0.0, max(float(values[-1]) for values in drops)
    if share(at(high)) > macs:
        raise ConfigError(
            f"the first convolutions of the blocks reach {share(at(high)):.0%} of the MACs, not {macs:.0%}"
        )
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if share(at(middle)) > macs else (low, middle)
    return at(high)


def monotone(accuracies: Sequence[float]) -> NDArray[np.float64]:
    """What is lost at every ratio, strictly rising: where accuracy rises by chance nothing is lost."""
    lost = np.maximum.accumulate(accuracies[0] - np.asarray(accuracies))
    return np.asarray(np.maximum(lost, 0) + 1e-9 * np.arange(len(lost)))


def plan_widths(space: Space, plan: Plan) -> list[int]:
    return [plan.widths[group.name] for group in space.groups]


def draw(curves: dict[str, list[float]], path: Path) -> None:
    lines = [
        Line(name.partition(".")[0], [100 * r for r in RATIOS], [100 * a for a in accuracy])
        for name, accuracy in curves.items()
    ]
    title = "Sensitivity: accuracy when one layer alone loses its smallest filters"
    line_chart(path, title, "filters removed (%)", "accuracy (%)", lines)


def described(results: dict[str, Any]) -> str:
    """A few lines for the terminal."""
    paper = results["paper"]
    return (
        f"MACs {results['macs']:.1%}, parameters {results['params']:.1%} of the dense model\n"
        f"test accuracy: dense {results['dense']:.2f} %, pruned {results['pruned']:.2f} %, after {results['epochs']:g} "
        f"epochs {results['retrained']:.2f} %\n"
        f"the paper: dense {paper['dense']:.2f} %, after 40 epochs {paper['pruned']:.2f} % at {paper['macs']:.1%} MACs"
    )
