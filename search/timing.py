"""Latency in a search: the model that predicts it, and the measurements that verify the front."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from ..spaces import Plan, Space
from ..spaces.errors import StorageError, TargetError
from ..spaces.inputs import Inputs
from .latency import LatencyModel, Measured, fit_latency
from .measurement import Measurement, Settings, Target, side_by_side
from .saved import read_json, write_json

logger = logging.getLogger(__name__)

#: Models that are timed side by side: more would wait for each other, fewer repeat the dense one for nothing.
TOGETHER = 4


@dataclass(frozen=True)
class Timing:
    """Measures plans on one target. ``error``, ``most``, ``limit_s``: see :func:`.latency.fit_latency`; ``settings``:
    of one measurement. ``cache``: a folder in which measured plans are kept for later searches."""

    target: Target
    error: float = 0.05
    most: int = 64
    limit_s: float | None = None
    settings: Settings = field(default_factory=Settings)
    cache: Path | None = None

    def model(self, space: Space, inputs: Inputs, refresh: bool = False) -> LatencyModel:
        """The latency model of ``space`` on the target; plans that were measured before are not measured again.

        Raises:
            TargetError: the target cannot measure the dense model, or no candidate.
        """
        path = self._path(space, inputs)
        known, dense_ms = ([], 0.0) if refresh else self._read(path, space)

        def keep(model: LatencyModel) -> None:
            if path is not None:
                path.parent.mkdir(parents=True, exist_ok=True)
                write_json(path, {**model.to_json(), "target": dict(self.target.description)})

        return fit_latency(
            space,
            lambda plans: self.ratios(space, inputs, plans),
            error=self.error,
            most=self.most,
            limit_s=self.limit_s,
            known=known,
            known_ms=dense_ms,
            keep=keep,
        )

    def ratios(self, space: Space, inputs: Inputs, plans: Sequence[Plan]) -> tuple[list[float], float]:
        """Times of plans relative to the dense model, NaN of those that cannot be measured, and its milliseconds."""
        found: list[float] = []
        dense_ms: list[float] = []
        for start in range(0, len(plans), TOGETHER):
            batch = [space.slice(plan).eval() for plan in plans[start : start + TOGETHER]]
            for measurement in self._each(space.model, batch, inputs):
                found.append(float("nan") if measurement is None else measurement.ratio)
                if measurement is not None:
                    dense_ms.append(measurement.median_ms / measurement.ratio)
        if plans and not dense_ms:
            raise TargetError("no candidate could be measured; the warnings above say why")
        return found, float(np.median(dense_ms)) if dense_ms else 0.0

    def verify(self, dense: nn.Module, candidate: nn.Module, inputs: Inputs) -> Measurement | None:
        """A candidate beside the dense model, twice as long as other measurements; None if it fails."""
        settings = replace(self.settings, tolerance=self.settings.tolerance / 2, limit_s=2 * self.settings.limit_s)
        try:
            return side_by_side([dense, candidate], inputs, self.target, settings)[1]
        except TargetError as error:
            logger.warning("a model of the front cannot be measured: %s", error)
            return None

    def _each(self, dense: nn.Module, batch: Sequence[nn.Module], inputs: Inputs) -> list[Measurement | None]:
        """All at once; one by one where that fails, so that a single candidate's failure excludes only that one."""
        try:
            return [*side_by_side([dense, *batch], inputs, self.target, self.settings)[1:]]
        except TargetError as error:
            if len(batch) == 1:
                logger.warning("a plan is left out of the latency model: %s", error)
                side_by_side([dense], inputs, self.target, self.settings)  # the target itself must work
                return [None]
        return [found for candidate in batch for found in self._each(dense, [candidate], inputs)]

    def _path(self, space: Space, inputs: Inputs) -> Path | None:
        if self.cache is None:
            return None
        shapes = [[list(tensor.shape), str(tensor.dtype)] for tensor in inputs.tensors()]
        described = json.dumps([space.fingerprint, dict(self.target.description), shapes, os.uname().nodename])
        return self.cache / f"{hashlib.sha256(described.encode()).hexdigest()[:16]}.json"

    def _read(self, path: Path | None, space: Space) -> tuple[list[Measured], float]:
        if path is None or not path.exists():
            return [], 0.0
        try:
            held = read_json(path)
            known = [_measured(entry, space) for entry in held["measured"]]
            logger.info("%d measured plans are taken from %s", len(known), path)
            return known, float(held["dense_ms"])
        except (StorageError, KeyError, TypeError, ValueError):
            logger.warning("%s is damaged and is measured again", path)
            return [], 0.0


def _measured(entry: Any, space: Space) -> Measured:
    widths, ratio = tuple(int(width) for width in entry[0]), float(entry[1])
    if len(widths) != len(space.dimensions) or not ratio > 0:
        raise ValueError(f"not a measured plan of this space: {entry!r}")
    return Measured(widths, ratio)
