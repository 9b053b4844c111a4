"""What a search needs to know about a model and its data."""

from __future__ import annotations

from collections.abc import Callable, Iterable
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
    #: ``loss(output, batch)`` of a calibration batch, for criteria that take gradients; None: see ``Calibration``.
    loss: Callable[[Any, Any], torch.Tensor] | None = None
    #: Precision of calibration and scores; None is that of the model.
    autocast: torch.dtype | None = None
    #: ``make_model`` trains: a continued run takes its dense model from the run instead.
    trains: bool = False


def cross_entropy(output: torch.Tensor, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Loss of logits ``(n, classes)`` on a batch of images and labels ``(n,)``."""
    return F.cross_entropy(output.float(), batch[1])
