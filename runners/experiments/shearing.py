"""Pruning a language model to a given shape beats training that shape from scratch.

Xia et al. 2023, Sheared LLaMA. This differs from it in how units are chosen: by a criterion, and repaired by least
squares, not by masks that are learnt in training.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from rich.table import Table
from torch import nn

from ...search.candidates import Score
from ...search.files import write_json
from ...search.saved import load
from ...spaces import Plan, Space, discover
from ...spaces.calibration import precision
from ...spaces.errors import ConfigError
from ...spaces.huggingface import from_config
from ..dense import prepare, scored_dense
from ..devices import placed, use_device
from ..display import console, show_load
from ..exporting.huggingface import check_uniform, export_huggingface
from ..finetuning import Finetuned, Recipe, finetune
from ..finetuning.progress import TrainingProgress
from ..making import make_task, plain
from ..tasks import Task
from ..tasks.hf_causal_lm import AUTO
from ..tasks.huggingface import config_for, takes
from ..tasks.vocabulary import transformers
from .charts import Line, line_chart

#: What a shape sets, by the kinds of the groups that it sets it for.
KINDS = {"hidden": ("hidden",), "layers": ("block",), "heads": ("head", "kv_group"), "neurons": ("neuron",)}
PRUNED = "pruned"


def run(config: DictConfig) -> None:
    """Prune a language model to a shape and train it on, beside the same shape trained from scratch."""
    shape = {key: value for key, value in plain(config.shape).items() if value is not None}
    if not shape:
        raise ConfigError(f"shape sets nothing; set some of {', '.join(f'shape.{key}' for key in KINDS)}")
    if config.task.score != "perplexity":
        raise ConfigError("the figure is of perplexity; leave task.score as it is")
    if config.check:
        return show_shape(config, shape)
    use_device(config.device)
    run_dir = Path(config.run_dir)
    task = placed(make_task(config), config.device)
    space = prepare(task, config, run_dir)
    dense = scored_dense(task, space, run_dir)
    plan, pruned = choose(space, task, shape)
    console.print(described(space, plan))
    trained = {PRUNED: train(config, task, pruned, plan, run_dir / PRUNED, 1.0)}
    for share in plain(config.scratch):
        name = f"scratch_{share:g}x"
        trained[name] = train(config, task, scratch(pruned, config.seed), plan, run_dir / name, share)
    export(trained[PRUNED], task, plan, run_dir / "checkpoint")
    write_json(run_dir / "results.json", results(dense, trained, tokens_of(task)))
    draw(json.loads((run_dir / "results.json").read_text()), run_dir / "shearing.svg")
    console.print(table(dense, trained, tokens_of(task)))
    console.print(f"figure  {run_dir / 'shearing.svg'}", soft_wrap=True, highlight=False)
    show_load(run_dir / PRUNED)
    console.print(f"export  {run_dir / 'checkpoint'}", soft_wrap=True, highlight=False)


def widths_for(space: Space, shape: Mapping[str, int]) -> dict[str, int]:
    """Widths by dimension. Raises ConfigError for a part of the shape that the space does not have, once."""
    found = {}
    for key, width in shape.items():
        tied = zip(space.dimensions, space.tied_groups, strict=True)
        names = [name for name, groups in tied if groups[0].kind in KINDS[key]]
        if len(names) != 1:
            kinds = {name: groups[0].kind for name, groups in zip(space.dimensions, space.tied_groups, strict=True)}
            raise ConfigError(f"shape.{key} must mean one dimension of the space, which has {kinds}; set space=uniform")
        found[names[0]] = width
    return found


def choose(space: Space, task: Task, shape: Mapping[str, int]) -> tuple[Plan, nn.Module]:
    """The plan of that shape and its model, by the criterion of ``space.criterion`` with the best score."""
    assert task.score is not None
    found: list[tuple[float, Plan, nn.Module]] = []
    for criterion in space.criteria:
        plan = space.plan(widths_for(space, shape), criterion)
        candidate = space.apply(plan).eval()
        found.append((scored(candidate, task.score, task), plan, candidate))
        console.print(f"{criterion}: {task.score_name} {found[-1][0]:.4g} before training", highlight=False)
    _, plan, candidate = max(found, key=lambda entry: entry[0])
    return plan, candidate


def scored(model: nn.Module, score: Score, task: Task) -> float:
    with precision(model, task.autocast):
        return score(model)


def scratch(pruned: nn.Module, seed: int) -> nn.Module:
    """A model of the shape of ``pruned`` with new weights."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return from_config(pruned)


def tokens_of(task: Task) -> int:
    """Tokens of one step."""
    assert task.training is not None
    return int(next(iter(task.training(0)))["input_ids"].numel())


