"""Copies of models: the user's own is never changed."""

from __future__ import annotations

import copy
import copyreg
import functools
import gc
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from types import BuiltinFunctionType, FunctionType
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

#: Values of these types are shared, as :func:`copy.deepcopy` does.
_IMMUTABLE = frozenset(
    [
        *(int, float, complex, bool, str, bytes, type, type(None), FunctionType, BuiltinFunctionType),
        *(torch.dtype, torch.device, torch.Size, torch.layout, torch.memory_format),
    ]
)
#: Every module has these for itself.
_HOOKS = frozenset(name for name in vars(nn.Module()) if "hooks" in name)
_TENSORS = ("_parameters", "_buffers")
#: With one of these a class has its own idea of a copy.
_COPYING = frozenset(
    [
        *("__deepcopy__", "__reduce__", "__reduce_ex__", "__getstate__", "__getnewargs__", "__getnewargs_ex__"),
        *("__new__", "__slots__"),
    ]
)

#: What is still to be copied: the dictionary that holds it and its key there.
_Later = list[tuple[dict[str, Any], str]]


@contextmanager
def collector_paused() -> Iterator[None]:
    """A copy makes thousands of objects and no garbage: collections meanwhile would take more time than the copy."""
    if not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def copy_model(model: nn.Module, memo: dict[int, Any] | None = None) -> nn.Module:
    """A deep copy of ``model``; ``memo``: what takes the place of objects, by their id.

    What :func:`copy.deepcopy` makes, an order of magnitude sooner: modules that leave their copying to Python are taken
    apart here, and only what could hold references is handed on. Activations that modules keep as attributes come
    along without the graph that made them, which cannot be copied.
    """
    memo = {} if memo is None else memo
    held: dict[str, Any] = {"": model}
    later: _Later = []
    with collector_paused():
        _copy_modules(held, memo, later)
        for place, key in later:
            _detach_activations(place[key], memo)
        for place, key in later:
            place[key] = copy.deepcopy(place[key], memo)
    copied: nn.Module = held[""]
    return copied


def _copy_modules(held: dict[str, Any], memo: dict[int, Any], later: _Later) -> None:
    """Put copies in the place of modules."""
    for key, module in held.items():
        if module is None:
            continue
        if (known := memo.get(id(module))) is not None:
            held[key] = known
        elif is_plain(type(module)):  # type: ignore[arg-type]
            held[key] = _copy_plain(module, memo, later)
        else:
            later.append((held, key))


def _copy_plain(module: nn.Module, memo: dict[int, Any], later: _Later) -> nn.Module:
    copied: nn.Module = object.__new__(type(module))
    memo[id(module)] = copied
    # Its __init__ must not run, and its __setattr__ would look at every value.
    state = copied.__dict__
    state.update(module.__dict__)
    state.pop("_compiled_call_impl", None)
    for key, value in state.items():
        kind = type(value)
        if kind in _IMMUTABLE:
            continue
        if key in _HOOKS and not value:
            state[key] = OrderedDict() if kind is OrderedDict else kind()
        elif kind is tuple and _is_immutable(value):
            continue
        elif key in _TENSORS and kind is dict:
            state[key] = _copy_tensors(value, memo, later)
        elif key == "_modules" and kind is dict:
            state[key] = children = value.copy()
            _copy_modules(children, memo, later)
        elif key == "_non_persistent_buffers_set" and kind is set:
            state[key] = value.copy()
        else:
            later.append((state, key))
    return copied


def _copy_tensors(held: dict[str, Any], memo: dict[int, Any], later: _Later) -> dict[str, Any]:
    copied = held.copy()
    for key, tensor in held.items():
        if tensor is None:
            continue
        if (known := memo.get(id(tensor))) is not None:
            copied[key] = known
        else:
            later.append((copied, key))
    return copied


def _is_immutable(values: tuple[Any, ...]) -> bool:
    return all(type(value) in _IMMUTABLE or (type(value) is tuple and _is_immutable(value)) for value in values)


@functools.cache
def is_plain(cls: type) -> bool:
    """Whether Python copies modules of the class by their attributes alone, so that it can be done here."""
    bases = [base for base in cls.__mro__ if base not in (nn.Module, object)]
    own = {name for base in bases for name, value in vars(base).items() if name != "__slots__" or value}
    # Those of torch itself only add attributes that models saved by older versions lack. Looked for by class, since
    # torch.compile puts a function of its own into nn.Module.
    restoring = next((base for base in cls.__mro__ if "__setstate__" in vars(base)), object)
    return (
        restoring.__module__.startswith("torch.nn.modules.")
        and own.isdisjoint(_COPYING)
        and cls not in copyreg.dispatch_table
    )


def _detach_activations(value: Any, memo: dict[int, Any]) -> None:
    """Put what is a result of autograd inside ``value`` into ``memo``, without its graph."""
    held = [list(vars(module).values()) for module in value.modules()] if isinstance(value, nn.Module) else value
    for leaf in tree_leaves(held):
        if isinstance(leaf, torch.Tensor) and not leaf.is_leaf and id(leaf) not in memo:
            memo[id(leaf)] = leaf.detach().clone()
