"""How a model is fine-tuned: plain values, the same in Python and in ``conf/finetune``."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from ...spaces.errors import ConfigError
from .sparsity import KINDS

OPTIMIZERS = ("sgd", "adamw")
PRECISIONS: dict[str, torch.dtype | None] = {"bfloat16": torch.bfloat16, "float32": None}


def _check(name: str, value: Any, holds: bool, expected: str) -> None:
    if not holds:
        raise ConfigError(f"finetune.{name} must be {expected}, not {value!r}")


@dataclass(frozen=True)
class Distill:
    """What is learnt from the teacher (Hinton et al. 2015, Distilling the Knowledge in a Neural Network)."""

    #: Share of the loss that is the divergence from the teacher's logits; the task's own loss is the rest.
    weight: float = 0.0
    #: Logits are divided by it.
    temperature: float = 4.0
    #: Weight of the relative squared error of the outputs of matching layers, added to the loss.
    hidden: float = 0.0

    def __post_init__(self) -> None:
        _check("distill.weight", self.weight, 0 <= self.weight <= 1, "from 0 to 1")
        _check("distill.temperature", self.temperature, self.temperature > 0, "above 0")
        _check("distill.hidden", self.hidden, self.hidden >= 0, "at least 0")

    def __bool__(self) -> bool:
        return self.weight > 0 or self.hidden > 0


@dataclass(frozen=True)
class Domains:
    """Dynamic batch loading (Xia et al. 2023, Sheared LLaMA): domains that lag behind are drawn more often."""

    #: Steps between updates of the weights; 0: domains keep their natural shares.
    every: int = 0
    #: The loss to reach in every domain; None: that of the dense model.
    reference: dict[str, float] | None = None

    def __post_init__(self) -> None:
        _check("domains.every", self.every, self.every >= 0, "at least 0")

    def __bool__(self) -> bool:
        return self.every > 0


@dataclass(frozen=True)
class Recipe:
    """Optimizer, schedule and the rest. Raises ConfigError for values that make no sense."""

    #: ``sgd`` with Nesterov's momentum, or ``adamw``.
    optimizer: str = "sgd"
    #: The highest rate: it is reached after the warm-up and falls to ``final_lr`` times itself along a cosine.
    lr: float = 0.05
    #: Of sgd; adamw's first beta.
    momentum: float = 0.9
    #: Not on norms and biases.
    weight_decay: float = 5e-4
    epochs: float = 5.0
    #: Instead of ``epochs``.
    steps: int | None = None
    #: Share of all steps.
    warmup: float = 0.05
    final_lr: float = 0.0
    label_smoothing: float = 0.0
    #: bfloat16 (autocast) or float32.
    precision: str = "bfloat16"
    #: Gradients are scaled down to this norm.
    clip_norm: float | None = None
    #: Decay a step of the average of the weights that is scored and saved; 0 scores the weights themselves.
    ema: float = 0.0
    #: Score every so many steps; None: after every epoch.
    evaluate_steps: int | None = None
    #: Stop when the score has not risen for so many evaluations, and take the best; None: train to the end.
    patience: int | None = None
    checkpoint_min: float = 10.0
    seed: int = 0
    #: Weight of a penalty that makes units small, before a search; 0: none. ``groups``: group lasso on what is removed
    #: together; ``bn_scale``: l1 norm of BatchNorm's scales.
    sparsity: float = 0.0
    sparsity_kind: str = "groups"
    distill: Distill = Distill()
    domains: Domains = field(default_factory=Domains)

    def __post_init__(self) -> None:
        _check("sparsity", self.sparsity, self.sparsity >= 0, "at least 0")
        _check("sparsity_kind", self.sparsity_kind, self.sparsity_kind in KINDS, f"one of {', '.join(KINDS)}")
        _check("optimizer", self.optimizer, self.optimizer in OPTIMIZERS, f"one of {', '.join(OPTIMIZERS)}")
        _check("precision", self.precision, self.precision in PRECISIONS, f"one of {', '.join(PRECISIONS)}")
        _check("lr", self.lr, self.lr > 0, "above 0")
        _check("epochs", self.epochs, self.epochs > 0, "above 0")
        _check("weight_decay", self.weight_decay, self.weight_decay >= 0, "at least 0")
        for name in ("momentum", "label_smoothing", "ema", "warmup"):
            _check(name, getattr(self, name), 0 <= getattr(self, name) < 1, "from 0 to below 1")
        _check("final_lr", self.final_lr, 0 <= self.final_lr <= 1, "from 0 to 1")
        for name in ("steps", "evaluate_steps", "patience"):
            value = getattr(self, name)
            _check(name, value, value is None or value >= 1, "at least 1, or null")
        _check("clip_norm", self.clip_norm, self.clip_norm is None or self.clip_norm > 0, "above 0, or null")
        _check("checkpoint_min", self.checkpoint_min, self.checkpoint_min >= 0, "at least 0")

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Recipe:
        """From plain values, such as those of ``conf/finetune``."""
        parts = {"distill": Distill(**values["distill"]), "domains": Domains(**values.get("domains", {}))}
        return cls(**{**values, **parts})

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def needs_dense(self) -> bool:
        """Whether something is learnt from the dense model."""
        return bool(self.distill) or (bool(self.domains) and self.domains.reference is None)

    @property
    def autocast(self) -> torch.dtype | None:
        return PRECISIONS[self.precision]

    def total_steps(self, batches: int) -> int:
        """``batches``: those of an epoch."""
        return self.steps or max(1, round(self.epochs * batches))

    def rate(self, step: int, total: int) -> float:
        """The learning rate of a step, counted from 0."""
        warmup = round(self.warmup * total)
        if step < warmup:
            return self.lr * (step + 1) / warmup
        share = (step - warmup) / max(1, total - warmup)
        return self.lr * (self.final_lr + (1 - self.final_lr) * (1 + math.cos(math.pi * share)) / 2)
