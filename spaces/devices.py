"""Where models lie, and what they are given moved there."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map


def device_of(model: nn.Module) -> torch.device:
    """Of the first parameter, or the CPU."""
    return next((parameter.device for parameter in model.parameters()), torch.device("cpu"))


def moved(value: Any, device: torch.device | str) -> Any:
    """``value``, or in a container its tensors, on ``device``."""
    if isinstance(value, Mapping) and not isinstance(value, dict):
        value = dict(value)  # what tokenizers return is no tree to torch
    return tree_map(lambda leaf: leaf.to(device) if isinstance(leaf, torch.Tensor) else leaf, value)


def batches_on(batches: Iterable[Any], device: torch.device) -> Iterable[Any]:
    """``batches`` on ``device``: a list once and for all, any other each time that it is read."""
    if isinstance(batches, list | tuple):
        return [moved(batch, device) for batch in batches]
    return batches if device.type == "cpu" else _Moved(batches, device)


@dataclass(frozen=True)
class _Moved:
    batches: Iterable[Any]
    device: torch.device

    def __iter__(self) -> Iterator[Any]:
        return (moved(batch, self.device) for batch in self.batches)
