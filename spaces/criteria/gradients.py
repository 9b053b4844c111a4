"""Criteria that look at gradients. Without a loss, gradients are those of a probe: see :func:`.sensitivity`."""

from __future__ import annotations

import logging

from .evidence import Evidence, Scores

logger = logging.getLogger(__name__)


def taylor(evidence: Evidence) -> list[Scores]:
    """(Sum over a unit's parameters of gradient x weight)^2 a batch, averaged over batches (Molchanov et al. 2019,
    Importance Estimation for Neural Network Pruning)."""
    return evidence.sensitivity.squared_sums


def obd(evidence: Evidence) -> list[Scores]:
    """Sum over a unit's parameters of (gradient x weight)^2, averaged over batches.

    The second-order term of the loss with a diagonal Hessian (LeCun et al. 1990, Optimal Brain Damage), for which the
    empirical Fisher information stands (Theis et al. 2018, Faster Gaze Prediction; Singh & Alistarh 2020, WoodFisher).
    """
    return evidence.sensitivity.sums_of_squares


def head_gradient(evidence: Evidence) -> list[Scores]:
    """Mean over samples of the absolute gradient of a gate on the unit where it enters its consumers.

    Michel et al. 2019, Are Sixteen Heads Really Better than One? Of a block: of a gate on its branch. Units that no
    consumer multiplies: ``taylor``.

    A consumer whose input does not start with the samples (tokens of all samples in one dimension, windows) counts
    each of its input vectors as a sample.
    """
    found = evidence.sensitivity
    for group, gates in zip(evidence.structure.groups, found.gates, strict=True):
        if gates is None:
            logger.info("%s: no consumer multiplies its units: scored by the criterion 'taylor'", group.name)
    return [sums if gates is None else gates for gates, sums in zip(found.gates, found.squared_sums, strict=True)]
