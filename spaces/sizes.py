"""Which integer attributes of modules the forward uses as sizes.

While the model is traced, its integer attributes are replaced by integers that know where they come from. A call such
as ``x.view(batch, length, self.num_heads, -1)`` then tells which dimension ``num_heads`` counts, without guessing from
equal values; attributes that are only calculated with are told apart from those that are never read.

An attribute is written as its module would: ``num_heads``, ``shape[0]`` of a tuple or list, ``config.num_heads`` of a
record (see :func:`is_record`), ``sizes[heads]`` of a dictionary. Modules often share a record: each that reads a size
from it gets its own.
"""

from __future__ import annotations

import copy
import re
import sys
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import is_dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

#: Functions that make a tensor of a given shape, and methods that make one like another in all but that.
CREATING = ("zeros", "ones", "empty", "full", "rand", "randn")
CREATING_LIKE = ("new_zeros", "new_ones", "new_empty", "new_full")
#: Module name and attribute.
Site = tuple[str, str]
_STATE = frozenset(vars(nn.Module()))
NAMESPACES = (SimpleNamespace, Namespace)
#: Dictionaries with more entries are vocabularies and the like.
_MOST_FIELDS = 100


class TracedInt(int):
    """An integer attribute that knows its place; calculating with it gives plain integers, and is noted."""

    site: Site
    calculated: set[Site]

    @classmethod
    def of(cls, value: int, site: Site, calculated: set[Site]) -> TracedInt:
        made = cls(value)
        made.site, made.calculated = site, calculated
        return made

    def __reduce__(self) -> Any:
        return int, (int(self),)

    def __deepcopy__(self, memo: Any) -> int:
        return int(self)


def _noting(name: str) -> Any:
    plain = getattr(int, name)

    def calculate(self: TracedInt, *others: Any) -> Any:
        self.calculated.add(self.site)
        return plain(self, *others)

    return calculate


for _name in ("add", "radd", "sub", "rsub", "mul", "rmul", "floordiv", "rfloordiv", "truediv", "rtruediv", "neg"):
    setattr(TracedInt, f"__{_name}__", _noting(f"__{_name}__"))


@contextmanager
def traced_integers(modules: dict[str, nn.Module], calculated: set[Site]) -> Iterator[None]:
    """Replace the integer attributes of ``modules``; those that were calculated with are added to ``calculated``."""
    with _uncached_einops():
        yield from _replaced_integers(modules, calculated)


@contextmanager
def _uncached_einops() -> Iterator[None]:
    """einops keeps the lengths that it was given for all later calls with equal ones, and so the first module's."""
    module: Any = sys.modules.get("einops.einops")
    cached = getattr(module, "_reconstruct_from_shape", None)
    plain = getattr(cached, "__wrapped__", None)
    if plain is None:
        yield
        return
    module._reconstruct_from_shape = plain
    try:
        yield
    finally:
        module._reconstruct_from_shape = cached


def _replaced_integers(modules: dict[str, nn.Module], calculated: set[Site]) -> Iterator[None]:
    replaced = []
    for name, module in modules.items():
        for attribute, value in list(vars(module).items()):
            if attribute in _STATE:
                continue
            tracked = _tracked(value, (name, attribute), calculated)
            if tracked is not value:
                replaced.append((module, attribute, value, tracked))
                vars(module)[attribute] = tracked
    try:
        yield
    finally:
        for module, attribute, value, tracked in replaced:
            if vars(module).get(attribute) is tracked:
                vars(module)[attribute] = value


def _tracked(value: Any, site: Site, calculated: set[Site]) -> Any:
    """``value`` with its integers replaced: an integer, or those of a tuple, list, record or dictionary."""
    name, attribute = site
    if type(value) is int and value > 1:
        return TracedInt.of(value, site, calculated)
    if type(value) in (tuple, list) and value and all(type(item) is int for item in value):
        return type(value)(_tracked(item, (name, f"{attribute}[{i}]"), calculated) for i, item in enumerate(value))
    sizes = {key: size for key, size in fields_of(value).items() if type(size) is int and size > 1}
    if not sizes:
        return value
    copied = copy.copy(value)
    for key, size in sizes.items():
        field = f"{attribute}.{key}" if is_record(value) else f"{attribute}[{key}]"
        _set_field(copied, key, TracedInt.of(size, (name, field), calculated))
    return copied


def is_record(value: Any) -> bool:
    """Whether ``value`` is an object that holds fields and no more."""
    return is_record_class(type(value))


