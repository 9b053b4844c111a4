"""Where weights meet activations: the calls of a forward pass in which a parameter multiplies its input.

A *consumer* is a parameter of a linear map: a linear layer, a convolution without groups, or a matrix product with a
parameter. Its *columns* are the elements of its input that one output depends on: ``in`` for a linear layer, ``in x
kernel`` for a convolution, in the order of ``weight.reshape(out, -1)``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode

_CONVOLUTIONS = (F.conv1d, F.conv2d, F.conv3d)
_CONV_NAMES = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")


@dataclass(frozen=True)
class Window:
    """How a convolution moves over its input; one number a spatial dimension."""

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    dilation: tuple[int, ...]


@dataclass(frozen=True)
class Call:
    """One call of a consumer. ``x (..., in)``, or ``(batch, in, *space)`` for a convolution."""

    parameter: str
    x: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None
    #: Dimensions of the weight: that of its inputs, that of its outputs.
    in_dim: int
    out_dim: int
    window: Window | None
    #: The call itself; of another input if one is given.
    run: Callable[..., torch.Tensor]

    def space(self) -> tuple[int, ...]:
        """Sizes of what the outputs are counted by: batch and positions."""
        if self.window is None:
            return tuple(self.x.shape[:-1])
        w = self.window
        return (
            self.x.shape[0],
            *(
                (length + sum(pad) - d * (k - 1) - 1) // s + 1
                for length, k, s, pad, d in zip(
                    self.x.shape[2:], w.kernel, w.stride, w.padding, w.dilation, strict=True
                )
            ),
        )

    def count(self) -> int:
        """Number of output vectors."""
        return int(np.prod(self.space()))

    def rows(self, positions: torch.Tensor) -> torch.Tensor:
        """What the output vectors at ``positions (n,)``, flat indices, were made from: ``(n, columns)``."""
        if self.window is None:
            return self.x.reshape(-1, self.x.shape[-1])[positions]
        window, x = self.window, self.x
        if any(pad != (0, 0) for pad in window.padding):
            x = F.pad(x, [amount for pad in reversed(window.padding) for amount in pad])
        batch, *places = _unravel(positions, self.space())
        dims = len(places)
        index = [batch.view(-1, *[1] * dims)]
        for d, (place, k, stride, dilation) in enumerate(
            zip(places, window.kernel, window.stride, window.dilation, strict=True)
        ):
            steps = place[:, None] * stride + torch.arange(k, device=place.device) * dilation
            index.append(steps.view(len(place), *[k if i == d else 1 for i in range(dims)]))
        return x.movedim(1, -1)[tuple(index)].movedim(-1, 1).reshape(len(positions), -1)

    def channel_rows(self, positions: torch.Tensor) -> torch.Tensor:
        """The input vectors at ``positions (n,)`` of the input: ``(n, in)``."""
        x = self.x if self.window is None else self.x.movedim(1, -1)
        batch = _unravel(positions, tuple(x.shape[:-1]))
        return x[tuple(batch)]

    def outputs(self, output: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Vectors of ``output``, or of another tensor of its shape, at ``positions (n,)``: ``(n, out)``."""
        output = output if self.window is None else output.movedim(1, -1)
        return output[tuple(_unravel(positions, tuple(output.shape[:-1])))]


def matrix(weight: torch.Tensor, in_dim: int, out_dim: int) -> torch.Tensor:
    """``weight`` as ``(out, columns)``."""
    return weight.movedim((out_dim, in_dim), (0, 1)).reshape(weight.shape[out_dim], -1)


def tensor_like(values: torch.Tensor, weight: torch.Tensor, in_dim: int, out_dim: int) -> torch.Tensor:
    """The inverse of :func:`matrix`: ``values (out, columns)`` in the dimensions of ``weight``, of any width."""
    kernel = [size for dim, size in enumerate(weight.shape) if dim not in (in_dim, out_dim)]
    width = values.shape[1] // int(np.prod(kernel))
    return values.reshape(len(values), width, *kernel).movedim((0, 1), (out_dim, in_dim))


