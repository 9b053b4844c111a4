"""What trials are told: the user's score, or something smoother and faster that needs no labels."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from ..spaces import Space
from ..spaces.calibration import Calibration, precision
from ..spaces.devices import Moved
from ..spaces.errors import ConfigError
from .candidates import Score
from .formats import FIDELITY
from .scores import Fidelity, SampleScore, parts_of

GUIDES = ("auto", "score", FIDELITY)
#: Samples that fidelity is taken on.
GUIDE_SAMPLES = 1000


@dataclass(frozen=True)
class Guidance:
    """``score``: the user's, or the default. ``guide``: what trials are told, called ``name``."""

    name: str
    guide: Score
    score: Score

    @property
    def is_score(self) -> bool:
        return self.guide is self.score


def guidance(space: Space, score: Score | None, guide: str, autocast: torch.dtype | None) -> Guidance:
    """What guides the search, and what decides in the end.

    Raises:
        ConfigError: there is neither a score nor calibration data.
    """
    calibration = space.calibration
    if score is None and calibration is None:
        raise ConfigError("there is nothing to score candidates with: pass score=, or calibration= for the fidelity")
    is_opaque = not isinstance(score, SampleScore)
    if score is not None and (guide == "score" or (guide == "auto" and is_opaque)):
        ready = score.in_parts() if isinstance(score, SampleScore) else score
        return Guidance("score", ready, ready)
    fidelity = _fidelity(space.model, score if isinstance(score, SampleScore) else calibration, autocast)
    return Guidance(FIDELITY, fidelity, fidelity if score is None else score)


def _fidelity(dense: nn.Module, data: SampleScore | Calibration | None, autocast: torch.dtype | None) -> Fidelity:
    if data is None:
        raise ConfigError("guide=fidelity needs inputs: a SampleScore as score=, or calibration=")
    held = data.batches.batches if isinstance(data.batches, Moved) else data.batches  # only what is drawn is moved
    parts = parts_of(list(held), GUIDE_SAMPLES)
    with precision(dense, autocast):
        return Fidelity(dense, parts, data.arguments)
