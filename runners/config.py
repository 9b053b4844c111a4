"""Schemas of the configuration: Hydra refuses keys and types that are not in them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING


@dataclass
class Budget:
    """Upper limits: a share of the dense model (50%), or a number, alone or with a unit (200k, 1MiB)."""

    macs: str | None = None
    flops: str | None = None
    params: str | None = None
    memory: str | None = None
    size: str | None = None
    latency: str | None = None


@dataclass
class Latency:
    """Measuring for the latency model: until its error is that small, at most so many plans and seconds."""

    error: float = 0.05
    most: int = 64
    limit_s: float | None = None
    tolerance: float = 0.01
    measurement_s: float = 10.0
    cache: str = "~/.cache/prunefront/latency"
    batch_size: int | None = None
    input_shapes: list[list[int]] = field(default_factory=list)


@dataclass
class NoTarget:
    pass


@dataclass
class TorchTarget:
    _target_: str = "prunefront.runners.targets.TorchTarget"
    device: str = "cpu"
    compile: bool = False
    precision: str = "float32"
    channels_last: bool = False
    threads: int | None = None


@dataclass
class OnnxTarget:
    _target_: str = "prunefront.runners.targets.OnnxTarget"
    runtime: str = MISSING
    threads: int | None = None
    precision: str = "float32"
    device: str = "cpu"
    timeout_s: float = 300.0


@dataclass
class SshTarget:
    _target_: str = "prunefront.runners.targets.SshTarget"
    host: str = MISSING
    runtime: str = "onnxruntime"
    python: str = "python3"
    threads: int | None = None
    precision: str = "float32"
    device: str = "cpu"
    connect_timeout_s: int = 15
    timeout_s: float = 600.0
    ssh_options: list[str] = field(default_factory=list)


@dataclass
class CommandTarget:
    _target_: str = "prunefront.runners.targets.CommandTarget"
    command: list[str] = MISSING
    timeout_s: float = 60.0


@dataclass
class Space:
    """Arguments of ``prunefront.discover``; the ratios and ``round_to``: one value, or values by kind or pattern."""

    criterion: Any = "auto"
    compensation: str = "auto"
    kinds: list[str] | None = None
    include: list[str] = field(default_factory=lambda: ["*"])
    exclude: list[str] = field(default_factory=list)
    min_ratio: Any = 0.0
    max_ratio: Any = 1.0
    round_to: Any = 1
    uniform: bool = False
    proof: str = "auto"


@dataclass
class Digits:
    _target_: str = "prunefront.runners.tasks.digits.digits"
    width: int = 16
    epochs: int = 20
    seed: int = 0
    batch_size: int = 64


@dataclass
class CifarResNet:
    _target_: str = "prunefront.runners.tasks.cifar_resnet.cifar_resnet"
    depth: int = 56
    data: str | None = None
    calibration_images: int = 2048
    seed: int = 0
    batch_size: int = 128


@dataclass
class Custom:
    _target_: str = "prunefront.runners.tasks.custom.custom"
    model: Any = None
    score: str | None = None
    test: str | None = None
    calibration: Any = None
    loss: str | None = None
    example_inputs: Any = None
    score_name: str = "score"
    autocast: str | None = None
    training: Any = None


@dataclass
class HfCausalLm:
    _target_: str = "prunefront.runners.tasks.hf_causal_lm.hf_causal_lm"
    model: str | None = None
    config: Any = None
    train: Any = None
    search: Any = None
    test: Any = None
    held_out: float = 0.1
    tokenizer: str | None = None
    vocab_size: int = 2048
    sequence_length: int = 128
    batch_size: int = 16
    calibration_sequences: int = 128
    search_sequences: int | None = None
    test_sequences: int | None = None
    score: str = "perplexity"
    epochs: float = 0.0
    lr: float = 1e-3
    dtype: str = "float32"
    autocast: str | None = None
    seed: int = 0


@dataclass
class HfTextClassification:
    _target_: str = "prunefront.runners.tasks.hf_text_classification.hf_text_classification"
    model: str | None = None
    config: Any = None
    train: Any = None
    search: Any = None
    test: Any = None
    held_out: float = 0.1
    text_column: str = "text"
    label_column: str = "label"
    tokenizer: str | None = None
    vocab_size: int = 2048
    sequence_length: int = 128
    batch_size: int = 32
    calibration_texts: int = 512
    epochs: float = 0.0
    lr: float = 1e-3
    dtype: str = "float32"
    autocast: str | None = None
    seed: int = 0


@dataclass
class Wandb:
    _target_: str = "prunefront.runners.tracking.WandbTracker"
    project: str = "prunefront"
    entity: str | None = None
    name: str | None = None
    mode: str | None = None
    tags: list[str] = field(default_factory=list)


@dataclass
class NoTracker:
    _target_: str = "prunefront.runners.tracking.NoTracker"


@dataclass
class SpaceCommand:
    task: Any = MISSING
    space: Any = MISSING
    seed: int = 0
    json: bool = False


@dataclass
class Search:
    task: Any = MISSING
    tracker: Any = MISSING
    target: Any = MISSING
    latency: Latency = field(default_factory=Latency)
    mode: str = "budget"
    budget: Budget = field(default_factory=Budget)
    lowest: str | None = None
    space: Any = MISSING
    start: str | None = None
    guide: str = "auto"
    finalists: int | None = None
    sampler: Any = "auto"
    warm_start: list[str] = field(default_factory=list)
    finetune_steps: int = 0
    finetune_lr: float = 0.01
    n_trials: int = 100
    timeout_s: float | None = None
    patience: int | None = None
    workers: int | None = None
    devices: list[str] = field(default_factory=list)
    storage: str | None = None
    seed: int = 0
    run_dir: str = MISSING


@dataclass
class Rounds(Search):
    """``prunefront rounds``."""

    rounds: int = 3
    finetune: Any = MISSING
    device: str = "cpu"
    restart: bool = False


@dataclass
class Measure:
    """``prunefront measure``."""

    task: Any = MISSING
    space: Any = MISSING
    target: Any = MISSING
    latency: Latency = field(default_factory=Latency)
    refresh: bool = False
    steps: bool = False
    seed: int = 0
    json: bool = False


@dataclass
class Front:
    """``prunefront front RUN``."""

    run: str = MISSING
    pick: Budget = field(default_factory=Budget)
    json: bool = False


@dataclass
class Distill:
    """See ``prunefront.Distill``."""

    weight: float = 0.0
    temperature: float = 4.0
    hidden: float = 0.0


@dataclass
class Domains:
    """See ``prunefront.Domains``."""

    every: int = 0
    reference: Any = None


@dataclass
class Recipe:
    """Arguments of ``prunefront.Recipe``, and a name for what is saved."""

    name: str = MISSING
    optimizer: str = MISSING
    lr: float = MISSING
    momentum: float = 0.9
    weight_decay: float = MISSING
    epochs: float = 5.0
    steps: int | None = None
    warmup: float = 0.05
    final_lr: float = 0.0
    label_smoothing: float = 0.0
    precision: str = "bfloat16"
    clip_norm: float | None = None
    ema: float = 0.0
    evaluate_steps: int | None = None
    patience: int | None = None
    checkpoint_min: float = 10.0
    seed: int = 0
    sparsity: float = 0.0
    sparsity_kind: str = "groups"
    distill: Distill = field(default_factory=Distill)
    domains: Domains = field(default_factory=Domains)


@dataclass
class Pick(Budget):
    """Which models of a front: the best within a budget, or ``names``."""

    names: Any = None


@dataclass
class Finetune:
    """``prunefront finetune RUN``."""

    task: Any = MISSING
    tracker: Any = MISSING
    finetune: Any = MISSING
    run: str = MISSING
    pick: Pick = field(default_factory=Pick)
    device: str = "cpu"
    restart: bool = False


@dataclass
class Export:
    """``prunefront export RUN``."""

    run: str = MISSING
    pick: Pick = field(default_factory=Pick)
    format: str = "onnx"
    path: str | None = None
    dynamic_batch: bool = True
    licence: str = "not given"
    modules: list[str] = field(default_factory=list)


@dataclass
class Dashboard:
    """``prunefront dashboard RUN``."""

    run: str = MISSING
    host: str = "localhost"
    port: int = 8080


@dataclass
class OneModel:
    """``prunefront pick RUN`` and ``prunefront show RUN``."""

    run: str = MISSING
    pick: Pick = field(default_factory=Pick)
    json: bool = False


@dataclass
class Report:
    """``prunefront report RUN [RUN ...]``."""

    run: Any = MISSING
    path: str | None = None


@dataclass
class Shape:
    """Widths of all layers; None leaves a part whole."""

    hidden: int | None = None
    layers: int | None = None
    heads: int | None = None
    neurons: int | None = None


@dataclass
class Shearing:
    """``prunefront experiment shearing``."""

    task: Any = MISSING
    space: Any = MISSING
    finetune: Any = MISSING
    shape: Shape = field(default_factory=Shape)
    tokens: int = 500_000
    scratch: list[float] = field(default_factory=list)
    points: int = 20
    check: bool = False
    device: str = "cpu"
    seed: int = 0
    run_dir: str = MISSING


@dataclass
class LoadCheck:
    """``prunefront load-check PATH``."""

    run: str = MISSING
    modules: list[str] = field(default_factory=list)


@dataclass
class Li2016:
    """``prunefront experiment li2016``."""

    depth: int = 56
    data: str | None = None
    macs: float = 0.724
    images: int = 1000
    compensation: str = "none"
    epochs: float = 5.0
    lr: float = 0.02
    batch_size: int = 128
    seed: int = 0
    run_dir: str = MISSING


@dataclass
class Michel2019:
    """``prunefront experiment michel2019``."""

    text: str = MISSING
    words: int = 40
    layers: int = 4
    heads: int = 8
    hidden: int = 128
    epochs: float = 12.0
    lr: float = 1e-3
    step: float = 0.1
    latency_on: str = "onnxruntime"
    measurement_s: float = 5.0
    seed: int = 0
    run_dir: str = MISSING


def register() -> None:
    """Make the schemas known to Hydra; ``conf/`` extends them."""
    store = ConfigStore.instance()
    commands = {
        "search": Search,
        "space": SpaceCommand,
        "measure": Measure,
        "front": Front,
        "finetune": Finetune,
        "rounds": Rounds,
        "worker": Search,
        "export": Export,
        "dashboard": Dashboard,
        "pick": OneModel,
        "show": OneModel,
        "report": Report,
        "load_check": LoadCheck,
    }
    groups = {"task/digits": Digits, "task/cifar_resnet": CifarResNet, "task/custom": Custom}
    groups |= {"task/hf_causal_lm": HfCausalLm, "task/hf_text_classification": HfTextClassification}
    groups |= {"space/options": Space, "finetune/recipe": Recipe}
    groups |= {"target/torch": TorchTarget, "target/onnx": OnnxTarget, "target/none": NoTarget}
    groups |= {"target/ssh": SshTarget, "target/command": CommandTarget}
    groups |= {"experiment/shearing": Shearing, "experiment/li2016": Li2016, "experiment/michel2019": Michel2019}
    groups |= {"tracker/wandb": Wandb, "tracker/none": NoTracker}
    for name, node in (commands | groups).items():
        store.store(group=f"schema/{name}".rpartition("/")[0], name=name.rpartition("/")[2], node=node)
