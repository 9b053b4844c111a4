"""Normalisations and reductions."""

from __future__ import annotations

from ..labels import Dimension, fixed, fresh, is_frozen, multiply, size
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
    _inexact(call, inside)
    module = call.recorder.modules.get(call.module)
    if groups > 1 and getattr(module, "num_groups", None) == groups:
        call.hint(count, "groups")
        call.recorder.trace.sites.append(IntegerSite(call.module, "num_groups", count))
    elif groups > 1:
        call.freeze(count, "the number of groups is written in the forward")
    call.hint(source[1], "kind", "channel")
    return _first_is_input(call, source)


def layer_norm(call: Call) -> list[Label]:
    source = call.label("input")
    normalised = source[-len(call["normalized_shape"]) :]
    for name in ("weight", "bias"):
        if call[name] is not None:
            for dimension, other in zip(normalised, call.label(name), strict=True):
                call.unify(dimension, other)
    for dimension in normalised:
        _inexact(call, dimension)
    return _first_is_input(call, source)


def _inexact(call: Call, dimension: Dimension) -> None:
    if not is_frozen(dimension):
        call.hint(dimension, "inexact", f"normalised by {call.why}")


def _first_is_input(call: Call, source: Label) -> list[Label]:
    """The first output has the input's label; saved statistics are internal and fixed."""
    return [source, *([fixed(length) for length in tensor.shape] for tensor in call.outputs[1:])]


def softmax(call: Call) -> list[Label]:
    """Every element depends on all others along ``dim``."""
    source = call.label("self")
    call.freeze(source[call["dim"]], "softmax over it")
    return [source]


def reduction(call: Call) -> list[Label]:
    """Mean, maximum and the like over ``dim`` depend on how many elements there are."""
    source = call.label("self")
    dims = call.arguments.get("dim")
    dims = list(range(len(source))) if dims is None or dims == [] else [dims] if isinstance(dims, int) else list(dims)
    gone = {d % max(len(source), 1) for d in dims}
    for position in gone if call.name != "sum" else ():
        call.freeze(source[position], "reduced over it")
    return [_without(call, source, gone) for _ in call.outputs]


def _without(call: Call, source: Label, gone: set[int]) -> Label:
    if call.arguments.get("keepdim"):
        return [fixed(1) if position in gone else dimension for position, dimension in enumerate(source)]
    return [dimension for position, dimension in enumerate(source) if position not in gone]


RULES = {
    **dict.fromkeys(("native_batch_norm", "_native_batch_norm_legit", "_batch_norm_with_update"), batch_norm),
    **dict.fromkeys(("_native_batch_norm_legit_no_training", "cudnn_batch_norm", "batch_norm"), batch_norm),
    "native_group_norm": group_norm,
    "native_layer_norm": layer_norm,
    **dict.fromkeys(("_softmax", "_log_softmax", "cumsum", "roll", "flip"), softmax),
    **dict.fromkeys(("mean", "sum", "amax", "amin", "max", "min", "argmax", "var", "std", "var_mean"), reduction),
    **dict.fromkeys(("linalg_vector_norm", "logsumexp", "any", "all", "prod"), reduction),
}
