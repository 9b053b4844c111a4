"""The states of all generators that training may draw from: torch's, numpy's and Python's global ones."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from ...spaces.devices import all_cuda_devices


def seed_all(*numbers: int) -> None:
    value = seed_of(*numbers)
    random.seed(value)
    np.random.seed(value)
    torch.manual_seed(value)  # on all devices


def seed_of(*numbers: int) -> int:
    """One seed from several numbers, such as a seed and an epoch: neighbours have nothing in common."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


def state(device: torch.device) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The states as tensors and as JSON values."""
    tensors = {"torch": torch.get_rng_state()}
    if device.type == "cuda":
        tensors["cuda"] = torch.cuda.get_rng_state(device)
    kind, keys, *rest = np.random.get_state()
    return tensors, {"python": random.getstate(), "numpy": [kind, np.asarray(keys).tolist(), *rest]}


def restore(device: torch.device, tensors: dict[str, torch.Tensor], values: dict[str, Any]) -> None:
    torch.set_rng_state(tensors["torch"])
    if device.type == "cuda" and "cuda" in tensors:
        torch.cuda.set_rng_state(tensors["cuda"], device)
    version, keys, gauss = values["python"]
    random.setstate((version, tuple(keys), gauss))
    kind, keys, *rest = values["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), *rest))


@contextmanager
def undisturbed(device: torch.device) -> Iterator[None]:
    """The generators, those of all devices too, are afterwards as they were."""
    before = state(device)
    try:
        with torch.random.fork_rng(devices=all_cuda_devices()):
            yield
    finally:
        restore(device, *before)
