"""Where models lie, and what they are given moved there."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map

from .errors import ConfigError

CPU = "cpu"


def device_of(model: nn.Module) -> torch.device:
    """Of the first parameter, or the CPU."""
    return next((parameter.device for parameter in model.parameters()), torch.device(CPU))


def check_device(name: str) -> None:
    """Raises ConfigError unless it is the processor or a CUDA device that torch sees."""
    cuda = re.fullmatch(r"cuda(?::(\d+))?", name)
    if name != CPU and cuda is None:
        raise ConfigError(f"the device {name} is not known; expected cpu, cuda, or one of several: cuda:1")
    if cuda is not None and int(cuda[1] or 0) >= torch.cuda.device_count():
        seen = f"torch sees {torch.cuda.device_count() or 'no'} CUDA devices"
        raise ConfigError(f"the device {name} cannot be used here: {seen}; use cpu or another")


def all_cuda_devices() -> list[int]:
    """Those whose generators may have been used; none before CUDA is."""
    return list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []


def moved(value: Any, device: torch.device | str) -> Any:
    """A tensor, or all tensors in a container, on ``device``. Containers keep their types, those of tokenizers too."""
    return tree_map(lambda leaf: _moved_leaf(leaf, device), value)


def _moved_leaf(leaf: Any, device: torch.device | str) -> Any:
    if isinstance(leaf, torch.Tensor):
        # From pinned memory a copy to a GPU need not be waited for; one to the processor must be.
        return leaf.to(device, non_blocking=torch.device(device).type != CPU)
    if isinstance(leaf, Mapping):  # no tree to torch
        own_way = getattr(copy.copy(leaf), "to", None)
        return {key: moved(held, device) for key, held in leaf.items()} if own_way is None else own_way(device)
    return leaf


def batches_on(batches: Iterable[Any], device: torch.device) -> Iterable[Any]:
    """``batches`` on ``device``: a list once and for all, any other each time that it is read."""
    if isinstance(batches, list | tuple):
        lie_there = all(tensor.device == device for tensor in tree_leaves(batches) if isinstance(tensor, torch.Tensor))
        return batches if lie_there else [moved(batch, device) for batch in batches]
    return batches if device.type == CPU else Moved(batches, device)


@dataclass(frozen=True)
class Moved:
    """``batches``, each moved when it is read."""

    batches: Iterable[Any]
    device: torch.device

    def __iter__(self) -> Iterator[Any]:
        return (moved(batch, self.device) for batch in self.batches)
