"""Backward elimination: what is missed least when the consumers' remaining weights are fitted again."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import numpy as np
import torch

from ..calibration import Moments
from ..groups import Group
from ..least_squares import as_matrix, covariance
from ..units import columns, positions
from .activations import activation_of, consumers_of
from .blocks import adds_itself
from .evidence import Evidence, Scores

logger = logging.getLogger(__name__)

#: Down to this many units one is removed at a time; before, one of so many at once.
ONE_BY_ONE, SHARE = 64, 32
#: From so many times as many candidates.
CANDIDATES = 2


@dataclass
class Problem:
    """One consumer of a group with ``u`` units left, of ``c`` columns each: what it takes to know the next loss.

    ``weight (out, u, c)``: fitted to the units left. ``inverse (u x c, u x c)``: of the moments of what is left.
    Columns of other groups stay; the inverse has taken them into account. ``energy``: of the dense output.
    """

    weight: torch.Tensor
    inverse: torch.Tensor
    energy: float

    def losses(self) -> torch.Tensor:
        """Growth of the output's squared error by the loss of each unit, relative to the energy: ``(u,)``."""
        shape = self.weight.shape[1:]
        blocks = self.inverse.view(*shape, *shape).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
        factors = torch.linalg.cholesky(blocks)
        solved = torch.linalg.solve_triangular(factors, self.weight.permute(1, 2, 0), upper=False)
        return solved.square().sum((1, 2)) / self.energy

    def of(self, units: torch.Tensor) -> Problem:
        """The same of ``units`` alone, while all others stay."""
        places = self._columns(units)
        weight = self.weight[:, units.to(self.weight.device)]
        return Problem(_square(weight), self.inverse[places[:, None], places], self.energy)

    def remove(self, gone: torch.Tensor, left: torch.Tensor) -> None:
        """Fit the units ``left`` to make up for ``gone``; both are indices among the units."""
        removed, rest = self._columns(gone), self._columns(left)
        factor = torch.linalg.cholesky(self.inverse[removed[:, None], removed])
        across = torch.linalg.solve_triangular(factor, self.inverse[removed[:, None], rest], upper=False)
        weight = self.weight.flatten(1)
        lost = torch.linalg.solve_triangular(factor, weight[:, removed].T, upper=False)
        self.inverse = self.inverse[rest[:, None], rest].addmm_(across.T, across, alpha=-1)
        fitted = weight[:, rest].addmm_(lost.T, across, alpha=-1)
        self.weight = fitted.view(len(weight), len(left), -1)

    def _columns(self, units: torch.Tensor) -> torch.Tensor:
        return columns(units[:, None], self.weight.shape[2]).flatten().to(self.weight.device)


def reconstruction(evidence: Evidence) -> list[Scores]:
    """The step at which backward elimination removes a unit.

    Again and again the unit goes whose removal changes the dense output of its consumers least when their remaining
    weights are fitted again: Optimal Brain Surgeon (Hassibi & Stork 1992) on the least-squares problem of one layer
    (Frantar & Alistarh 2022, Optimal Brain Compression), a unit at a time (Kurtic et al. 2023, ZipLM). With moments
    ``H^-1 = C + ridge`` as in :mod:`.least_squares` and ``u`` the columns of a unit, its loss and the new weights are

        tr(W_u (H_uu)^-1 W_u^T),    W - W_u (H_uu)^-1 H_u:,    H - H_:u (H_uu)^-1 H_u:.

    Losses of several consumers add up, each relative to the energy ``tr(W C W^T)`` of its output. This differs from
    ZipLM in that of more than 64 units a thirty-second goes at a time, chosen among twice as many.

    Of blocks: the energy of the branch relative to that of the output; of branches: to that of the stream.
    ``activation`` of groups without a consumer whose moments fit in memory.
    """
    return [_of_group(evidence, index) for index in range(len(evidence.structure.groups))]


def _of_group(evidence: Evidence, index: int) -> Scores:
    group = evidence.structure.groups[index]
    if group.blocks:
        return np.array([_of_block(evidence, group, unit) for unit in range(group.size)])
    moments = {name: evidence.statistics.moments[name] for name in consumers_of(evidence, index)}
    problems = [_problem(evidence, name, m, index) for name, m in moments.items() if m.is_whole]
    if not problems:
        logger.info("%s: there are no moments of its units: scored by the criterion 'activation'", group.name)
        return activation_of(evidence, index)
    return _elimination(problems, group.size)


def _elimination(problems: list[Problem], size: int) -> Scores:
    """``problems`` are used up."""
    units, scores, step = torch.arange(size), np.zeros(size), 0
    while len(units):
        gone = _next(problems, len(units))
        scores[units[gone].numpy()] = step + np.arange(len(gone))
        step += len(gone)
        units = _remove(problems, gone, units)
    return scores


def _next(problems: list[Problem], size: int) -> torch.Tensor:
    """Which of ``size`` units go next, in this order.

    Losses of a few candidates after a removal among them follow from the candidates alone: on small matrices they are
    eliminated one by one, so that of two units that can replace each other one stays.
    """
    order = torch.argsort(_losses(problems), stable=True)
    if size <= ONE_BY_ONE:
        return order[:1]
    count = size // SHARE
    candidates = order[: CANDIDATES * count]
    parts, left, gone = [problem.of(candidates) for problem in problems], candidates, []
    for _ in range(count):
        first = torch.argmin(_losses(parts))[None]
        gone.append(left[first])
        left = _remove(parts, first, left)
    return torch.cat(gone)


def _losses(problems: list[Problem]) -> torch.Tensor:
    return torch.stack([problem.losses().cpu() for problem in problems]).sum(0)


def _remove(problems: list[Problem], gone: torch.Tensor, units: torch.Tensor) -> torch.Tensor:
    """Remove the units at ``gone`` from the problems; ``units`` without them."""
    stays = torch.ones(len(units), dtype=torch.bool)
    stays[gone] = False
    for problem in problems if stays.any() else ():
        problem.remove(gone, stays.nonzero().flatten())
    return units[stays]


def _problem(evidence: Evidence, name: str, moments: Moments, index: int) -> Problem:
    weight = evidence.model.get_parameter(name).detach()
    dense, among = as_matrix(weight, moments).double(), covariance(moments)
    places = positions(evidence.structure, name, moments.in_dim, index)
    places = columns(places, dense.shape[1] // weight.shape[moments.in_dim]).to(dense.device)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(among))
    energy = float(((dense @ among) * dense).sum())
    flat = places.flatten()
    return Problem(_square(dense[:, places]), inverse[flat[:, None], flat], max(energy, 1e-30))


def _square(weight: torch.Tensor) -> torch.Tensor:
    """A weight of at most ``u x c`` rows with the ``W^T W`` of ``weight (out, u, c)``, on which alone losses depend."""
    rows, *shape = weight.shape
    return weight if rows <= np.prod(shape) else torch.linalg.qr(weight.flatten(1), mode="r").R.view(-1, *shape)


def _of_block(evidence: Evidence, group: Group, unit: int) -> float:
    moments = evidence.blocks[group.blocks[unit]]
    if adds_itself(group, unit):
        return moments.change / max(moments.output, 1e-30)
    return moments.output / max(moments.stream, 1e-30)
