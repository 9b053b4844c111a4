"""Convolutions and matrix products: the operators that multiply and accumulate."""

from __future__ import annotations

import math

from ..labels import STRUCTURAL, Dimension, fixed, freeze, fresh, multiply, size
from ..trace import Call, IntegerSite, Label


def convolution(call: Call) -> list[Label]:
    """``input (batch, in, ...)``, ``weight (out, in / groups, ...)``; transposed: ``(in, out / groups, ...)``."""
    source, weight, groups = call.label("input"), call.label("weight"), call["groups"]
    transposed = call["transposed"]
    if transposed:
        call.unify(source[1], weight[0])
    if groups == 1:
        produced = weight[1] if transposed else weight[0]
        if not transposed:
            call.unify(source[1], weight[1])
    else:
        produced = _grouped(call, source, weight, groups)
    if call["bias"] is not None:
        call.unify(call.label("bias")[0], produced)
    spatial = [fixed(length) for length in call.outputs[0].shape[2:]]
    output = [source[0], produced, *spatial]
    walked = source if transposed else output
    for dimension in weight[2:]:
        freeze(dimension, STRUCTURAL)
    kernel = math.prod(size(dimension) for dimension in weight[2:])
    call.work(kernel, *walked, weight[1])
    call.hint(produced, "producer")
    call.hint(produced, "kind", "channel")
    call.hint(source[1], "kind", "channel")
    return [output]


def _grouped(call: Call, source: Label, weight: Label, groups: int) -> Dimension:
    """Both sides are groups x channels per group; the outer factor is shared and removes whole groups."""
    count = fresh(groups)
    first, second = (source[1], weight[0])
    call.unify(multiply([count, fresh(size(first) // groups)]), first)
    if call["transposed"]:
        produced = multiply([count, weight[1]])
    else:
        call.unify(multiply([count, weight[1]]), source[1])
        call.unify(multiply([count, fresh(size(second) // groups)]), second)
        produced = second
    call.hint(count, "groups")
    call.recorder.trace.sites.extend(_group_sites(call, count, groups))
    return produced


def _group_sites(call: Call, count: Dimension, groups: int) -> list[IntegerSite]:
    module = call.recorder.modules.get(call.module)
    if module is not None and getattr(module, "groups", None) == groups:
        return [IntegerSite(call.module, "groups", count)]
    call.freeze(count, "the number of groups is written in the forward")
    return []


def mm(call: Call) -> list[Label]:
    """``(n, k) @ (k, m)``."""
    left, right = call.label("self"), call.label("mat2")
    return [_matrix_product(call, left, right)]


def addmm(call: Call) -> list[Label]:
    left, right, bias = call.label("mat1"), call.label("mat2"), call.label("self")
    output = _matrix_product(call, left, right)
    for position, dimension in enumerate(reversed(bias), start=1):
        if size(dimension) == size(output[-position]):
            call.unify(dimension, output[-position])
    return [output]


def _matrix_product(call: Call, left: Label, right: Label) -> Label:
    call.unify(left[-1], right[-2])
    call.work(1, *left[:-1], left[-1], right[-1])
    call.hint(right[-1], "producer")
    call.hint(right[-1], "kind", "neuron")
    call.hint(left[-1], "kind", "neuron")
    return [*left[:-1], right[-1]]


def bmm(call: Call) -> list[Label]:
    """``(batch, n, k) @ (batch, k, m)``."""
    left, right = call.label("self"), call.label("mat2")
    call.unify(left[0], right[0])
    call.unify(left[2], right[1])
    call.work(1, *left, right[2])
    return [[left[0], left[1], right[2]]]


def mv(call: Call) -> list[Label]:
    left, right = call.label("self"), call.label("vec")
    call.unify(left[1], right[0])
    call.work(1, *left)
    return [[left[0]]]


RULES = {"convolution": convolution, "mm": mm, "addmm": addmm, "bmm": bmm, "mv": mv}