def find_call(func: Any, args: Any, kwargs: Mapping[str, Any], names: Mapping[int, str]) -> Call | None:
    """The call of a consumer that ``func(*args, **kwargs)`` is; ``names``: of parameters, by ``id``."""
    if func is F.linear:
        bound = dict(zip(("input", "weight", "bias"), args, strict=False)) | dict(kwargs)
        x, weight, bias, dims, window = bound["input"], bound["weight"], bound.get("bias"), (1, 0), None
    elif func in _CONVOLUTIONS:
        bound = dict(zip(_CONV_NAMES, args, strict=False)) | dict(kwargs)
        x, weight, bias, dims = bound["input"], bound["weight"], bound.get("bias"), (1, 0)
        if bound.get("groups", 1) != 1 or id(weight) not in names or x.dim() != weight.dim():
            return None
        window = _window(bound, weight.dim() - 2, tuple(weight.shape[2:]))
    elif func is torch.addmm and len(args) == 3 and not kwargs:
        (bias, x, weight), dims, window = args, (0, 1), None
    elif getattr(func, "__name__", "") in ("matmul", "mm", "__matmul__") and len(args) == 2 and not kwargs:
        (x, weight), bias, dims, window = args, None, (0, 1), None
    else:
        return None
    if not isinstance(weight, torch.Tensor) or id(weight) not in names or (window is None and weight.dim() != 2):
        return None
    place = 1 if func is torch.addmm else 0

    def run(other: torch.Tensor | None = None) -> torch.Tensor:
        if other is None:
            return func(*args, **kwargs)
        if place < len(args):
            return func(*args[:place], other, *args[place + 1 :], **kwargs)
        return func(*args, **{**kwargs, "input": other})

    return Call(names[id(weight)], x, weight, bias, *dims, window, run)


def embedding_weight(func: Any, args: Any, kwargs: Mapping[str, Any]) -> torch.Tensor | None:
    """The table that ``func`` looks rows up in; one that is a consumer too, tied to the last layer, is not fitted."""
    if func is not F.embedding:
        return None
    weight: torch.Tensor = kwargs["weight"] if "weight" in kwargs else args[1]
    return weight


_BATCH_NORM = ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps")


def batch_norm_arguments(func: Any, args: Any, kwargs: Mapping[str, Any]) -> dict[str, Any] | None:
    """The arguments of a BatchNorm with running statistics by their names; None for any other function."""
    if func is not F.batch_norm:
        return None
    bound = {"weight": None, "bias": None, "eps": 1e-5, **dict(zip(_BATCH_NORM, args, strict=False)), **kwargs}
    return bound if bound["running_mean"] is not None else None


def _window(bound: Mapping[str, Any], dims: int, kernel: tuple[int, ...]) -> Window:
    def many(value: Any) -> tuple[int, ...]:
        return (value,) * dims if isinstance(value, int) else tuple(value) * (dims // len(value))

    stride, dilation = many(bound.get("stride", 1)), many(bound.get("dilation", 1))
    padding = bound.get("padding", 0)
    if padding == "same":
        totals = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
        pads = tuple((total // 2, total - total // 2) for total in totals)
    else:
        pads = tuple((p, p) for p in many(0 if padding == "valid" else padding))
    return Window(kernel, stride, pads, dilation)


def _unravel(positions: torch.Tensor, shape: tuple[int, ...]) -> list[torch.Tensor]:
    found: list[torch.Tensor] = []
    for size in reversed(shape):
        found.insert(0, positions % size)
        positions = positions // size
    return found


class Watcher(TorchFunctionMode):
    """Hands every call of a consumer of ``model`` to :meth:`consumer`, and all other functions to :meth:`other`.

    ``renamed``: names of parameters that are called otherwise in the model that the caller has in mind.
    """

    def __init__(self, model: nn.Module, renamed: Callable[[str], str] = str) -> None:
        super().__init__()
        #: Names of parameters, by ``id``.
        self.names = {id(parameter): renamed(name) for name, parameter in model.named_parameters()}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        call = find_call(func, args, kwargs or {}, self.names)
        return self.other(func, args, kwargs or {}) if call is None else self.consumer(call)

    def consumer(self, call: Call) -> Any:
        return call.run()

    def other(self, func: Any, args: Any, kwargs: Mapping[str, Any]) -> Any:
        return func(*args, **kwargs)


def sampled(total: int, count: int, generator: torch.Generator) -> torch.Tensor:
    """``count`` of ``total`` positions, ascending: one from each of as many equal parts; all if there are fewer."""
    if count >= total:
        return torch.arange(total)
    drawn = torch.arange(count) + torch.rand(count, generator=generator, dtype=torch.float64)
    return (drawn * (total / count)).long().clamp_(max=total - 1)
