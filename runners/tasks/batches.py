"""Rows of data as batches: in order, drawn, and as epochs."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch


class Batches(ABC):
    """Called with a seed, the batches of one epoch: every row once, in an order drawn from the seed."""

    batch_size: int

    @property
    @abstractmethod
    def rows(self) -> int:
        """How many there are."""

    @abstractmethod
    def batch(self, chosen: Sequence[int]) -> dict[str, Any]:
        """These rows, as keyword arguments of the model."""

    def __call__(self, seed: int) -> Epoch:
        return Epoch(self, seed)

    def __len__(self) -> int:
        """Batches of an epoch."""
        return -(-self.rows // self.batch_size)

    def drawn(self, most: int | None = None, seed: int = 0) -> list[dict[str, Any]]:
        """Batches of ``most`` rows drawn from ``seed``, or of all, in an order drawn from it."""
        order = np.random.default_rng(seed).permutation(self.rows)[:most].tolist()
        return [self.batch(order[start : start + self.batch_size]) for start in range(0, len(order), self.batch_size)]


@dataclass(frozen=True)
class Epoch:
    """Batches differ by one row at most."""

    data: Batches
    seed: int

    def __len__(self) -> int:
        return len(self.data)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        order = torch.randperm(self.data.rows, generator=torch.Generator().manual_seed(self.seed))
        for chosen in order.tensor_split(len(self)):
            yield self.data.batch(chosen.tolist())
