"""Operators that choose: indexing, sorting, and the routing of tokens to experts."""

from __future__ import annotations

import torch

from ..labels import STRUCTURAL, Dimension, fixed, freeze, is_frozen, resolve, size
from ..trace import Call, Label


def index(call: Call) -> list[Label]:
    """Elements are looked up along the indexed dimensions, which stay as they are; the others pass."""
    source = call.label("self")
    indexed = _indexed(call)
    for position in indexed:
        call.freeze(source[position], "elements of it are looked up")
    for chosen in call["indices"]:
        for dimension in [] if chosen is None else call.recorder.label(chosen):
            freeze(dimension, STRUCTURAL)
    lengths = list(call.outputs[0].shape)
    kept = [position for position in range(len(source)) if position not in indexed]
    rank = len(lengths) - len(kept)
    # The looked-up dimensions stand where the first index stood, or in front if the indices are apart.
    start = indexed[0] if indexed == list(range(indexed[0], indexed[-1] + 1)) else 0
    output: Label = [source[position] for position in kept]
    output[start:start] = [fixed(length, f"looked up ({call.why})") for length in lengths[start : start + rank]]
    return [output]


def _indexed(call: Call) -> list[int]:
    """The dimensions that are looked up; a mask covers as many as it has."""
    found: list[int] = []
    position = 0
    for chosen in call["indices"]:
        count = chosen.dim() if chosen is not None and chosen.dtype in (torch.bool, torch.uint8) else 1
        found += [] if chosen is None else range(position, position + count)
        position += count
    return found


def index_put(call: Call) -> list[Label]:
    """Values are written at looked-up positions; dimensions that are not indexed are aligned with theirs."""
    target, values = call.label("self"), call.label("values")
    indexed = _indexed(call)
    for position in indexed:
        call.freeze(target[position], "elements of it are looked up")
    for distance in range(1, len(target) - max(indexed)):
        if distance <= len(values) and size(values[-distance]) == size(target[-distance]):
            call.unify(target[-distance], values[-distance])
    return [target]


def index_add(call: Call) -> list[Label]:
    target, values = call.label("self"), call.label("source")
    chosen = call["dim"] % len(target)
    for position, dimension in enumerate(target):
        if position == chosen:
            call.freeze(dimension, "elements of it are looked up")
        else:
            call.unify(dimension, values[position])
    return [target]


def index_fill(call: Call) -> list[Label]:
    target = call.label("self")
    call.freeze(target[call["dim"] % len(target)], "elements of it are looked up")
    return [target]


def gather(call: Call) -> list[Label]:
    """``output[i, j] = self[index[i, j], j]``: the looked-up dimension gets the length of the index."""
    source, chosen = call.label("self"), call.label("index")
    dim = call["dim"] % max(len(source), 1)
    _look_up(call, dim, chosen, source)
    return [chosen]


def scatter(call: Call) -> list[Label]:
    """``self[index[i, j], j] = src[i, j]``, or plus, or another reduction of both."""
    target, chosen = call.label("self"), call.label("index")
    dim = call["dim"] % max(len(target), 1)
    _look_up(call, dim, chosen, target)
    if isinstance(call.arguments.get("src"), torch.Tensor):
        source = call.label("src")
        _look_up(call, dim, chosen, source)
        call.freeze(source[dim], "elements of it are written to looked-up places")
    return [target]


def _look_up(call: Call, dim: int, chosen: Label, source: Label) -> None:
    """Places along ``dim`` of ``source`` are looked up; along the others, each has its own if there are as many."""
    for position, (one, other) in enumerate(zip(chosen, source, strict=True)):
        if position == dim:
            _choose(call, other)
        elif size(one) == size(other):
            call.unify(one, other)
        else:
            for dimension in (one, other):
                call.freeze(dimension, "a part of it is looked up")


def _choose(call: Call, dimension: Dimension) -> None:
    """Routers look up scores of the experts that they chose."""
    routed = call.recorder.routed
    if routed is None or resolve(dimension) != resolve(routed):
        call.freeze(dimension, "elements of it are looked up")


def segment_reduce(call: Call) -> list[Label]:
    return [_replaced(call, call.label("data"), call["axis"], "segments of it are reduced", "segments")]


def index_select(call: Call) -> list[Label]:
    return [_replaced(call, call.label("self"), call["dim"], "elements of it are looked up", "looked up")]


def _replaced(call: Call, source: Label, dim: int, why: str, what: str) -> Label:
    """``source`` with another dimension in the place of ``dim``, which is frozen."""
    label, dim = list(source), dim % len(source)
    call.freeze(label[dim], why)
    label[dim] = fixed(call.outputs[0].shape[dim], f"{what} ({call.why})")
    return label


def topk(call: Call) -> list[Label]:
    """The largest of a free dimension of scores: a router chooses experts. Which ones are left changes the choice."""
    source = list(call.label("self"))
    dim = call["dim"] % len(source)
    experts = source[dim]
    if not is_frozen(experts):
        call.recorder.routed = experts
        call.hint(experts, "kind", "expert")
        call.hint(experts, "name", f"{call.module}.experts")
        call.hint(experts, "at_least", str(call["k"]))
    source[dim] = fixed(call["k"], f"the largest ({call.why})")
    return [source, source]


def use_experts(call: Call, experts: Dimension) -> None:
    """The tokens were sorted by the experts that the last router chose."""
    routed = call.recorder.routed
    if routed is None or size(routed) != size(experts):
        call.freeze(experts, "no router was seen")
        return
    call.unify(experts, routed)
    call.integer(size(experts), experts)


def sort(call: Call) -> list[Label]:
    source = call.label("self")
    dim = call.arguments.get("dim")
    call.freeze(source[-1 if dim is None else dim], "sorted")
    return [source for _ in call.outputs]


def histogram(call: Call) -> list[Label]:
    """How many tokens go to each expert: as many counts as the last router had experts."""
    routed = call.recorder.routed
    length = call.outputs[0].shape[0]
    if routed is None or size(routed) != length:
        return [[fixed(length)]]
    call.integer(length, routed)
    return [[routed]]


RULES = {
    "index": index,
    **dict.fromkeys(("index_put", "_index_put_impl", "_unsafe_index_put"), index_put),
    "_unsafe_index": index,
    **dict.fromkeys(("index_add", "index_reduce", "index_copy"), index_add),
    "index_fill": index_fill,
    "gather": gather,
    **dict.fromkeys(("scatter", "scatter_add", "scatter_reduce"), scatter),
    "segment_reduce": segment_reduce,
    "index_select": index_select,
    "topk": topk,
    "sort": sort,
    "histc": histogram,
}
