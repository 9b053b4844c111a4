"""What a search needs to know about a model and its data."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F


@dataclass(frozen=True)
class Task:
    """A model with its data and its score; ``task._target_`` names a function that returns one."""

    #: Loads or trains the dense model.
    make_model: Callable[[], nn.Module]
    #: One forward pass: a tensor, a tuple of arguments, or a mapping of keyword arguments; costs refer to it.
    example_inputs: Any
    #: Batches of training data, readable again and again: they repair candidates.
    calibration: Iterable[Any] | None
    #: Higher is better; on data that is neither training nor test data. None: fidelity to the dense model's outputs.
    #: A :class:`...search.SampleScore` lets the search give up losers early.
    score: Callable[[nn.Module], float] | None
    #: The same on test data; called for the dense model and the front only.
    test: Callable[[nn.Module], float] | None = None
    #: What the two numbers are, for tables and reports.
    score_name: str = "score"
    #: ``loss(output, batch)`` of a calibration or training batch; None: criteria do without, nothing can be fine-tuned.
    loss: Callable[[Any, Any], torch.Tensor] | None = None
    #: ``training(seed)`` gives the augmented batches of one epoch, of one seed always the same; None: no fine-tuning.
    training: Callable[[int], Iterable[Any]] | None = None
    #: Precision of calibration and scores; None is that of the model.
    autocast: torch.dtype | None = None
    #: ``make_model`` trains: a continued run takes its dense model from the run instead.
    trains: bool = False
    #: Where ``make_model`` puts the model.
    device: str = "cpu"
    #: The model, where the task keeps it in memory: a search lets it share the weights of the run's own file.
    held: nn.Module | None = None


def cross_entropy(output: torch.Tensor, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Loss of logits ``(n, classes)`` on a batch of images and labels ``(n,)``."""
    return F.cross_entropy(output.float(), batch[1])


@dataclass(frozen=True)
class Epoch:
    """All images once in an order drawn from ``seed``, each batch changed by ``augment(images, generator)``.

    The images ``(n, ...)`` stay as they are stored until a batch is made of them. Batches differ by one image at most.
    """

    images: torch.Tensor
    labels: torch.Tensor
    augment: Callable[[torch.Tensor, torch.Generator], torch.Tensor]
    batch_size: int
    seed: int

    def __len__(self) -> int:
        return -(-len(self.images) // self.batch_size)

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        generator = torch.Generator().manual_seed(self.seed)
        for chosen in torch.randperm(len(self.images), generator=generator).tensor_split(len(self)):
            yield self.augment(self.images[chosen], generator), self.labels[chosen]
