"""Example inputs in other shapes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from ..spaces.devices import device_of
from ..spaces.errors import ConfigError
from ..spaces.inputs import Inputs
from ..spaces.trace import evaluating


def inputs_at(inputs: Inputs, batch_size: int | None, input_shapes: Sequence[Sequence[int]]) -> list[Inputs]:
    """``inputs`` at every one of ``input_shapes``, which are those of the first tensor; ``batch_size`` replaces their
    first number.

    A dimension of another tensor that has the same place and size as one of the first tensor changes with it (token ids
    and their mask). Values are repeated, or cut.

    Raises:
        ConfigError: no tensor, or shapes that are not as many positive whole numbers as the first tensor's.
    """
    if batch_size is None and not input_shapes:
        return [inputs]
    if not inputs.tensors():
        raise ConfigError("latency.batch_size and latency.input_shapes need example inputs with a tensor")
    old = tuple(inputs.tensors()[0].shape)
    new = [list(shape) for shape in input_shapes] or [list(old)]
    if batch_size is not None:
        new = [[batch_size, *shape[1:]] for shape in new]
    for shape in new:
        if len(shape) != len(old) or not all(type(size) is int and size > 0 for size in shape):
            raise ConfigError(f"input shape {shape}: expected {len(old)} positive whole numbers, such as {list(old)}")
    return [inputs.map(lambda leaf, shape=shape: _resized(leaf, old, shape)) for shape in new]  # type: ignore[misc]


def check_inputs(model: nn.Module, inputs: Sequence[Inputs]) -> None:
    """Raises ConfigError where ``model`` cannot run on one of ``inputs``."""
    for one in inputs:
        try:
            with evaluating(model), torch.no_grad():
                one.to(device_of(model)).call(model)
        except Exception as error:
            raise ConfigError(
                f"the model cannot run on inputs of shape {shape_of(one)}: {type(error).__name__}: {error}; change "
                "latency.batch_size or latency.input_shapes"
            ) from error


def shape_of(inputs: Inputs) -> str:
    """Of the first tensor: ``1x3x224x224``."""
    tensors = inputs.tensors()
    return "x".join(str(size) for size in tensors[0].shape) if tensors else ""


def _resized(leaf: object, old: Sequence[int], new: Sequence[int]) -> object:
    if not isinstance(leaf, torch.Tensor):
        return leaf
    for dim, (before, after) in enumerate(zip(old, new, strict=True)):
        if before != after and leaf.dim() > dim and leaf.shape[dim] == before:
            leaf = leaf.index_select(dim, torch.arange(after, device=leaf.device) % before)
    return leaf
