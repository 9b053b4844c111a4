"""Where the integers come from that the forward uses as sizes.

While the model is traced, the integer attributes of its modules and the sizes of its tensors are integers that know
where they come from. A call such as ``x.view(batch, length, self.num_heads, -1)`` then tells which dimension
``num_heads`` counts, without guessing from equal values, and ``y.view(*x.shape)`` that two tensors are of one width.
Of attributes that are only calculated with, those count whose results reach such a call, or bound a slice.

An attribute is written as its module would: ``num_heads``, ``shape[0]`` of a tuple or list, ``config.num_heads`` of a
record (see :func:`is_record`), ``sizes[heads]`` of a dictionary. Modules often share a record: each that reads a size
from it gets its own.
"""

from __future__ import annotations

import copy
import re
import sys
from argparse import Namespace
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, is_dataclass
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from .labels import Dimension

#: Functions that make a tensor of a given shape, and methods that make one like another in all but that.
CREATING = ("zeros", "ones", "empty", "full", "rand", "randn")
CREATING_LIKE = ("new_zeros", "new_ones", "new_empty", "new_full")
#: Functions whose arguments are sizes and counts.
SHAPING = {*CREATING, *CREATING_LIKE, "view", "reshape", "expand", "unflatten", "split", "split_with_sizes"}
SHAPING |= {"layer_norm", "rms_norm", "repeat", "repeat_interleave", "tile", "narrow", "chunk", "tensor_split"}
SHAPING |= {"one_hot", "bincount", "histc"}
#: Module name and attribute.
Site = tuple[str, str]
_STATE = frozenset(vars(nn.Module()))
NAMESPACES = (SimpleNamespace, Namespace)
#: Dictionaries with more entries are vocabularies and the like.
_MOST_FIELDS = 100


@dataclass(eq=False)
class SizeNotes:
    """What is learnt of attributes while one forward runs."""

    #: Those from which sizes are calculated, and those that bound slices.
    calculated: set[Site] = field(default_factory=set)
    bounds: set[Site] = field(default_factory=set)
    #: Those that were found equal to the size of a dimension: layers check their inputs so.
    equal: list[tuple[Site, Dimension]] = field(default_factory=list)
    #: Those, and the dimensions, of which a number with a fraction was made, such as an attention's scale.
    scaled_by: list[Site | Dimension] = field(default_factory=list)


class TracedInt(int):
    """An integer that knows where it comes from, and hands that on when it is calculated with."""

    #: Integers of earlier forwards may be kept somewhere: those of one have its notes.
    notes: SizeNotes
    #: The attribute that it is, and all that it was calculated from.
    site: Site | None
    sites: frozenset[Site]
    #: The dimension that it is the size of; or whose size was divided, and by what.
    dimension: Dimension | None
    quotient: tuple[Dimension, int] | None

    @classmethod
    def of(
        cls,
        value: int,
        notes: SizeNotes,
        site: Site | None = None,
        dimension: Dimension | None = None,
        sites: frozenset[Site] = frozenset(),
        quotient: tuple[Dimension, int] | None = None,
    ) -> TracedInt:
        made = cls(value)
        made.notes, made.site, made.dimension, made.quotient = notes, site, dimension, quotient
        made.sites = sites if site is None else frozenset((site,))
        return made

    def __eq__(self, other: object) -> bool:
        equal = super().__eq__(other)
        self._note_comparison(other, is_equal=equal is True)
        return equal

    def __ne__(self, other: object) -> bool:
        differs = super().__ne__(other)
        self._note_comparison(other, is_equal=differs is False)
        return differs

    def _note_comparison(self, other: object, is_equal: bool) -> None:
        if is_equal and isinstance(other, TracedInt) and other.notes is self.notes:
            for one, another in ((self, other), (other, self)):
                if one.site is not None and another.dimension is not None:
                    self.notes.equal.append((one.site, another.dimension))

    __hash__ = int.__hash__

    def __float__(self) -> float:
        self._note_scale()
        return int.__float__(self)

    def __pow__(self, exponent: Any, modulo: Any = None) -> Any:
        self._note_scale()
        return int.__pow__(self, exponent, modulo)

    def __truediv__(self, other: Any) -> Any:
        self._note_scale()
        return int.__truediv__(self, other)

    def __rtruediv__(self, other: Any) -> Any:
        self._note_scale()
        return int.__rtruediv__(self, other)

    def _note_scale(self) -> None:
        self.notes.scaled_by += filter(None, (self.site, self.dimension))

    def __reduce__(self) -> Any:
        return int, (int(self),)

    def __deepcopy__(self, memo: Any) -> int:
        return int(self)


def _handing_on(name: str) -> Any:
    plain = getattr(int, name)

    def calculate(self: TracedInt, *others: Any) -> Any:
        value = plain(self, *others)
        if type(value) is not int:
            return value
        traced = [other for other in others if isinstance(other, TracedInt) and other.notes is self.notes]
        sites = self.sites.union(*(other.sites for other in traced))
        quotient = None
        if name == "__floordiv__" and self.dimension is not None:
            quotient = (self.dimension, others[0])
        return TracedInt.of(value, self.notes, sites=sites, quotient=quotient) if sites or quotient else value

    return calculate


