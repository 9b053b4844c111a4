"""Convolutions and matrix products: the operators that multiply and accumulate."""

from __future__ import annotations

import math

import torch
from torch import nn

from ..labels import STRUCTURAL, Dimension, fixed, freeze, fresh, multiply, size
from ..trace import Call, IntegerSite, Label
from .attention import hint_attention
from .routing import use_experts
from .unknown import unknown


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
    for dimension in source[2:]:
        call.freeze(dimension, "spatial")
    spatial = [fixed(length) for length in call.outputs[0].shape[2:]]
    output = [source[0], produced, *spatial]
    for dimension in weight[2:]:
        freeze(dimension, STRUCTURAL)
    kernel = math.prod(size(dimension) for dimension in weight[2:])
    if transposed:
        call.work(kernel, source[0], *source[2:], weight[1], source[1])
    else:
        call.work(kernel, *output, weight[1])
    call.produced(1, "weight", 1 if transposed else 0, "bias")
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
    call.recorder.trace.known_sites.extend(_group_sites(call, count, groups))
    return produced


def _group_sites(call: Call, count: Dimension, groups: int) -> list[IntegerSite]:
    module = call.recorder.modules.get(call.module)
    if module is not None and getattr(module, "groups", None) == groups:
        return [IntegerSite(call.module, "groups", count)]
    if groups == size(call.label("input")[1]) and not isinstance(module, nn.modules.conv._ConvNd):
        return []  # most forwards count the channels that come (x.shape[1]): the proof tells those that do not
    call.freeze(count, "the number of groups is written in the forward")
    return []


def mm(call: Call) -> list[Label]:
    """``(n, k) @ (k, m)``."""
    left, right = call.label("self"), call.label("mat2")
    call.produced(1, "mat2", 1, None)
    return [_matrix_product(call, left, right)]


def addmm(call: Call) -> list[Label]:
    left, right = call.label("mat1"), call.label("mat2")
    output = _matrix_product(call, left, right)
    _add_bias(call, output)
    call.produced(1, "mat2", 1, "self")
    return [output]


def _add_bias(call: Call, output: Label) -> None:
    for position, dimension in enumerate(reversed(call.label("self")), start=1):
        if size(dimension) == size(output[-position]):
            call.unify(dimension, output[-position])


def _matrix_product(call: Call, left: Label, right: Label) -> Label:
    call.unify(left[-1], right[-2])
    call.work(1, *left[:-1], right[-1], left[-1])
    call.hint(right[-1], "producer")
    call.hint(right[-1], "kind", "neuron")
    call.hint(left[-1], "kind", "neuron")
    return [*left[:-1], right[-1]]


def bmm(call: Call) -> list[Label]:
    """``(batch, n, k) @ (batch, k, m)``."""
    return [_batched_product(call, "self", "mat2")]


def baddbmm(call: Call) -> list[Label]:
    output = _batched_product(call, "batch1", "batch2")
    _add_bias(call, output)
    return [output]


def _batched_product(call: Call, one: str, other: str) -> Label:
    left, right = call.label(one), call.label(other)
    call.unify(left[0], right[0])
    call.unify(left[2], right[1])
    call.work(1, left[0], left[1], right[2], left[2])
    if call.is_weight(one) or call.is_weight(other):
        call.hint(left[1] if call.is_weight(one) else right[2], "producer")
    else:
        # Two activations: queries with keys, or scores with values.
        hint_attention(call, left[0], left[2], right[2])
        rows_of = call.recorder.origins.rows_of
        call.recorder.trace.scores.append((left[2], rows_of(call[one]) or rows_of(call[other].transpose(1, 2))))
    return [left[0], left[1], right[2]]


def grouped_mm(call: Call) -> list[Label]:
    """Mixture of experts: ``self (tokens, k)`` in order of their experts, ``mat2 (experts, k, m)``."""
    left, right = call.label("self"), call.label("mat2")
    if len(left) != 2 or len(right) != 3:
        return unknown(call)
    call.unify(left[1], right[1])
    call.work(1, left[0], right[2], left[1])
    call.hint(right[2], "producer")
    for dimension in (left[1], right[2]):
        call.hint(dimension, "kind", "neuron")
        # The kernel wants rows that begin at multiples of 16 bytes: in bfloat16 too, wherever the model is traced in.
        call.hint(dimension, "multiple_of", str(16 // torch.bfloat16.itemsize))
    use_experts(call, right[0])
    return [[left[0], right[2]]]


def mv(call: Call) -> list[Label]:
    left, right = call.label("self"), call.label("vec")
    call.unify(left[1], right[0])
    call.work(1, *left)
    return [[left[0]]]


def trilinear(call: Call) -> list[Label]:
    """The product of three tensors, each with the dimensions that it lacks, summed over some: ``nn.Bilinear``."""
    aligned: dict[int, Dimension] = {}
    for argument, lacking in (("i1", "expand1"), ("i2", "expand2"), ("i3", "expand3")):
        label = iter(call.label(argument))
        rank = call[argument].dim() + len(call[lacking])
        for position in (place for place in range(rank) if place not in call[lacking]):
            dimension = next(label)
            if size(dimension) > 1 or position not in aligned:
                call.unify(dimension, aligned.setdefault(position, dimension))
    output = [aligned[position] for position in sorted(aligned) if position not in call["sumdim"]]
    call.work(1, *output, *(aligned[position] for position in call["sumdim"]))
    _bilinear_sizes(call)
    return [output]


def _bilinear_sizes(call: Call) -> None:
    """The module's weight is ``(out, in, other in)``."""
    if not call.is_weight("i2"):
        return
    weight = call.label("i2")
    call.hint(weight[0], "producer")
    for dimension in weight:
        call.hint(dimension, "kind", "neuron")
    if isinstance(call.recorder.modules.get(call.module), nn.Bilinear):
        sizes = zip(("out_features", "in1_features", "in2_features"), weight, strict=True)
        call.recorder.trace.known_sites.extend(IntegerSite(call.module, name, held) for name, held in sizes)


def distances(call: Call) -> list[Label]:
    """``x1 (..., n, width)``, ``x2 (..., m, width)``: what is zero in both is no part of a distance."""
    left, right = call.label("x1"), call.label("x2")
    call.unify(left[-1], right[-1])
    output = [*left[:-1], right[-2]]
    for position in range(3, len(output) + 1):
        batches = [label[-position] for label in (left, right) if position <= len(label)]
        batches.sort(key=size)
        if size(batches[0]) == size(batches[-1]):
            call.unify(batches[0], batches[-1])
        output[-position] = batches[-1]
    call.work(1, *output, left[-1])
    return [output]


def distance(call: Call) -> list[Label]:
    """One number for two tensors."""
    for position in range(1, min(call["self"].dim(), call["other"].dim()) + 1):
        one, other = (call.label(argument)[-position] for argument in ("self", "other"))
        if size(one) == size(other):
            call.unify(one, other)
    return [[]]


RULES = {
    "convolution": convolution,
    "mm": mm,
    "addmm": addmm,
    "bmm": bmm,
    "baddbmm": baddbmm,
    "mv": mv,
    "_trilinear": trilinear,
    **dict.fromkeys(("_cdist_forward", "_euclidean_dist"), distances),
    "dist": distance,
    "_grouped_mm": grouped_mm,
}
