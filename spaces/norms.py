"""BatchNorm as quick as memory allows, on the processor.

torch's kernels for images in the channels-last format go over one position's channels at a time, which a pruned layer
has few of, and an odd number: 10 channels take four times as long as the memory they fill. Here the channels of many
positions stand side by side as if they were channels of their own, so that whole vectors are processed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from .consumers import batch_norm_arguments

#: Values that stand side by side at most.
MOST_VALUES = 1024
#: Numbers that the processor takes at once.
LANES = 16


class QuickNorms(TorchFunctionMode):
    """Runs BatchNorm by :func:`batch_norm`; the numbers are the same in evaluation."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {})


def run(func: Any, args: Any, kwargs: Mapping[str, Any]) -> Any:
    """``func(*args, **kwargs)``, by :func:`batch_norm` if it is one: for modes that see every function already."""
    norm = batch_norm_arguments(func, args, kwargs)
    return func(*args, **kwargs) if norm is None else batch_norm(**norm)


def batch_norm(**norm: Any) -> torch.Tensor:
    """``F.batch_norm`` with running statistics, by the names of its arguments."""
    positions = _positions_side_by_side(norm["input"], norm["training"])
    if positions == 1:
        return F.batch_norm(**norm)
    x: torch.Tensor = norm["input"]
    rows = x.movedim(1, -1).reshape(-1, positions * x.shape[1])
    mean, variance = norm["running_mean"], norm["running_var"]
    if norm["training"]:
        mean, variance = _statistics(rows, positions)
        _update(norm, mean, variance, x.numel() // x.shape[1])
    weight, bias = (None if norm[name] is None else norm[name].repeat(positions) for name in ("weight", "bias"))
    result = F.batch_norm(rows, mean.repeat(positions), variance.repeat(positions), weight, bias, eps=norm["eps"])
    batch, channels, *space = x.shape
    return result.view(batch, *space, channels).movedim(-1, 1)


def _positions_side_by_side(x: torch.Tensor, training: bool) -> int:
    """How many; 1 where torch's own way is as good, or gradients are asked for."""
    is_slow = x.dtype in (torch.bfloat16, torch.float16) or (training and x.dtype == torch.float32)
    if (
        not is_slow
        or x.device.type != "cpu"
        or x.dim() != 4
        or x.shape[1] >= 4 * LANES
        or (x.shape[1] > LANES and x.shape[1] % LANES == 0)
        or torch.is_grad_enabled()
        or not x.is_contiguous(memory_format=torch.channels_last)
    ):
        return 1
    total, positions = x.numel() // x.shape[1], 1
    # One row of all positions would have no variance of its own.
    while 2 * positions * x.shape[1] <= MOST_VALUES and total % (2 * positions) == 0 and total > 2 * positions:
        positions *= 2
    return positions


def _statistics(rows: torch.Tensor, positions: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and (biased) variance of every channel, float32: those of the positions put together."""
    means = rows.new_zeros(rows.shape[1], dtype=torch.float32)
    variances = torch.ones_like(means)
    torch.batch_norm_update_stats(rows, means, variances, momentum=1.0)
    means, variances = means.view(positions, -1), variances.view(positions, -1) * (1 - 1 / len(rows))
    return means.mean(0), variances.mean(0) + means.var(0, correction=0)


def _update(norm: Mapping[str, Any], mean: torch.Tensor, variance: torch.Tensor, count: int) -> None:
    """What training does to the running statistics; in torch's own way, which stays infinite where a sum overflows."""
    momentum = norm["momentum"]
    for name, found in (("running_mean", mean), ("running_var", variance * (count / (count - 1)))):
        norm[name].mul_(1 - momentum).add_(found.to(norm[name].dtype), alpha=momentum)
