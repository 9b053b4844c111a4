"""What is done to a candidate after slicing, before it is scored.

``none``: nothing. ``bn``: BatchNorm statistics are recalibrated. The others do that too, and before it:
``bias``: means that removed units gave are taken up by biases. ``least_squares``: consumers are fitted to their dense
outputs, from moments of the dense model. ``sequential``: the same layer after layer on the candidate's activations.
"""

from __future__ import annotations

from functools import cached_property

import torch
from torch import nn

from .calibration import batch_norms, check_calibration, recalibrate
from .criteria import Evidence
from .errors import CalibrationError, ConfigError
from .groups import Kept
from .least_squares import ConsumerFits, Ranks
from .sequential import Targets, record_targets, refit

METHODS = ("none", "bn", "bias", "least_squares", "sequential")


class Compensation:
    """Repairs candidates of one model. ``method``: one of :data:`METHODS`, or ``auto``: least_squares where there is
    calibration data, else none.

    Raises:
        ConfigError: an unknown method, or one that needs calibration data and has none.
        CalibrationError: too little data for BatchNorm.
    """

    def __init__(self, evidence: Evidence, method: str) -> None:
        if method not in ("auto", *METHODS):
            raise ConfigError(f"unknown compensation {method!r}; expected one of auto, {', '.join(METHODS)}")
        self._evidence, self.requested = evidence, method
        has_data = evidence.calibration is not None
        self.method = method if method != "auto" else "least_squares" if has_data else "none"
        if self.method != "none":
            if not has_data:
                raise ConfigError(
                    f"compensation={method} needs calibration data: pass calibration=, batches of training data"
                )
            check_calibration(evidence.model, evidence.calibration)

    def weights(self, kept: Kept, ranks: Ranks | None) -> dict[str, torch.Tensor]:
        """What takes the place of slices of parameters and buffers, by name: computed without running the model."""
        return self._fits(kept, ranks) if self.method in ("bias", "least_squares") else {}

    def run(self, candidate: nn.Module, kept: Kept) -> None:
        """What takes a forward pass of the candidate."""
        calibration = self._evidence.calibration
        if calibration is None or self.method == "none":
            return
        if self.method == "sequential":
            refit(candidate, self._evidence.structure, kept, self._targets, calibration)
        elif batch_norms(candidate):
            recalibrate(candidate, calibration)

    @cached_property
    def _fits(self) -> ConsumerFits:
        evidence = self._evidence
        return ConsumerFits(evidence.model, evidence.structure, evidence.statistics, self.method == "least_squares")

    @cached_property
    def _targets(self) -> Targets:
        evidence = self._evidence
        if evidence.calibration is None:
            raise CalibrationError("no calibration data")
        return record_targets(evidence.model, evidence.structure, evidence.calibration, evidence.seed)
