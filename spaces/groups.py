"""From the labels of a trace to named groups and to the layout of every tensor in their terms."""

from __future__ import annotations

from dataclasses import dataclass, field

from .labels import STRUCTURAL, Dimension, Factor, find, resolve
from .trace import Label, Storage, Trace

#: A dimension as a sum of products: ``i >= 0`` stands for the group with that index, ``-n`` for n fixed elements.
Layout = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Member:
    """Dimension ``dim`` of the parameter or buffer ``tensor`` is (partly) made of the group's units."""

    tensor: str
    dim: int


@dataclass(frozen=True)
class Group:
    """Tensor slices that must be removed together; ``size`` units, ``exact`` if removing equals masking."""

    name: str
    kind: str
    size: int
    exact: bool
    members: tuple[Member, ...]


@dataclass(frozen=True)
class Frozen:
    """Units that reach a parameter and cannot be removed."""

    name: str
    reason: str


@dataclass(frozen=True)
class Structure:
    """The groups, and everything else of the trace in terms of them."""

    groups: tuple[Group, ...]
    frozen: tuple[Frozen, ...]
    tensors: dict[str, tuple[Layout, ...]]
    #: Multiply-accumulates: constant and the layouts whose widths multiply it.
    work: tuple[tuple[int, tuple[Layout, ...]], ...]
    #: Live activations after each operator: item size in bytes and layouts.
    live: tuple[tuple[tuple[int, tuple[Layout, ...]], ...], ...]
    #: Integer attributes: module name, attribute, layout whose width they hold.
    sites: tuple[tuple[str, str, Layout], ...]


@dataclass
class _Facts:
    """What the trace says about one free factor."""

    factor: Factor
    members: list[Member] = field(default_factory=list)
    kinds: set[str] = field(default_factory=set)
    producer: str = ""
    suffix: str = ""
    exact: bool = True


def build_structure(trace: Trace) -> Structure:
    facts = _collect(trace)
    index = {id(fact.factor): position for position, fact in enumerate(facts)}

    def layout(dimension: Dimension) -> Layout:
        return tuple(tuple(index.get(id(f), -f.size) for f in term) for term in resolve(dimension))

    def layouts(label: Label) -> tuple[Layout, ...]:
        return tuple(layout(dimension) for dimension in label)

    def storage(held: Storage) -> tuple[int, tuple[Layout, ...]]:
        return held.itemsize, layouts(held.label)

    names = _unique_names(facts)
    groups = tuple(
        Group(name, _kind(fact.kinds), fact.factor.size, fact.exact, tuple(fact.members))
        for name, fact in zip(names, facts, strict=True)
    )
    sites = ((site.module, site.attribute, layout(site.dimension)) for site in trace.sites)
    return Structure(
        groups=groups,
        frozen=_frozen(trace, index),
        tensors={name: layouts(label) for name, label in trace.parameters.items()},
        work=tuple((work.constant, layouts(work.dimensions)) for work in trace.work),
        live=tuple(tuple(storage(held) for held in moment) for moment in trace.live),
        sites=tuple(site for site in sites if any(i >= 0 for term in site[2] for i in term)),
    )


def freeze_group(trace: Trace, structure: Structure, name: str, reason: str) -> None:
    """Freeze the units of group ``name`` for good, with the reason; build the structure again afterwards."""
    position = [group.name for group in structure.groups].index(name)
    _collect(trace)[position].factor.frozen = reason


def _collect(trace: Trace) -> list[_Facts]:
    """Facts about every free factor that reaches a parameter, in the order of the model's parameters."""
    facts: dict[int, _Facts] = {}
    for tensor, label in trace.parameters.items():
        for dim, dimension in enumerate(label):
            for factor in _free(dimension):
                fact = facts.setdefault(id(factor), _Facts(factor))
                member = Member(tensor, dim)
                if member not in fact.members:
                    fact.members.append(member)
    for hint in trace.hints:
        for factor in _free(hint.dimension):
            if id(factor) in facts:
                _take(facts[id(factor)], hint.role, hint.text)
    return list(facts.values())


def _take(fact: _Facts, role: str, text: str) -> None:
    if role == "kind":
        fact.kinds.add(text)
    elif role == "producer":
        fact.producer = fact.producer or text
    elif role == "groups":
        fact.suffix = ".groups"
    elif role == "inexact":
        fact.exact = False


def _free(dimension: Dimension) -> list[Factor]:
    return [find(factor) for term in resolve(dimension) for factor in term if not factor.frozen]


def _kind(kinds: set[str]) -> str:
    return "neuron" if kinds == {"neuron"} else "channel"


def _unique_names(facts: list[_Facts]) -> list[str]:
    names: list[str] = []
    for fact in facts:
        base = (fact.producer or fact.members[0].tensor.rpartition(".")[0] or fact.members[0].tensor) + fact.suffix
        name, count = base, 1
        while name in names:
            count += 1
            name = f"{base}:{count}"
        names.append(name)
    return names


def _frozen(trace: Trace, index: dict[int, int]) -> tuple[Frozen, ...]:
    """One entry a parameter dimension that is frozen for a reason worth telling."""
    found: dict[tuple[str, str], Frozen] = {}
    for tensor, label in trace.parameters.items():
        module = tensor.rpartition(".")[0] or tensor
        for dimension in label:
            for term in resolve(dimension):
                for factor in term:
                    if factor.frozen and factor.frozen != STRUCTURAL:
                        found.setdefault((module, factor.frozen), Frozen(module, factor.frozen))
    return tuple(found.values())
