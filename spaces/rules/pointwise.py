"""Operators that work element by element, with broadcasting."""

from __future__ import annotations

import torch

from ..labels import Dimension, fixed, size
from ..trace import Call, Label

#: Pointwise operators that torch does not tag as such.
POINTWISE_NAMES = {
    *("hardswish", "clone", "copy", "_to_copy", "detach", "alias", "lift_fresh", "fill", "zero", "native_dropout"),
    *("zeros_like", "ones_like", "full_like", "empty_like", "rand_like", "randn_like", "bernoulli", "_prelu_kernel"),
    *("contiguous", "expand_as", "masked_fill", "relu6", "polar", "complex"),
}


def pointwise(call: Call) -> list[Label]:
    """Align all tensor arguments from the right; a dimension of size 1 takes no part."""
    tensors = call.tensors()
    labels = [call.recorder.label(tensor) for tensor in tensors]
    if not labels:
        return [[fixed(length) for length in tensor.shape] for tensor in call.outputs]
    if call.name == "clone":
        call.recorder.origins.note_copy(call.outputs[0], tensors[0])
    output = [_broadcast(call, labels, tensor) for tensor in call.outputs]
    if call.name in ("add", "add_") and len(tensors) == 2 and tensors[0].shape == tensors[1].shape:
        for dimension in output[0]:
            call.hint(dimension, "residual")
    elif call.name in ("add", "add_") and len(tensors) == 2:
        call.recorder.origins.note_bias(call.outputs[0], *tensors)
    return output


def _broadcast(call: Call, labels: list[Label], output: torch.Tensor) -> Label:
    result: Label = []
    for position in range(1, output.dim() + 1):
        length = output.shape[-position]
        aligned: Dimension | None = None
        for label in labels:
            if len(label) < position or size(label[-position]) != length:
                continue
            if aligned is None:
                aligned = label[-position]
            else:
                call.unify(aligned, label[-position])
        result.append(fixed(length) if aligned is None else aligned)
    return result[::-1]
