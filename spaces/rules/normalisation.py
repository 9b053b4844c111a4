"""Normalisations and reductions."""

from __future__ import annotations

from ..labels import fixed, fresh, is_frozen, multiply, resolve, size
from ..trace import Call, IntegerSite, Label


def batch_norm(call: Call) -> list[Label]:
    """Each channel on its own: exact."""
    source = call.label("input")
    for name in ("weight", "bias", "running_mean", "running_var"):
        if call.arguments.get(name) is not None:
            call.unify(source[1], call.label(name)[0])
    call.hint(source[1], "kind", "channel")
    return _first_is_input(call, source)


def group_norm(call: Call) -> list[Label]:
    """Whole groups can go exactly; channels inside a group change its statistics."""
    source, groups = call.label("input"), call["group"]
    count, inside = fresh(groups), fresh(size(source[1]) // groups)
    call.unify(multiply([count, inside]), source[1])
    for name in ("weight", "bias"):
        if call[name] is not None:
            call.unify(source[1], call.label(name)[0])
    call.inexact(inside)
    module = call.recorder.modules.get(call.module)
    if groups > 1 and getattr(module, "num_groups", None) == groups:
        call.hint(count, "groups")
        call.recorder.trace.known_sites.append(IntegerSite(call.module, "num_groups", count))
    elif groups > 1:
        call.freeze(count, "the number of groups is written in the forward")
    call.hint(source[1], "kind", "channel")
    return _first_is_input(call, source)


def layer_norm(call: Call) -> list[Label]:
    """Also root mean square normalisation, which has no bias."""
    source = call.label("input")
    normalised = source[-len(call["normalized_shape"]) :]
    for name in ("weight", "bias"):
        if call.arguments.get(name) is not None:
            for dimension, other in zip(normalised, call.label(name), strict=True):
                call.unify(dimension, other)
    for dimension in normalised:
        call.inexact(dimension)
        call.hint(dimension, "normalised")
    if len(normalised) == 1 and call["weight"] is not None:
        call.produced(len(source) - 1, "weight", 0, "bias" if call.arguments.get("bias") is not None else None)
    return _first_is_input(call, source)


def _first_is_input(call: Call, source: Label) -> list[Label]:
    """The first output has the input's label; saved statistics are internal and fixed."""
    return [source, *([fixed(length) for length in tensor.shape] for tensor in call.outputs[1:])]


def softmax(call: Call) -> list[Label]:
    """Every element depends on all others along ``dim``: fixed, unless these are the experts of a router."""
    source = call.label("self")
    dimension = source[call["dim"]]
    if not is_frozen(dimension):
        call.recorder.await_routing(dimension, f"softmax over it ({call.why})")
        call.inexact(dimension)
    return [source]


def along(call: Call) -> list[Label]:
    """Every element depends on its place along ``dim``."""
    source = call.label("self")
    dims = call.arguments.get("dims", call.arguments.get("dim"))
    for position in [dims] if isinstance(dims, int) else dims or range(len(source)):
        call.freeze(source[position], "its order matters")
    return [source]


def cumulative(call: Call) -> list[Label]:
    """A running sum keeps its meaning when elements go that count nothing: the tokens of each expert."""
    source = call.label("self")
    routed = call.recorder.routed
    if len(source) != 1 or routed is None or resolve(source[0]) != resolve(routed):
        return along(call)
    return [source]


def total(call: Call) -> list[Label]:
    """Sums and norms: what is zero adds nothing."""
    source, gone = call.label("self"), _reduced(call)
    return [_without(call, source, gone) for _ in call.outputs]


def average(call: Call) -> list[Label]:
    """Means and variances depend on how many elements there are, and on nothing else of them."""
    source, gone = call.label("self"), _reduced(call)
    for position in gone:
        call.inexact(source[position])
        call.hint(source[position], "normalised")
    return [_without(call, source, gone) for _ in call.outputs]


def reduction(call: Call) -> list[Label]:
    """Maxima and the like over ``dim``: a removed element is not the same as a zero."""
    source, gone = call.label("self"), _reduced(call)
    for position in gone:
        call.freeze(source[position], "reduced over it")
    return [_without(call, source, gone) for _ in call.outputs]


def _reduced(call: Call) -> set[int]:
    rank = len(call.label("self"))
    dims = call.arguments.get("dim")
    dims = list(range(rank)) if dims is None or dims == [] else [dims] if isinstance(dims, int) else list(dims)
    return {d % max(rank, 1) for d in dims}


def _without(call: Call, source: Label, gone: set[int]) -> Label:
    if call.arguments.get("keepdim"):
        return [fixed(1) if position in gone else dimension for position, dimension in enumerate(source)]
    return [dimension for position, dimension in enumerate(source) if position not in gone]


RULES = {
    **dict.fromkeys(("native_batch_norm", "_native_batch_norm_legit", "_batch_norm_with_update"), batch_norm),
    **dict.fromkeys(("_native_batch_norm_legit_no_training", "cudnn_batch_norm", "batch_norm"), batch_norm),
    "native_group_norm": group_norm,
    **dict.fromkeys(("native_layer_norm", "_fused_rms_norm"), layer_norm),
    **dict.fromkeys(("_softmax", "_log_softmax"), softmax),
    **dict.fromkeys(("roll", "flip"), along),
    "cumsum": cumulative,
    **dict.fromkeys(("sum", "linalg_vector_norm", "norm"), total),
    **dict.fromkeys(("mean", "var", "std", "var_mean"), average),
    **dict.fromkeys(("amax", "amin", "max", "min", "argmax", "argmin", "logsumexp", "any", "all", "prod"), reduction),
}
