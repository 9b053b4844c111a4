"""Recurrent layers and cells, labelled as one whatever kernels run them, and packed sequences."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..labels import SELECTOR, Dimension, concatenate, fixed, multiply, size
from ..trace import Call, IntegerSite, Label

#: How many vectors as wide as the state the rows of the weights make.
GATES = {"lstm": 4, "gru": 3, "rnn_tanh": 1, "rnn_relu": 1}
LAYERS, CELLS = tuple(GATES), tuple(f"{kind}_cell" for kind in GATES)


def bind_layer(args: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments of ``torch.lstm`` and the like by name; packed sequences come with the sizes of their batches."""
    names = ["input", "hx", "params", "has_biases", "num_layers", "dropout", "train", "bidirectional", "batch_first"]
    if len(args) > 3 and not isinstance(args[3], bool):
        names = ["input", "batch_sizes", *names[1:-1]]
    return {"batch_sizes": None, "batch_first": False, **dict(zip(names, args, strict=False)), **kwargs}


def bind_cell(args: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
    names = ("input", "hx", "w_ih", "w_hh", "b_ih", "b_hh")
    return {"b_ih": None, "b_hh": None, **dict(zip(names, args, strict=False)), **kwargs}


def bind_unpack(args: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
    return dict(zip(("data", "batch_sizes"), args, strict=False)) | kwargs


@dataclass(frozen=True)
class _Weights:
    """Weights of one layer in one direction: ``(gates x hidden, in)``, ``(gates x hidden, out)``, biases of the rows,
    and with a projection ``(out, hidden)``."""

    inward: torch.Tensor
    recurrent: torch.Tensor
    biases: tuple[torch.Tensor, ...]
    projection: torch.Tensor | None = None


def layer(call: Call) -> list[Label]:
    """``input (length, batch, in)``, ``hx (layers x directions, batch, hidden)``: all layers and directions of a module
    have one width."""
    source, states = call.label("input"), _states(call)
    for state in states:
        call.freeze(state[0], "one state a layer and direction")
    # What a layer gives is its first state; with a projection, that of an LSTM's memory is another one.
    given, hidden = states[0][-1], states[-1][-1]
    if size(given) < size(hidden):
        # torch tells by the widths of the states whether there are projections.
        call.freeze(given, "projections have to stay narrower than the state")
        call.hint(hidden, "at_least", str(size(given) + 1))
    directions = 2 if call["bidirectional"] else 1
    features = source[-1]
    for position, weights in enumerate(_by_layer(call)):
        if position and position % directions == 0:
            features = concatenate([given] * directions)
        _step(call, weights, source[:-1], features, given, hidden)
    _sizes(call, source[-1], given, hidden)
    return [[*source[:-1], concatenate([given] * directions)], *states]


def cell(call: Call) -> list[Label]:
    """``input (batch, in)``, ``hx (batch, hidden)``."""
    source, states = call.label("input"), _states(call)
    biases = tuple(call[name] for name in ("b_ih", "b_hh") if call[name] is not None)
    hidden = states[0][-1]
    call.unify(hidden, states[-1][-1])
    _step(call, _Weights(call["w_ih"], call["w_hh"], biases), source[:-1], source[-1], hidden, hidden)
    _sizes(call, source[-1], hidden, hidden)
    return [[*source[:-1], hidden] for _ in call.outputs]


def _states(call: Call) -> list[Label]:
    states = call["hx"] if isinstance(call["hx"], tuple | list) else [call["hx"]]
    return [call.recorder.label(state) for state in states]


def _by_layer(call: Call) -> Iterator[_Weights]:
    """In order of the layers, both directions of each one after the other."""
    per_bias = 2 if call["has_biases"] else 0
    count = call["num_layers"] * (2 if call["bidirectional"] else 1)
    step = len(call["params"]) // count
    for start in range(0, len(call["params"]), step):
        inward, recurrent, *others = call["params"][start : start + step]
        yield _Weights(inward, recurrent, tuple(others[:per_bias]), *others[per_bias:])


def _step(
    call: Call, weights: _Weights, places: Label, features: Dimension, given: Dimension, hidden: Dimension
) -> None:
    inward, recurrent = call.recorder.label(weights.inward), call.recorder.label(weights.recurrent)
    gates = GATES[call.name.removesuffix("_cell")]
    rows = multiply([fixed(gates, SELECTOR), hidden]) if gates > 1 else hidden
    for dimension in (inward[0], recurrent[0], *(call.recorder.label(bias)[0] for bias in weights.biases)):
        call.unify(dimension, rows)
    call.unify(inward[1], features)
    call.unify(recurrent[1], given)
    call.work(1, *places, inward[0], inward[1])
    call.work(1, *places, recurrent[0], recurrent[1])
    if weights.projection is None:
        call.unify(given, hidden)
    else:
        projection = call.recorder.label(weights.projection)
        call.unify(projection[0], given)
        call.unify(projection[1], hidden)
        call.work(1, *places, *projection)
    for dimension in (hidden, given):
        call.hint(dimension, "producer")
    for dimension in (features, hidden, given):
        call.hint(dimension, "kind", "neuron")


def _sizes(call: Call, features: Dimension, given: Dimension, hidden: Dimension) -> None:
    """The module compares these with what comes in, and makes the first states by them."""
    module: Any = call.recorder.modules.get(call.module)
    sizes = {"input_size": features, "hidden_size": hidden}
    if getattr(module, "proj_size", 0):
        sizes["proj_size"] = given
    for attribute, dimension in sizes.items():
        if isinstance(module, nn.RNNBase | nn.RNNCellBase):
            call.recorder.trace.known_sites.append(IntegerSite(call.module, attribute, dimension))
        else:
            call.integer(size(dimension), dimension)


def pack(call: Call) -> list[Label]:
    """The elements of all sequences, one time after the other: ``(elements, ...)``, and how many there are a time."""
    source = call.label("input")
    for dimension in source[:2]:
        call.freeze(dimension, "sequences are packed")
    return [[fixed(len(call.outputs[0])), *source[2:]], [fixed(len(call.outputs[1]))]]


def unpack(call: Call) -> list[Label]:
    source = call.label("data")
    call.freeze(source[0], "sequences are packed")
    places: Label = [fixed(length) for length in call.outputs[0].shape[:2]]
    return [[*places, *source[1:]], [fixed(len(call.outputs[1]))]]


RULES = {"_pack_padded_sequence": pack}
