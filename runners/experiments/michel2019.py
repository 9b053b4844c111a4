"""Michel et al. 2019, Are Sixteen Heads Really Better than One? (arXiv 1905.10650): heads of a trained transformer.

Heads are ranked by the gradient of the loss with respect to a mask over them, normalised by layer, and removed from the
least important one on: all ranked once on the dense model (one-shot), or anew after every tenth (iterative). The
paper's BERT and translation models lose almost nothing until 20 to 40 % of the heads are gone. Here a BERT-like
classifier is trained on the spot, on real text with a label that the text itself gives: which of the articles a passage
is from.
"""

from __future__ import annotations

import csv
import logging
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import DictConfig
from torch import nn

from ...search.files import write_json
from ...search.measurement import Settings, measure
from ...spaces import Space, discover
from ...spaces.calibration import precision
from ...spaces.criteria import Evidence, unit_scores
from ...spaces.errors import ConfigError
from ..commands import plain
from ..display import console, errors
from ..targets import OnnxTarget, TorchTarget
from ..tasks import Task
from ..tasks.hf_text_classification import hf_text_classification
from .charts import Line, line_chart
from .steps import Steps

logger = logging.getLogger(__name__)

HEADING = re.compile(r"^ = ([^=].*[^=]) = $")
#: Of the passages of every article.
TEST_SHARE, LEAST_PASSAGES = 0.2, 10
TARGETS: dict[str, Callable[[], Any] | None] = {"onnxruntime": OnnxTarget, "torch": TorchTarget, "none": None}


def run(config: DictConfig) -> None:
    options = plain(config)
    run_dir = Path(options.pop("run_dir"))
    with errors.status(f"results go to {run_dir}"):
        results = reproduce(run_dir, **options)
    console.print(described(results), soft_wrap=True)
    console.print(f"results and figures  {run_dir}", soft_wrap=True, highlight=False)


def reproduce(
    run_dir: Path,
    text: str,
    words: int = 40,
    layers: int = 4,
    heads: int = 8,
    hidden: int = 128,
    epochs: float = 12.0,
    lr: float = 1e-3,
    step: float = 0.1,
    latency_on: str = "onnxruntime",
    measurement_s: float = 5.0,
    seed: int = 0,
) -> dict[str, Any]:
    """Train the classifier and follow both curves.

    Leaves the tables of passages, the model ``dense``, ``heads.svg`` (accuracy against heads removed), ``latency.svg``
    if it is measured, and ``results.json``, which is returned.

    Raises:
        ConfigError: ``text`` has no articles, or ``latency_on`` is unknown.
    """
    options = {key: value for key, value in locals().items() if key != "run_dir"}
    if latency_on not in TARGETS:
        raise ConfigError(f"latency_on must be one of {', '.join(TARGETS)}, not {latency_on!r}")
    steps = Steps(run_dir, options)
    train, test = write_passages(Path(text), run_dir, words, seed)
    task = hf_text_classification(
        config={
            "model_type": "bert",
            "hidden_size": hidden,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "intermediate_size": 4 * hidden,
        },
        train=str(train),
        test=str(test),
        tokenizer="bpe",
        sequence_length=2 * words,
        epochs=epochs,
        lr=lr,
        seed=seed,
    )
    dense = steps.model("dense", task.make_model, task.example_inputs)
    curves = {
        "one-shot": steps.kept("one_shot", lambda: one_shot(dense, task, step)),
        "iterative": steps.kept("iterative", lambda: iterative(dense, task, step)),
    }
    title = "Accuracy of the classifier against the heads that are removed"
    lines = [
        Line(name, [100 * p["removed"] for p in points], [100 * p["accuracy"] for p in points])
        for name, points in curves.items()
    ]
    line_chart(run_dir / "heads.svg", title, "heads removed (%)", "test accuracy (%)", lines)
    results: dict[str, Any] = {"articles": len(task_labels(train)), "chance": 1 / len(task_labels(train)), **curves}
    if latency_on != "none":
        results["latency"] = steps.kept(
            "latency", lambda: latencies(dense, task, curves["one-shot"], latency_on, measurement_s)
        )
        points = results["latency"]
        removed = [100 * p["removed"] for p in points]
        lines = [Line("latency", removed, [100 * p["ratio"] for p in points])]
        lines.append(Line("MACs", removed, [100 * p["macs"] for p in points], is_dashed=True))
        line_chart(
            run_dir / "latency.svg", "Latency along the curve", "heads removed (%)", "of the dense model (%)", lines
        )
    results["free"] = {name: free_share(points) for name, points in curves.items()}
    write_json(run_dir / "results.json", results)
    return results


def write_passages(source: Path, folder: Path, words: int, seed: int) -> tuple[Path, Path]:
    """Passages of ``words`` words with their article's title, as ``train.csv`` and ``test.csv`` in ``folder``."""
    if not source.exists():
        raise ConfigError(f"text={source} does not exist")
    articles: dict[str, list[str]] = {}
    title = None
    for line in source.read_text(encoding="utf-8").splitlines():
        if heading := HEADING.match(line):
            title = heading[1]
        elif title is not None and not line.startswith(" ="):
            articles.setdefault(title, []).extend(line.split())
    rng = np.random.default_rng(seed)
    paths = folder / "train.csv", folder / "test.csv"
    rows: tuple[list[list[str]], list[list[str]]] = ([["text", "label"]], [["text", "label"]])
    for name, content in articles.items():
        passages = [" ".join(content[i : i + words]) for i in range(0, len(content) - words + 1, words)]
        if len(passages) < LEAST_PASSAGES:
            continue
        is_test = rng.permutation(len(passages)) < TEST_SHARE * len(passages)
        for passage, into in zip(passages, is_test, strict=True):
            rows[int(into)].append([passage, name])
    if len(rows[0]) < 2:
        raise ConfigError(f"text={source} has no articles of {LEAST_PASSAGES} passages under ' = Title = '")
    for path, table in zip(paths, rows, strict=True):
        with path.open("w", encoding="utf-8", newline="") as file:
            csv.writer(file).writerows(table)
    return paths


