"""Attention: heads, key/value groups, and the width of a head."""

from __future__ import annotations

from typing import Any

from ..labels import Dimension, fresh, is_frozen, multiply, size
from ..trace import Call, Label


def bind(args: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments of ``F.scaled_dot_product_attention`` by name."""
    names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
    return {"attn_mask": None, "scale": None, **dict(zip(names, args, strict=False)), **kwargs}


def fused_attention(call: Call) -> list[Label]:
    """``query (..., heads, length, d)``, ``key (..., groups, source, d)``, ``value (..., groups, source, e)``."""
    query, key, value = call.label("query"), call.label("key"), call.label("value")
    for position in range(len(query) - 3 if len(query) > 3 else 0):
        call.unify(query[position], key[position])
        call.unify(query[position], value[position])
    call.unify(query[-1], key[-1])
    call.unify(key[-2], value[-2])
    call.freeze(key[-2], "softmax over it")
    if len(query) > 2:
        _align_heads(call, query[-3], key[-3], value[-3])
    _mask(call, query, key)
    call.work(1, *query[:-2], query[-2], key[-2], query[-1])
    call.work(1, *query[:-2], query[-2], value[-1], key[-2])
    hint_attention(call, query[-3] if len(query) > 2 else None, query[-1], value[-1])
    queries = call.recorder.origins.rows_of(call["query"]) or call.recorder.origins.rows_of(call["key"])
    if call["scale"] is None:
        call.recorder.keep_scale(query[-1], queries)  # the kernel divides by the root of the width that it sees
    else:
        call.recorder.trace.scores.append((query[-1], queries))
    return [[*query[:-1], value[-1]]]


def hint_attention(call: Call, heads: Dimension | None, *head_dims: Dimension) -> None:
    """Tell what the dimensions of an attention are.

    Queries, keys and values of one width keep one width: the forward shapes all three by the same number.
    """
    known = call.recorder.head_dims.setdefault(call.module, [])
    for dimension in head_dims:
        for other in known:
            if size(dimension) == size(other):
                call.unify(dimension, other)
        if not is_frozen(dimension):
            known.append(dimension)
    if heads is not None:
        call.hint(heads, "heads")
    for dimension in head_dims:
        call.hint(dimension, "head_dim")


def _align_heads(call: Call, query: Dimension, key: Dimension, value: Dimension) -> None:
    """With grouped queries, the query heads are key/value groups x repeats, in this order."""
    call.unify(key, value)
    if size(query) != size(key):
        repeats = fresh(size(query) // size(key))
        call.unify(query, multiply([key, repeats]))
        call.integer(size(repeats), repeats)  # what the forward repeats by where a kernel does not
    else:
        call.unify(query, key)


def _mask(call: Call, query: Label, key: Label) -> None:
    if call["attn_mask"] is None:
        return
    scores = [*query[:-1], key[-2]]
    for dimension, other in zip(reversed(call.label("attn_mask")), reversed(scores), strict=False):
        if size(dimension) == size(other):
            call.unify(dimension, other)
