"""Repair the consumers of what a plan removes, from moments of the dense model: no data is read for a candidate.

Least squares: the weights that give back most of a consumer's dense output from the kept inputs (He et al. 2017, Channel
Pruning for Accelerating Very Deep Neural Networks, whose reconstruction is solved here in closed form). With moments
``C = cov(x)``, kept columns ``S`` and removed ones ``R`` the fit, with a ridge towards the kept weights, is

    W' = W_S + W_R C_RS (C_SS + ridge)^-1 = M_S L_SS^-1,    L L^T = C + ridge,    M = W L,

and since a prefix of the order of importance is a leading block of the Cholesky factor ``L`` and of its inverse, one factor
serves every width: a candidate is one matrix product a consumer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from .calibration import Moments, Statistics
from .consumers import matrix, tensor_like
from .groups import Kept, Structure
from .surgery import kept_elements, tensors_of

#: Relative to the mean of the diagonal of the covariance.
RIDGE = 1e-3

Units = NDArray[np.integer]


@dataclass
class Factor:
    """``order``: columns in the order of importance; ``inverse`` of the factor, and the product of weights and factor."""

    order: torch.Tensor
    place: torch.Tensor
    inverse: torch.Tensor
    product: torch.Tensor


class Compensation:
    """Fits the consumers of one model. ``method``: ``bias`` or ``least_squares``.

    ``ranks``: for every group the place of each unit in the order of importance.
    """

    def __init__(
        self, model: nn.Module, structure: Structure, statistics: Statistics, method: str, ranks: Sequence[Units]
    ) -> None:
        self.structure, self.statistics, self.method, self.ranks = structure, statistics, method, ranks
        self._tensors = tensors_of(model)
        self._factors: dict[tuple[str, int], Factor] = {}

    def __call__(self, kept: Kept) -> dict[str, torch.Tensor]:
        """Values that take the place of slices of parameters and buffers, by name."""
        replaced: dict[str, torch.Tensor] = {}
        for name, moments in self.statistics.moments.items():
            gone = any(not kept[group][unit] for group, unit in self.structure.owners[name])
            groups = self._pruned_groups(name, moments, kept)
            if groups and not gone:
                self._repair(name, moments, kept, groups, replaced)
        return replaced

    def _pruned_groups(self, name: str, moments: Moments, kept: Kept) -> list[int]:
        layout = self.structure.tensors[name][moments.in_dim]
        return sorted({factor for term in layout for factor in term if factor >= 0 and not kept[factor].all()})

    def _repair(
        self,
        name: str,
        moments: Moments,
        kept: Kept,
        groups: list[int],
        replaced: dict[str, torch.Tensor],
    ) -> None:
        weight = self._tensors[name].detach()
        device = weight.device
        inputs = torch.from_numpy(kept_elements(self.structure, kept, name, moments.in_dim)).to(device)
        outputs = torch.from_numpy(kept_elements(self.structure, kept, name, moments.out_dim)).to(device)
        columns = _columns(inputs, weight.shape[moments.in_dim], len(moments.sums))
        dense = _as_matrix(weight.index_select(moments.out_dim, outputs), moments)
        if self.method == "least_squares" and moments.gram is not None:
            fitted = self._fit(name, moments, kept, groups, dense, outputs, columns)
            replaced[name] = _as_tensor(fitted, weight, moments, len(outputs)).to(weight.dtype)
        else:
            fitted = dense[:, columns]
        if moments.shift is not None:
            means = (moments.sums / moments.samples).float()
            change = (dense.float() @ means - fitted.float() @ means[columns]).view(len(outputs), -1).sum(1)
            target, sign = moments.shift
            held = self._tensors[target].detach()[outputs]
            replaced[target] = (held.float() + sign * change).to(held.dtype)

    def _fit(
        self,
        name: str,
        moments: Moments,
        kept: Kept,
        groups: list[int],
        dense: torch.Tensor,
        outputs: torch.Tensor,
        columns: torch.Tensor,
    ) -> torch.Tensor:
        if len(groups) == 1 and _is_prefix(kept[groups[0]], self.ranks[groups[0]]):
            factor = self._factor(name, moments, groups[0])
            product = factor.product.view(-1, len(dense) // len(outputs), factor.product.shape[1])
            width = len(columns)
            rows = product[outputs][:, :, :width].reshape(-1, width)
            return (rows @ factor.inverse[:width, :width])[:, factor.place[columns]]
        gram = _covariance(moments)
        removed = torch.ones(len(gram), dtype=torch.bool, device=gram.device)
        removed[columns] = False
        among = torch.linalg.cholesky(gram[columns][:, columns])
        change = torch.cholesky_solve(gram[columns][:, removed] @ dense[:, removed].double().T, among).T
        return dense[:, columns] + change.float()

    def _factor(self, name: str, moments: Moments, group: int) -> Factor:
        key = (name, group)
        if key not in self._factors:
            weight = self._tensors[name].detach()
            order = self._order(name, moments, group, self.ranks[group])
            factor = torch.linalg.cholesky(_covariance(moments)[order][:, order])
            identity = torch.eye(len(factor), dtype=factor.dtype, device=factor.device)
            inverse = torch.linalg.solve_triangular(factor, identity, upper=False)
            product = _as_matrix(weight, moments)[:, order].double() @ factor
            self._factors[key] = Factor(order, torch.argsort(order), inverse.float(), product.float())
        return self._factors[key]

    def _order(self, name: str, moments: Moments, group: int, rank: Units) -> torch.Tensor:
        """Columns by the rank of their unit of ``group``; what is not of the group comes first: it always stays."""
        ranks = []
        for term in self.structure.tensors[name][moments.in_dim]:
            shape = [self.structure.groups[f].size if f >= 0 else -f for f in term]
            values = np.full(shape, -1, dtype=np.int64)
            if group in term:
                values[...] = rank.reshape([-1 if f == group else 1 for f in term])
            ranks.append(values.reshape(-1))
        elements = torch.from_numpy(np.concatenate(ranks))
        kernel = len(moments.sums) // len(elements)
        order = torch.argsort(elements.repeat_interleave(kernel), stable=True)
        return order.to(moments.sums.device)


def _is_prefix(mask: NDArray[np.bool_], rank: Units) -> bool:
    return bool((rank[mask] < mask.sum()).all())


def _columns(inputs: torch.Tensor, dense_inputs: int, columns: int) -> torch.Tensor:
    kernel = columns // dense_inputs
    if kernel == 1:
        return inputs
    return (inputs[:, None] * kernel + torch.arange(kernel, device=inputs.device)).reshape(-1)


def _as_matrix(weight: torch.Tensor, moments: Moments) -> torch.Tensor:
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


def _covariance(moments: Moments) -> torch.Tensor:
    """With the ridge. Centred where a constant is taken up elsewhere."""
    assert moments.gram is not None
    gram = moments.gram[:-1, :-1] / moments.samples
    if moments.shift is not None:
        means = moments.gram[:-1, -1] / moments.samples
        gram = gram - torch.outer(means, means)
    gram.diagonal().add_(RIDGE * gram.diagonal().mean() + torch.finfo(torch.float32).tiny)
    return gram