def train(config: DictConfig, task: Task, model: nn.Module, plan: Plan, folder: Path, share: float) -> Finetuned:
    """Train ``model`` on ``share`` of the tokens, and save it; what was trained already is read."""
    assert task.training is not None and task.score is not None
    options = plain(config.finetune)
    options.pop("name")
    steps = max(1, round(share * config.tokens / tokens_of(task)))
    before = {"score": scored(model, task.score, task)}
    every = max(1, round(config.tokens / tokens_of(task) / config.points))
    recipe = Recipe.of({**options, "steps": steps, "evaluate_steps": every})
    with TrainingProgress(folder.name, console) as progress:
        return finetune(
            model.to(task.device),
            training=task.training,
            loss=task.loss,
            score=task.score,
            test=task.test,
            recipe=recipe,
            teacher=load(folder.parent / "dense").to(task.device) if recipe.needs_dense else None,
            autocast=task.autocast,
            example_inputs=task.example_inputs,
            plan=plan,
            metrics=before,
            run_dir=folder,
            callbacks=(progress,),
        )


def export(trained: Finetuned, task: Task, plan: Plan, folder: Path) -> None:
    if not folder.exists():
        export_huggingface(trained.model, folder, task.example_inputs, widths=plan.widths)


def results(dense: Mapping[str, float], trained: Mapping[str, Finetuned], tokens: int) -> dict[str, Any]:
    """Perplexities on the search split by tokens, and the last one on the test split."""
    rows = {}
    for name, found in trained.items():
        metrics = found.metrics
        points = [{"tokens": 0, "perplexity": -metrics["score_before"]}] if name == PRUNED else []
        points += [
            {"tokens": tokens * point["step"], "perplexity": -point["score"]} for point in metrics["evaluations"]
        ]
        test = {"test_perplexity": -metrics["test"]} if "test" in metrics else {}
        rows[name] = {"params": metrics["params"], "seconds": metrics["seconds"], "curve": points, **test}
    known = {"params": dense["params"], "perplexity": -dense["score"]}
    return {"dense": known | ({"test_perplexity": -dense["test"]} if "test" in dense else {}), "trained": rows}


def draw(found: Mapping[str, Any], path: Path) -> None:
    """Perplexity on the search split against tokens of training. Untrained models are off the chart."""
    lines = []
    for name, row in found["trained"].items():
        label = "pruned" if name == PRUNED else f"scratch, {name.removeprefix('scratch_')} tokens"
        lines.append(Line(label, [p["tokens"] for p in row["curve"]], [p["perplexity"] for p in row["curve"]]))
    dense = found["dense"]["perplexity"]
    most = max(point["tokens"] for row in found["trained"].values() for point in row["curve"])
    lines.append(Line("dense", [0, most], [dense, dense], is_dashed=True))
    line_chart(path, "Pruned against from scratch", "tokens of training", "perplexity, search split", lines, 4 * dense)


def described(space: Space, plan: Plan) -> str:
    cost, whole = space.cost(plan), space.dense_cost
    return f"{cost.params:,} of {whole.params:,} parameters ({cost.params / whole.params:.1%}), {cost.macs:,} MACs"


def table(dense: Mapping[str, float], trained: Mapping[str, Finetuned], tokens: int) -> Table:
    shown = Table(title="perplexity")
    for heading in ("model", "parameters", "tokens", "search", "test", "seconds"):
        shown.add_column(heading, justify="left" if heading == "model" else "right")

    def row(name: str, metrics: Mapping[str, Any], trained_on: str) -> None:
        values = [f"{-metrics[key]:.3f}" if key in metrics else "" for key in ("score", "test")]
        seconds = f"{metrics['seconds']:.0f}" if "seconds" in metrics else ""
        shown.add_row(name, f"{metrics['params']:,}", trained_on, *values, seconds)

    row("dense", dense, "")
    for name, found in trained.items():
        row(name, found.metrics, f"{tokens * found.metrics['steps']:,}")
    return shown


def show_shape(config: DictConfig, shape: Mapping[str, int]) -> None:
    """Look whether the shape can be had, on a model without weights; no data is read."""
    sizes = {"bytes": 256, "bpe": config.task.vocab_size}
    implied = {"vocab_size": sizes[config.task.tokenizer]} if config.task.tokenizer in sizes else {}
    model_config = config_for(config.task.model, plain(config.task.config), **implied)
    with torch.device("meta"):
        model = getattr(transformers(), AUTO).from_config(model_config).eval()
        inputs: dict[str, Any] = {"input_ids": torch.ones(1, 16, dtype=torch.long)}
    if takes(AUTO, model_config, "use_cache"):
        inputs["use_cache"] = False
    space = discover(model, inputs, uniform=True, criterion="l1", compensation="none")
    plan = space.plan(widths_for(space, shape))
    candidate: Any = space.apply(plan)
    check_uniform(candidate, plan.widths)
    said = {key: value for key, value in candidate.config.to_diff_dict().items() if isinstance(value, int | str)}
    console.print(described(space, plan), highlight=False)
    console.print(json.dumps(said, indent=1), highlight=False)
