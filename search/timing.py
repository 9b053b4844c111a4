"""Latency in a search: the model that predicts it, and the measurements that verify the front."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from ..spaces import Plan, Space
from ..spaces.errors import StorageError, TargetError
from ..spaces.inputs import Inputs
from .files import read_json, write_json
from .fitting import TOGETHER, fit_latency
from .latency import LatencyModel, Measurements
from .measurement import Measurement, Settings, Target, side_by_side
from .pace import SLOWER, Pace
from .shapes import check_inputs, inputs_at
from .stairs import LEAST_WIDTHS, Stairs, stair_widths

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Timing:
    """Measures plans on one target. ``error``, ``most``, ``limit_s``: see :func:`.fitting.fit_latency`; ``settings``:
    of one measurement. ``cache``: a folder in which measured plans are kept for later searches. ``batch_size``,
    ``input_shapes``: what is measured instead of the example inputs, see :func:`.shapes.inputs_at`; of several shapes a
    model's time is the sum."""

    target: Target
    error: float = 0.05
    most: int = 64
    limit_s: float | None = None
    settings: Settings = field(default_factory=Settings)
    cache: Path | None = None
    batch_size: int | None = None
    input_shapes: Sequence[Sequence[int]] = ()
    pace: Pace = field(default_factory=Pace, compare=False)

    def check(self, model: nn.Module, inputs: Inputs) -> None:
        """Raises ConfigError where ``model`` cannot run on the shapes that are to be measured."""
        check_inputs(model, self._inputs(inputs))

    def model(
        self,
        space: Space,
        inputs: Inputs,
        refresh: bool = False,
        budget: Mapping[str, Any] | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> LatencyModel:
        """The latency model of ``space`` on the target, best near ``budget``.

        What was measured before, failures too, is not measured again. ``progress`` is told how many plans are known.

        Raises:
            TargetError: the target cannot measure the dense model, or too few candidates.
            ConfigError: see :meth:`check`.
        """
        self.check(space.model, inputs)
        path = self._path(space, inputs)
        known = None if refresh else self._read(path, space)
        if known is not None and known.measured:
            self.pace.expect(space.model, known.dense_ms)

        def keep(held: Measurements) -> None:
            if progress is not None:
                progress(len(held.measured))
            if path is not None:
                path.parent.mkdir(parents=True, exist_ok=True)
                write_json(path, {**held.to_json(), "target": dict(self.target.description)})

        return fit_latency(
            space,
            lambda plans: self.measured(space, inputs, plans),
            error=self.error,
            most=self.most,
            limit_s=self.limit_s,
            slower=self._slower,
            budget=budget,
            known=known,
            keep=keep,
        )

    def measured(self, space: Space, inputs: Inputs, plans: Sequence[Plan]) -> tuple[list[float | str], float | None]:
        """Times of plans relative to the dense model, or why one cannot be measured, and its milliseconds."""
        found: list[float | str] = []
        dense_ms: list[float] = []
        for start in range(0, len(plans), TOGETHER):
            batch = [space.slice(plan).eval() for plan in plans[start : start + TOGETHER]]
            for outcome in self._each(space.model, batch, self._inputs(inputs)):
                found.append(outcome if isinstance(outcome, str) else outcome.ratio)
                if isinstance(outcome, Measurement):
                    dense_ms.append(outcome.median_ms / outcome.ratio)
        return found, float(np.median(dense_ms)) if dense_ms else None

    def stairs(self, space: Space, inputs: Inputs) -> list[Stairs]:
        """Latency against the width of the most expensive dimension of every kind, see :mod:`.stairs`.

        Raises:
            TargetError: the target cannot measure the dense model, or too few candidates.
            ConfigError: see :meth:`check`.
        """
        self.check(space.model, inputs)
        found = []
        kinds = {name: groups[0].kind for name, groups in zip(space.dimensions, space.tied_groups, strict=True)}
        sizes = dict(zip(space.dimensions, space.sizes.tolist(), strict=True))
        for name, widths in stair_widths(space).items():
            # In random order: a machine that gets slower must not look like a slope.
            shuffled = np.random.default_rng(self.settings.seed).permutation(widths).tolist()
            outcomes, _ = self.measured(space, inputs, [space.plan({name: width}) for width in shuffled])
            ratios = {w: outcome for w, outcome in zip(shuffled, outcomes, strict=True) if not isinstance(outcome, str)}
            if len(ratios) < LEAST_WIDTHS:
                raise TargetError(f"only {len(ratios)} widths of {name} could be measured; the warnings above say why")
            kept = sorted(ratios)
            found.append(Stairs.of(kinds[name], name, sizes[name], kept, [ratios[width] for width in kept]))
        return found

    def verify(self, dense: nn.Module, candidate: nn.Module, inputs: Inputs) -> Measurement | None:
        """A candidate beside the dense model, twice as long as other measurements; None if it fails."""
        settings = replace(self.settings, tolerance=self.settings.tolerance / 2, limit_s=2 * self.settings.limit_s)
        try:
            return self._side_by_side([dense, candidate], self._inputs(inputs), settings)[1]
        except TargetError as error:
            logger.warning("a model of the front cannot be measured: %s", error)
            return None

    def _inputs(self, inputs: Inputs) -> list[Inputs]:
        return inputs_at(inputs, self.batch_size, self.input_shapes)

    def _side_by_side(
        self, models: Sequence[nn.Module], inputs: Sequence[Inputs], settings: Settings
    ) -> list[Measurement]:
        """The dense model comes first."""
        return self.pace.kept(models[0], lambda: side_by_side(models, inputs, self.target, settings), self._slower)

    @property
    def _slower(self) -> float:
        """Coarse measurements cannot tell a pace better than they are."""
        return max(SLOWER, self.settings.tolerance)

    def _each(self, dense: nn.Module, batch: Sequence[nn.Module], inputs: Sequence[Inputs]) -> list[Measurement | str]:
        """All at once; one by one where that fails, so that a single candidate's failure excludes only that one."""
        try:
            return [*self._side_by_side([dense, *batch], inputs, self.settings)[1:]]
        except TargetError as error:
            if len(batch) == 1:
                logger.warning("a plan is left out of the latency model: %s", error)
                self._side_by_side([dense], inputs, self.settings)  # the target itself must work
                return [str(error)]
        return [found for candidate in batch for found in self._each(dense, [candidate], inputs)]

    def _path(self, space: Space, inputs: Inputs) -> Path | None:
        if self.cache is None:
            return None
        shapes = [[[list(tensor.shape), str(tensor.dtype)] for tensor in one.tensors()] for one in self._inputs(inputs)]
        target, precision = dict(self.target.description), self.settings.tolerance
        described = json.dumps([space.fingerprint, target, precision, shapes, os.uname().nodename])
        return self.cache / f"{hashlib.sha256(described.encode()).hexdigest()[:16]}.json"

    def _read(self, path: Path | None, space: Space) -> Measurements | None:
        if path is None or not path.exists():
            return None
        try:
            known = Measurements.from_json(read_json(path), len(space.dimensions))
        except (StorageError, KeyError, TypeError, ValueError):
            logger.warning("%s is damaged and is measured again", path)
            return None
        logger.info("%d measured plans are taken from %s", len(known.measured), path)
        return known
