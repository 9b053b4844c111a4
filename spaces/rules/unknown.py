"""Operators without a rule: everything that they touch is frozen."""

from __future__ import annotations

from ..labels import fixed
from ..trace import Call, Label


def unknown(call: Call) -> list[Label]:
    tensors = call.tensors()
    if tensors:
        call.recorder.trace.unknown_operators.add(call.name)
    for tensor in tensors:
        for dimension in call.recorder.label(tensor):
            call.freeze(dimension, "no rule for this operator")
    return [[fixed(length, f"made by {call.why}") for length in tensor.shape] for tensor in call.outputs]
