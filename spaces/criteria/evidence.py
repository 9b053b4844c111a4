"""What criteria look at: weights, moments of activations, gradients; each computed once, when first asked for."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property

import numpy as np
from numpy.typing import NDArray
from torch import nn

from ..calibration import Calibration, Statistics, collect
from ..errors import ConfigError
from ..groups import Structure
from .blocks import BlockMoments, block_moments
from .sensitivity import Sensitivity, sensitivity

#: Importance of the units of one group, ``(size,)``.
Scores = NDArray[np.float64]


class NoCalibration(ConfigError):
    """A criterion needs calibration data."""

    def __init__(self) -> None:
        super().__init__("calibration data: pass calibration=, batches of training data")


class Evidence:
    """Of one model, which is not changed. Without ``calibration``, what needs data raises ConfigError."""

    def __init__(self, model: nn.Module, structure: Structure, calibration: Calibration | None, seed: int = 0) -> None:
        self.model, self.structure, self.calibration, self.seed = model, structure, calibration, seed

    @cached_property
    def statistics(self) -> Statistics:
        """Moments of what every consumer multiplies: one pass over the data."""
        return collect(self.model, self.structure, self._data, self.seed)

    @property
    def has_statistics(self) -> bool:
        """Whether :attr:`statistics` have been taken already."""
        return "statistics" in self.__dict__

    @cached_property
    def blocks(self) -> dict[str, BlockMoments]:
        """Of every module that is a unit of a group of blocks: one pass over the data."""
        return block_moments(self.model, self.structure, self._data)

    @cached_property
    def sensitivity(self) -> Sensitivity:
        """First-order effects of units on the loss: one pass with gradients over the data."""
        return sensitivity(self.model, self.structure, self._data, self.seed)

    @cached_property
    def _data(self) -> Calibration:
        if self.calibration is None:
            raise NoCalibration
        return self.calibration


Criterion = Callable[[Evidence], list[Scores]]
