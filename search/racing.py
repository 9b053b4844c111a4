"""Scores on growing parts of the data: a clear loser is told as such after the first of them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import nn

from .scores import SampleScore

#: One-sided significance at which a candidate loses against a rival.
LEVEL = 0.01
#: It is tested after the first part, and again when there are so many times the samples of the last test.
GROWTH = 1.5


@dataclass(frozen=True)
class Raced:
    """``values (samples,)`` as far as the race went, and the ``score``: that of their mean, or for a loser that of its
    rival's mean plus the mean difference on the samples that both were scored on."""

    score: float
    values: NDArray[np.float64]
    is_complete: bool


def race(model: nn.Module, guide: SampleScore, rival: NDArray[np.float64] | None) -> Raced:
    """Score ``model`` part by part until it is clear that ``rival (samples,)`` is better.

    Differences are paired by sample, and tested by Wilcoxon's signed ranks (1945), as Optuna's WilcoxonPruner does.
    """
    values = np.empty(0)
    due = 0.0
    for part in range(len(guide.batches)):
        values = np.concatenate([values, guide.values(model, part)])
        if not np.isfinite(values).all():
            raise ValueError("the score of a sample is not finite")
        is_last = part == len(guide.batches) - 1
        if rival is None or is_last or len(values) < due:
            continue
        due = GROWTH * len(values)
        differences = values - rival[: len(values)]
        if _loses(differences):
            return Raced(guide.of_mean(float(rival.mean()) + float(differences.mean())), values, False)
    return Raced(guide.of_mean(float(values.mean())), values, True)


def _loses(differences: NDArray[np.float64]) -> bool:
    if differences.mean() >= 0 or not differences.any():
        return False
    from scipy.stats import wilcoxon  # takes as long to import as everything else: only searches need it

    return float(wilcoxon(differences, alternative="less", method="approx").pvalue) < LEVEL