for _name in ("add", "radd", "sub", "rsub", "mul", "rmul", "floordiv", "rfloordiv", "mod", "rmod", "neg"):
    setattr(TracedInt, f"__{_name}__", _handing_on(f"__{_name}__"))


def of_tensor(shape: Any, label: Sequence[Dimension], notes: SizeNotes) -> torch.Size:
    """The shape of a tensor, of integers that know its dimensions."""
    return torch.Size(
        [
            TracedInt.of(length, notes, dimension=dimension) if length > 1 else length
            for length, dimension in zip(shape, label, strict=True)
        ]
    )


@contextmanager
def traced_integers(modules: dict[str, nn.Module], notes: SizeNotes) -> Iterator[None]:
    """Replace the integer attributes of ``modules``."""
    with _uncached_einops():
        yield from _replaced_integers(modules, notes)


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


def _replaced_integers(modules: dict[str, nn.Module], notes: SizeNotes) -> Iterator[None]:
    replaced = []
    for name, module in modules.items():
        for attribute, value in list(vars(module).items()):
            if attribute in _STATE:
                continue
            tracked = _tracked(value, (name, attribute), notes)
            if tracked is not value:
                replaced.append((module, attribute, value, tracked))
                vars(module)[attribute] = tracked
    try:
        yield
    finally:
        for module, attribute, value, tracked in replaced:
            if vars(module).get(attribute) is tracked:
                vars(module)[attribute] = value
        for module in modules.values():
            for attribute, value in vars(module).items():
                vars(module)[attribute] = _plain(value)


def _plain(value: Any) -> Any:
    """``value`` without knowledge: forwards keep the sizes of their inputs."""
    if isinstance(value, TracedInt):
        return int(value)
    if type(value) in (tuple, list, torch.Size) and any(isinstance(item, TracedInt) for item in value):
        return type(value)(map(_plain, value))
    return value


def _tracked(value: Any, site: Site, notes: SizeNotes) -> Any:
    """``value`` with its integers replaced: an integer, or those of a tuple, list, record or dictionary."""
    name, attribute = site
    if type(value) is int and value > 1:
        return TracedInt.of(value, notes, site)
    if type(value) in (tuple, list) and value and all(type(item) is int for item in value):
        return type(value)(_tracked(item, (name, f"{attribute}[{i}]"), notes) for i, item in enumerate(value))
    sizes = {key: size for key, size in fields_of(value).items() if type(size) is int and size > 1}
    if not sizes:
        return value
    copied = copy.copy(value)
    for key, size in sizes.items():
        _set_field(copied, key, TracedInt.of(size, notes, (name, field_path(attribute, value, key))))
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


def field_path(attribute: str, held: Any, key: str) -> str:
    """How the field ``key`` of what the attribute holds is written."""
    return f"{attribute}.{key}" if is_record(held) else f"{attribute}[{key}]"


def _set_field(held: Any, key: str, value: int) -> None:
    """Past the ``__setattr__`` of frozen dataclasses."""
    (held if type(held) is dict else vars(held))[key] = value


def traced_in(module: nn.Module) -> Iterator[tuple[str, TracedInt]]:
    """The traced integers among a module's attributes, and among the fields of those that are records."""
    for attribute, held in vars(module).items():
        if isinstance(held, TracedInt):
            yield attribute, held
        for value in fields_of(held).values() if attribute not in _STATE else ():
            if isinstance(value, TracedInt) and value.site is not None:
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


def note_bounds(index: Any, notes: SizeNotes) -> None:
    """The attributes that bound slices."""
    for part in index if isinstance(index, tuple) else (index,):
        for bound in (part.start, part.stop) if isinstance(part, slice) else ():
            if isinstance(bound, TracedInt) and bound.notes is notes:
                (notes.bounds if bound.site is not None else notes.calculated).update(bound.sites)


def note_sizes(name: str, args: tuple[Any, ...], kwargs: dict[str, Any], notes: SizeNotes) -> None:
    """The attributes that a shaping function is given, and those from which what it is given is calculated."""
    if name in SHAPING:
        given = [*args, *kwargs.values()]
        lengths = [item for value in given for item in (value if isinstance(value, tuple | list) else (value,))]
        for length in lengths:
            if isinstance(length, TracedInt) and length.notes is notes:
                notes.calculated |= length.sites


#: An integer, and the ``(tensor, dimension)`` whose size it gave.
Given = tuple[Any, tuple[torch.Tensor, int]]


def known_sizes(given: Sequence[Given], notes: SizeNotes) -> Iterator[tuple[TracedInt, tuple[torch.Tensor, int]]]:
    """Of what :func:`lengths_in_call` has found, the integers of this forward that know where they come from."""
    for length, place in given:
        if isinstance(length, TracedInt) and length.notes is notes:
            yield length, place


def known_quotients(
    given: Sequence[Given], notes: SizeNotes
) -> Iterator[tuple[Dimension, list[tuple[torch.Tensor, int]]]]:
    """Dimensions whose size is that of two neighbours together: ``q.view(b, n, heads, q.shape[-1] // heads)``."""
    for (before, outer), (length, inner) in pairwise(given):
        if isinstance(length, TracedInt) and length.notes is notes and length.quotient is not None:
            dimension, divisor = length.quotient
            if int(before) == int(divisor) and outer[0] is inner[0]:
                yield dimension, [outer, inner]


def lengths_in_call(
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
