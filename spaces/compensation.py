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
from .sequential import EFFORTS, Targets, record_targets, refit

METHODS = ("none", "bn", "bias", "least_squares", "sequential")


class Compensation:
    """Repairs candidates of one model. ``method``: one of :data:`METHODS`, or ``auto``: sequential where there is
    calibration data, else none. ``sample_bytes``: peak of the dense model's activations of one sample.

    Raises:
        ConfigError: an unknown method, or one that needs calibration data and has none.
        CalibrationError: too little data for BatchNorm.
    """

    def __init__(self, evidence: Evidence, method: str, sample_bytes: float = 0.0) -> None:
        if method not in ("auto", *METHODS):
            raise ConfigError(f"unknown compensation {method!r}; expected one of auto, {', '.join(METHODS)}")
        self._evidence, self.requested, self._sample_bytes = evidence, method, sample_bytes
        self._targets: dict[str, Targets] = {}
        has_data = evidence.calibration is not None
        self.method = method if method != "auto" else "sequential" if has_data else "none"
        if self.method != "none":
            if not has_data:
                raise ConfigError(
                    f"compensation={method} needs calibration data: pass calibration=, batches of training data"
                )
            check_calibration(evidence.model, evidence.calibration)

    def weights(self, kept: Kept, ranks: Ranks | None) -> dict[str, torch.Tensor]:
        """What takes the place of slices of parameters and buffers, by name: computed without running the model."""
        return self._fits(kept, ranks) if self.method in ("bias", "least_squares") else {}

    def run(self, candidate: nn.Module, kept: Kept, effort: str) -> None:
        """What takes a forward pass of the candidate. ``effort``: one of :data:`.sequential.EFFORTS`."""
        calibration = self._evidence.calibration
        if calibration is None or self.method == "none":
            return
        if self.method == "sequential":
            refit(candidate, self._evidence.structure, kept, self._targets_for(effort), calibration)
        elif batch_norms(candidate):
            recalibrate(candidate, calibration)

    @cached_property
    def _fits(self) -> ConsumerFits:
        evidence = self._evidence
        return ConsumerFits(evidence.model, evidence.structure, evidence.statistics, self.method == "least_squares")

    def _targets_for(self, effort: str) -> Targets:
        if effort not in EFFORTS:
            raise ConfigError(f"unknown effort {effort!r}; expected one of {', '.join(EFFORTS)}")
        if effort not in self._targets:
            evidence = self._evidence
            if evidence.calibration is None:
                raise CalibrationError("no calibration data")
            self._targets[effort] = record_targets(
                evidence.model,
                evidence.structure,
                evidence.calibration,
                EFFORTS[effort],
                self._sample_bytes,
                evidence.seed,
            )
        return self._targets[effort]