def task_labels(table: Path) -> set[str]:
    with table.open(encoding="utf-8", newline="") as file:
        return {row["label"] for row in csv.DictReader(file)}


def heads_of(model: nn.Module, task: Task) -> Space:
    return discover(
        model,
        task.example_inputs,
        kinds=["head"],
        criterion="head_gradient",
        calibration=task.calibration,
        compensation="none",
        loss=task.loss,
    )


def importance(space: Space) -> list[np.ndarray[Any, np.dtype[np.float64]]]:
    """Of every head, by layer and divided by the layer's norm, as in the paper."""
    scores = unit_scores("head_gradient", Evidence(space.model, space._structure, space.calibration))
    return [values / max(float(np.linalg.norm(values)), 1e-12) for values in scores]


def widths_without(space: Space, removed: int) -> dict[str, int]:
    """How many heads stay in every layer when the least important ones go; one stays in any case."""
    ordered = [np.sort(values)[::-1] for values in importance(space)]
    ranked = sorted((value, layer) for layer, values in enumerate(ordered) for value in values[1:])
    kept = [group.size for group in space.groups]
    for _, layer in ranked[:removed]:
        kept[layer] -= 1
    return {group.name: width for group, width in zip(space.groups, kept, strict=True)}


def accuracy(model: nn.Module, task: Task) -> float:
    assert task.test is not None
    with precision(model.eval(), task.autocast):
        return float(task.test(model))


def counts(space: Space, step: float) -> list[int]:
    """Heads that are gone at every point of the curve."""
    total = sum(group.size for group in space.groups)
    every = max(1, round(step * total))
    return list(range(0, total - len(space.groups) + 1, every))


def one_shot(dense: nn.Module, task: Task, step: float) -> list[dict[str, Any]]:
    space = heads_of(dense, task)
    total = sum(group.size for group in space.groups)
    points = []
    for removed in counts(space, step):
        plan = space.plan(widths_without(space, removed))
        found = accuracy(space.apply(plan), task)
        points.append({"removed": removed / total, "accuracy": found, "widths": plan.widths})
        logger.info("one-shot: %d of %d heads removed, accuracy %.3f", removed, total, found)
    return points


def iterative(dense: nn.Module, task: Task, step: float) -> list[dict[str, Any]]:
    model, space = dense, heads_of(dense, task)
    total, gone = sum(group.size for group in space.groups), 0
    points = []
    for removed in counts(space, step):
        if removed > gone:
            space = heads_of(model, task)
            model = space.apply(space.plan(widths_without(space, removed - gone))).eval()
            gone = removed
        found = accuracy(model, task)
        points.append({"removed": removed / total, "accuracy": found})
        logger.info("iterative: %d of %d heads removed, accuracy %.3f", removed, total, found)
    return points


def latencies(
    dense: nn.Module, task: Task, points: Sequence[dict[str, Any]], target: str, measurement_s: float
) -> list[dict[str, Any]]:
    """Latency of the one-shot curve's models beside the dense one, on the task's example."""
    space = heads_of(dense, task)
    made = TARGETS[target]
    assert made is not None
    settings = Settings(limit_s=measurement_s)
    found = []
    for point in points[1:]:
        plan = space.plan(point["widths"])
        one = measure(space.apply(plan).eval(), task.example_inputs, made(), dense, settings)
        macs = space.cost(plan).macs / space.dense_cost.macs
        found.append(
            {
                "removed": point["removed"],
                "ratio": one.ratio,
                "low": one.ratio_low,
                "high": one.ratio_high,
                "macs": macs,
            }
        )
    return [{"removed": 0.0, "ratio": 1.0, "low": 1.0, "high": 1.0, "macs": 1.0}, *found]


def free_share(points: Sequence[dict[str, Any]], tolerance: float = 0.01) -> float:
    """The largest share of the heads up to which accuracy stays within ``tolerance`` of the dense model's."""
    free = 0.0
    for point in points:
        if point["accuracy"] < points[0]["accuracy"] - tolerance:
            break
        free = point["removed"]
    return free


def described(results: dict[str, Any]) -> str:
    """A few lines for the terminal."""
    dense = results["one-shot"][0]["accuracy"]
    lines = [f"{results['articles']} articles; accuracy of the dense model {dense:.1%}, chance {results['chance']:.1%}"]
    for name, share in results["free"].items():
        lines.append(f"{name}: up to {share:.0%} of the heads go at a loss of at most one point")
    if "latency" in results:
        last = results["latency"][-1]
        lines.append(f"latency at {last['removed']:.0%} removed: {last['ratio']:.1%} (MACs {last['macs']:.1%})")
    return "\n".join(lines)
