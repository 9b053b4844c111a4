"""Repair the consumers of what a plan removes, from moments of the dense model: no data is read for a candidate.

Least squares: the weights that give back most of a consumer's dense output from the kept inputs (He et al. 2017,
Channel Pruning for Accelerating Very Deep Neural Networks; its reconstruction, in closed form). With moments
``C = cov(x)``, kept columns ``S`` and removed ones ``R`` the fit, with a ridge towards the kept weights, is

    W' = W_S + W_R C_RS (C_SS + ridge)^-1 = M_S L_SS^-1,    L L^T = C + ridge,    M = W L,

and since a prefix of the order of importance is a leading block of the Cholesky factor ``L`` and of its inverse, one
factor serves every width: a candidate is one matrix product a consumer.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from .calibration import Moments, Statistics
from .consumers import matrix, tensor_like
from .groups import Kept, Structure, groups_in
from .surgery import kept_elements, tensors_of
from .units import columns, positions

#: The least ridge, and how it grows with the columns a sample: a fit to few samples must not follow their noise.
RIDGE, RIDGE_A_SAMPLE = 1e-3, 0.1

#: For every group the place of each unit in an order of importance.
Ranks = Sequence[NDArray[np.integer]]


@dataclass
class Factor:
    """``inverse`` of the Cholesky factor, and ``product (out, kernel, columns)`` of weights and factor, columns in the
    order of importance; ``place`` tells where each one stands."""

    place: torch.Tensor
    inverse: torch.Tensor
    product: torch.Tensor


class ConsumerFits:
    """Fits the consumers of one model to plans that are prefixes of one order, or any other.

    Without ``weights`` only means are repaired, where a bias or a BatchNorm takes them up.
    """

    def __init__(self, model: nn.Module, structure: Structure, statistics: Statistics, weights: bool = True) -> None:
        self.structure, self.statistics, self.weights = structure, statistics, weights
        self._tensors = tensors_of(model)
        #: By parameter, group and order; with the order, so that its id is not used again.
        self._factors: dict[tuple[str, int, int], tuple[Factor, Ranks]] = {}

    def __call__(self, kept: Kept, ranks: Ranks | None = None) -> dict[str, torch.Tensor]:
        """Values that take the place of slices of parameters and buffers, by name.

        ``ranks``: the order of importance that ``kept`` is a prefix of; the same object for all plans of one order.
        """
        replaced: dict[str, torch.Tensor] = {}
        for name, moments in self.statistics.moments.items():
            gone = any(not kept[group][unit] for group, unit in self.structure.owners[name])
            layout = self.structure.tensors[name][moments.in_dim]
            groups = [group for group in groups_in(layout) if not kept[group].all()]
            if groups and not gone:
                replaced |= self._repaired(name, moments, kept, groups, ranks)
        return replaced

    def _repaired(
        self, name: str, moments: Moments, kept: Kept, groups: list[int], ranks: Ranks | None
    ) -> dict[str, torch.Tensor]:
        weight = self._tensors[name].detach()
        inputs = torch.from_numpy(kept_elements(self.structure, kept, name, moments.in_dim)).to(weight.device)
        outputs = torch.from_numpy(kept_elements(self.structure, kept, name, moments.out_dim)).to(weight.device)
        places = columns(inputs[:, None], moments.columns // weight.shape[moments.in_dim]).flatten()
        repaired = {}

        @functools.cache
        def dense() -> torch.Tensor:  # a prefix without a constant is fitted without it
            return as_matrix(weight.index_select(moments.out_dim, outputs), moments)

        if not (self.weights and moments.is_whole):
            fitted = dense()[:, places]
        else:
            if len(groups) == 1 and ranks is not None:
                fitted = factor_fit(self._factor(name, moments, groups[0], ranks), places, outputs)
            else:
                fitted = plain_fit(dense(), places, covariance(moments))
            repaired[name] = _as_tensor(fitted, weight, moments, len(outputs)).to(weight.dtype)
        if moments.shift is not None:
            means = moments.means.float()
            change = (dense().float() @ means - fitted.float() @ means[places]).view(len(outputs), -1).sum(1)
            target, sign = moments.shift
            held = self._tensors[target].detach()[outputs]
            repaired[target] = (held.float() + sign * change).to(held.dtype)
        return repaired

    def _factor(self, name: str, moments: Moments, group: int, ranks: Ranks) -> Factor:
        key = (name, group, id(ranks))
        if key not in self._factors:
            order = self._order(name, moments, group, ranks[group])
            factor = torch.linalg.cholesky(covariance(moments)[order][:, order])
            identity = torch.eye(len(factor), dtype=factor.dtype, device=factor.device)
            inverse = torch.linalg.solve_triangular(factor, identity, upper=False)
            weight = self._tensors[name].detach()
            product = as_matrix(weight, moments)[:, order].double() @ factor
            product = product.view(weight.shape[moments.out_dim], -1, len(order))
            self._factors[key] = Factor(torch.argsort(order), inverse.float(), product.float()), ranks
        return self._factors[key][0]

    def _order(self, name: str, moments: Moments, group: int, rank: NDArray[np.integer]) -> torch.Tensor:
        """Columns by the rank of their unit of ``group``; what is not of the group comes first: it always stays."""
        ranks = column_ranks(self.structure, name, self._tensors[name], moments, group, rank)
        return torch.from_numpy(np.argsort(ranks, kind="stable")).to(moments.means.device)


def column_ranks(
    structure: Structure, name: str, weight: torch.Tensor, moments: Moments, group: int, rank: NDArray[np.integer]
) -> NDArray[np.int64]:
    """The rank of the unit of ``group`` that every column of ``weight`` is of; -1 for those of none."""
    channels = weight.shape[moments.in_dim]
    kernel = moments.columns // channels
    ranks = np.full(channels * kernel, -1)
    ranks[columns(positions(structure, name, moments.in_dim, group), kernel).numpy()] = rank[:, None]
    return ranks


def lost_outputs(
    model: nn.Module, structure: Structure, statistics: Statistics, ranks: Ranks
) -> list[NDArray[np.float64] | None]:
    """By group, the share of its consumers' outputs that no fit gives back, for every width ``(size + 1,)``.

    Shares of the energy (second moments) of the dense outputs, on average over the consumers; None for groups without
    a consumer whose moments are known and that no other group reaches. ``ranks``: of units in the order of importance.
    """
    tensors = tensors_of(model)
    found: list[list[NDArray[np.float64]]] = [[] for _ in structure.groups]
    for name, moments in statistics.moments.items():
        groups = list(groups_in(structure.tensors[name][moments.in_dim]))
        if len(groups) != 1 or not moments.is_whole:
            continue
        (group,), weight = groups, tensors[name].detach()
        places = column_ranks(structure, name, weight, moments, group, ranks[group])
        order = np.argsort(places, kind="stable")
        by_order = torch.from_numpy(order).to(moments.means.device)
        factor = torch.linalg.cholesky(covariance(moments)[by_order][:, by_order])
        # Columns of the factor are what each column adds to the ones before it.
        added = (as_matrix(weight, moments)[:, by_order].double() @ factor).square().sum(0).cpu().numpy()
        size = structure.groups[group].size
        by_unit = np.bincount(places[order] + 1, weights=added, minlength=size + 1)
        found[group].append(np.append(np.cumsum(by_unit[:0:-1])[::-1], 0.0) / max(by_unit.sum(), 1e-30))
    return [np.mean(curves, axis=0) if curves else None for curves in found]


def factor_fit(factor: Factor, columns: torch.Tensor, outputs: torch.Tensor) -> torch.Tensor:
    """The fit of a prefix: ``(outputs x kernel, columns)``."""
    width = len(columns)
    rows = factor.product[:, :, :width][outputs].reshape(-1, width)
    return (rows @ factor.inverse[:width, :width])[:, factor.place[columns]]


def plain_fit(dense: torch.Tensor, columns: torch.Tensor, covariance: torch.Tensor) -> torch.Tensor:
    """The fit of any columns of ``dense (rows, all columns)``: ``(rows, columns)``."""
    removed = torch.ones(len(covariance), dtype=torch.bool, device=covariance.device)
    removed[columns] = False
    factor = torch.linalg.cholesky(covariance[columns][:, columns])
    moment = covariance[columns][:, removed] @ dense[:, removed].double().T
    return dense[:, columns].float() + torch.cholesky_solve(moment, factor).T.float()


def as_matrix(weight: torch.Tensor, moments: Moments) -> torch.Tensor:
    """``(out, columns)``, or by channel ``(out x kernel, in)``."""
    values = matrix(weight, moments.in_dim, moments.out_dim)
    if not moments.by_channel:
        return values
    channels = weight.shape[moments.in_dim]
    return values.view(len(values), channels, -1).transpose(1, 2).reshape(-1, channels)


def _as_tensor(values: torch.Tensor, weight: torch.Tensor, moments: Moments, outputs: int) -> torch.Tensor:
    if moments.by_channel:
        values = values.view(outputs, -1, values.shape[1]).transpose(1, 2).reshape(outputs, -1)
    return tensor_like(values, weight, moments.in_dim, moments.out_dim).contiguous()


def ridge(columns: int, samples: int) -> float:
    """The ridge relative to the mean of the diagonal of the second moments."""
    return max(RIDGE, RIDGE_A_SAMPLE * columns / samples)


def covariance(moments: Moments) -> torch.Tensor:
    """With the ridge, ``(columns, columns)``. About zero where no constant is taken up elsewhere."""
    gram = moments.covariance
    if moments.shift is None:
        gram = gram + torch.outer(moments.means, moments.means)
    share = ridge(moments.columns, moments.samples)
    gram.diagonal().add_(share * gram.diagonal().mean() + torch.finfo(torch.float32).tiny)
    return gram