def is_record_class(cls: Any) -> bool:
    """Whether it is a dataclass or the class of a namespace.

    Configurations of Hugging Face are dataclasses too, but what they say follows all layers (:mod:`.huggingface`).
    """
    if cls in NAMESPACES:
        return True
    if not isinstance(cls, type) or not is_dataclass(cls) or issubclass(cls, nn.Module) or hasattr(cls, "model_type"):
        return False
    return cls.__new__ is object.__new__ and cls.__dictoffset__ != 0


def fields_of(value: Any) -> dict[str, Any]:
    """The fields of a record, or of a dictionary with names as keys; none of any other value."""
    if type(value) is dict:
        return value if len(value) <= _MOST_FIELDS and all(type(key) is str for key in value) else {}
    return vars(value) if is_record(value) else {}


def _set_field(held: Any, key: str, value: int) -> None:
    """Past the ``__setattr__`` of frozen dataclasses."""
    (held if type(held) is dict else vars(held))[key] = value


def traced_in(module: nn.Module) -> Iterator[tuple[str, TracedInt]]:
    """The traced integers among a module's attributes, and among the fields of those that are records."""
    for attribute, held in vars(module).items():
        if isinstance(held, TracedInt):
            yield attribute, held
        for value in fields_of(held).values() if attribute not in _STATE else ():
            if isinstance(value, TracedInt):
                yield value.site[1], value


def set_size(module: nn.Module, attribute: str, value: int) -> None:
    """Set an integer attribute, written as in :mod:`.sizes`. Tuples, lists, records and dictionaries are replaced."""
    if attribute.isidentifier():
        setattr(module, attribute, value)
        return
    name = re.split(r"[.\[]", attribute, maxsplit=1)[0]
    key = attribute[len(name) + 1 :].removesuffix("]" if attribute[len(name)] == "[" else "")
    held = getattr(module, name)
    if isinstance(held, tuple | list):
        items = list(held)
        items[int(key)] = value
        setattr(module, name, type(held)(items))
    else:
        copied = copy.copy(held)
        _set_field(copied, key, value)
        setattr(module, name, copied)


def bounds_in(index: Any, calculated: set[Site]) -> Iterator[Site]:
    """The attributes that bound a slice. ``calculated``: that of the trace; integers of earlier ones may be kept
    somewhere."""
    for part in index if isinstance(index, tuple) else (index,):
        for bound in (part.start, part.stop) if isinstance(part, slice) else ():
            if isinstance(bound, TracedInt) and bound.calculated is calculated:
                yield bound.site


def sizes_in_call(
    name: str, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any, calculated: set[Site]
) -> Iterator[tuple[Site, Any]]:
    """Pairs of an attribute and the ``(tensor, dimension)`` whose size it gave in a call of a shaping function;
    ``calculated`` as in :func:`bounds_in`."""
    for length, place in _lengths_in_call(name, args, kwargs, result):
        if isinstance(length, TracedInt) and length.calculated is calculated:
            yield length.site, place


def _lengths_in_call(
    name: str, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any
) -> Iterator[tuple[Any, tuple[torch.Tensor, int]]]:
    """The lengths that a call was given, each with the ``(tensor, dimension)`` that has it."""
    if name in ("view", "reshape", "expand", *CREATING, *CREATING_LIKE) and isinstance(result, torch.Tensor):
        shape: Any = args if name in CREATING else args[1:]
        shape = shape or tuple(kwargs[key] for key in ("shape", "size") if key in kwargs)
        shape = shape[0] if shape and isinstance(shape[0], tuple | list) else shape
        for dim, length in enumerate(shape):
            yield length, (result, dim)
    elif name in ("layer_norm", "rms_norm") and len(args) > 1 and [*args[2:3], kwargs.get("weight")][0] is None:
        for dim, length in enumerate(reversed(args[1]), start=1):
            yield length, (args[0], -dim)
    elif name == "unflatten" and isinstance(result, torch.Tensor):
        dim, lengths = int(args[1]) % args[0].dim(), args[2]
        for offset, length in enumerate(lengths):
            yield length, (result, dim + offset)
    elif name in ("split", "split_with_sizes") and len(args) > 1:
        dim = int(args[2] if len(args) > 2 else kwargs.get("dim", 0)) % args[0].dim()
        lengths = args[1] if isinstance(args[1], tuple | list) else [args[1]]
        for part, length in zip(result, lengths, strict=False):
            yield length, (part, dim)
