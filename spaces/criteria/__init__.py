"""Which units of a group matter least: one criterion a function, one paper each; low scores go first."""

from __future__ import annotations

import numpy as np

from ..errors import CalibrationError, ConfigError
from ..surgery import tensors_of
from .activations import activation
from .elimination import reconstruction
from .evidence import Criterion, Evidence, NoCalibration, Scores
from .gradients import head_gradient, obd, taylor
from .weights import bn_scale, fpgm, l1, l2, random

__all__ = ["CRITERIA", "Criterion", "Evidence", "Scores", "unit_scores"]

CRITERIA: dict[str, Criterion] = {
    "random": random,
    "l1": l1,
    "l2": l2,
    "bn_scale": bn_scale,
    "fpgm": fpgm,
    "taylor": taylor,
    "obd": obd,
    "head_gradient": head_gradient,
    "activation": activation,
    "reconstruction": reconstruction,
}


def unit_scores(criterion: str, evidence: Evidence) -> list[Scores]:
    """Importance of every unit of every group of ``evidence.structure``: finite, not negative, ``(group.size,)`` each.

    A model on the meta device has no numbers: of its units the first ones stay.

    Raises:
        ConfigError: ``criterion`` is not one of :data:`CRITERIA`, or needs calibration data and has none.
        CalibrationError: scores are not finite.
    """
    if criterion not in CRITERIA:
        raise ConfigError(f"unknown criterion {criterion!r}; expected one of {', '.join(CRITERIA)}")
    groups = evidence.structure.groups
    if any(tensor.is_meta for tensor in tensors_of(evidence.model).values()):
        return [np.arange(group.size, 0, -1.0) for group in groups]
    try:
        scores = CRITERIA[criterion](evidence)
    except NoCalibration as error:
        raise ConfigError(f"criterion {criterion!r} needs {error}") from None
    for group, values in zip(groups, scores, strict=True):
        if not np.isfinite(values).all():
            raise CalibrationError(
                f"criterion {criterion!r} gives scores of {group.name} that are not finite: "
                "look for NaN in the weights, in the calibration data and in the loss"
            )
    return scores
