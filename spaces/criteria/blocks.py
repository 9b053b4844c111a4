"""What residual blocks and branches are given and what they make of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ..calibration import Calibration
from ..groups import Group, Structure
from ..residual import first_tensor
from ..trace import evaluating


@dataclass
class BlockMoments:
    """Sums over all positions: squared norms, and how far the output turns away from the input."""

    output: float = 0.0
    #: Of output minus input.
    change: float = 0.0
    #: Of what the module around it was given: the stream that a branch is added to.
    stream: float = 0.0
    #: 1 - cosine similarity.
    turn: float = 0.0
    positions: int = 0


def adds_itself(group: Group, unit: int) -> bool:
    """Whether the block's output is its input plus a branch; else its output is the branch."""
    return group.substitutes is None or group.substitutes[unit].skip


@contextmanager
def block_calls(
    model: nn.Module, names: Iterable[str], record: Callable[[str, torch.Tensor, torch.Tensor], None]
) -> Iterator[None]:
    """Hand ``record`` the name, a copy of the first input and the first output of every call of the modules."""
    inputs: dict[str, torch.Tensor] = {}

    def enter(name: str, module: nn.Module, args: Any, kwargs: Any) -> None:
        if (x := first_tensor([args, kwargs])) is not None:
            inputs[name] = x.detach().clone()  # a block may rectify or add to it in place

    def leave(name: str, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        x, y = inputs.pop(name, None), first_tensor(output)
        if x is not None and y is not None and x.shape == y.shape:
            record(name, x, y)

    with ExitStack() as hooks:
        for name in names:
            module = model.get_submodule(name)
            hooks.callback(module.register_forward_pre_hook(partial(enter, name), with_kwargs=True).remove)
            hooks.callback(module.register_forward_hook(partial(leave, name), with_kwargs=True).remove)
        yield


def block_moments(model: nn.Module, structure: Structure, calibration: Calibration) -> dict[str, BlockMoments]:
    """One pass of ``calibration`` over ``model``: moments by the name of the block."""
    moments = {block: BlockMoments() for group in structure.groups for block in group.blocks}
    parents = {block.rpartition(".")[0] for block in moments}
    streams: dict[str, tuple[torch.Size, float]] = {}

    def keep_stream(name: str, module: nn.Module, args: Any, kwargs: Any) -> None:
        if (x := first_tensor([args, kwargs])) is not None:
            streams[name] = x.shape, _energy(x.detach().float())

    def record(name: str, x: torch.Tensor, y: torch.Tensor) -> None:
        x, y = x.float(), y.detach().float()
        shape, stream = streams.get(name.rpartition(".")[0], (None, 0.0))
        found = moments[name]
        found.output += _energy(y)
        found.change += _energy(y - x)
        found.stream += stream if shape == x.shape else _energy(x)
        turn = _turn(x, y, _feature_dim(model.get_submodule(name), x))
        found.turn += float(turn.sum(dtype=torch.float64))
        found.positions += turn.numel()

    with ExitStack() as hooks, evaluating(model), torch.no_grad(), calibration.precision(model):
        for parent in parents if moments else ():
            module = model.get_submodule(parent)
            hooks.callback(module.register_forward_pre_hook(partial(keep_stream, parent), with_kwargs=True).remove)
        hooks.enter_context(block_calls(model, moments, record))
        for inputs in calibration if moments else ():
            inputs.call(model)
    return moments


def _energy(x: torch.Tensor) -> float:
    return float(x.square().sum(dtype=torch.float64))


def _turn(x: torch.Tensor, y: torch.Tensor, dim: int) -> torch.Tensor:
    """Where both vectors are zero, nothing has turned."""
    turn = (1 - F.cosine_similarity(x, y, dim)).clamp_(min=0)
    return turn * (x.any(dim) | y.any(dim))


def _feature_dim(block: nn.Module, x: torch.Tensor) -> int:
    """1 for blocks with a convolution over what they are given, else the last."""
    convolutions = (m for m in block.modules() if isinstance(m, nn.modules.conv._ConvNd))
    return 1 if x.dim() > 2 and any(m.in_channels == x.shape[1] for m in convolutions) else -1
