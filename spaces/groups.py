"""From the labels of a trace to named groups and to the layout of every tensor in their terms."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial

import numpy as np
from numpy.typing import NDArray

from .labels import SELECTOR, STRUCTURAL, Dimension, Factor, find, resolve, term_size
from .residual import Substitute
from .trace import IntegerSite, Label, Scope, Trace

#: A dimension as a sum of products: ``i >= 0`` stands for the group with that index, ``-n`` for n fixed elements.
Layout = tuple[tuple[int, ...], ...]
#: Group index and unit of the block that something is a part of.
Owner = tuple[int, int]

#: For every group, which of its units stay.
Kept = list[NDArray[np.bool_]]

KINDS = ("channel", "neuron", "head", "kv_group", "head_dim", "hidden", "block", "expert")


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
    #: Fewer units than this cannot run.
    at_least: int = 1
    #: Kernels take widths of the whole size or of multiples of this.
    multiple_of: int = 1
    #: For kind block, the module that each unit is.
    blocks: tuple[str, ...] = ()
    #: For blocks inside a layer, what takes the place of each; whole layers are taken out of their container.
    substitutes: tuple[Substitute, ...] | None = field(default=None, compare=False, repr=False)


@dataclass(frozen=True)
class Frozen:
    """Units that reach a parameter and cannot be removed."""

    name: str
    reason: str


@dataclass(frozen=True)
class Term:
    """A product of the widths of ``layouts`` times ``constant``, gone with any of ``owners``."""

    constant: int
    layouts: tuple[Layout, ...]
    owners: tuple[Owner, ...] = ()


@dataclass(frozen=True)
class Moment:
    """Activations alive at once, in bytes; it does not come when one of ``owners`` is gone."""

    storages: tuple[Term, ...]
    owners: tuple[Owner, ...]


@dataclass(frozen=True)
class Scale:
    """The ``rows`` of the parameters' dimensions grow by the root of the relative width of ``head_dim``."""

    head_dim: Layout
    parameters: tuple[tuple[str, int], ...]
    rows: tuple[int, ...]


@dataclass(frozen=True)
class Structure:
    """The groups, and everything else of the trace in terms of them."""

    groups: tuple[Group, ...]
    frozen: tuple[Frozen, ...]
    tensors: dict[str, tuple[Layout, ...]]
    #: The blocks that a parameter or buffer goes with.
    owners: dict[str, tuple[Owner, ...]]
    work: tuple[Term, ...]
    live: tuple[Moment, ...]
    #: Integer attributes: module name, attribute, layout whose width they hold.
    sites: tuple[tuple[str, str, Layout], ...]
    scales: tuple[Scale, ...]


@dataclass
class _Facts:
    """What the trace says about one free factor."""

    factor: Factor
    members: list[Member] = field(default_factory=list)
    kinds: set[str] = field(default_factory=set)
    name: str = ""
    producer: str = ""
    suffix: str = ""
    exact: bool = True
    at_least: int = 1
    multiple_of: int = 1

    @property
    def kind(self) -> str:
        for kind in ("expert", "kv_group", "head", "head_dim"):
            if kind in self.kinds:
                return kind
        if "residual" in self.kinds and self.kinds & {"normalised", "embedding"}:
            return "hidden"
        return "neuron" if "neuron" in self.kinds and "channel" not in self.kinds else "channel"


def build_structure(trace: Trace) -> Structure:
    """Groups of free factors, then groups of blocks."""
    for fact in _collect(trace):
        if not (fact.producer or fact.kinds or fact.name):
            fact.factor.frozen = "not used on the example inputs"
    facts = _collect(trace)
    index = {id(fact.factor): position for position, fact in enumerate(facts)}
    names = _unique(_base_names(facts))
    groups = [
        Group(name, fact.kind, fact.factor.size, fact.exact, tuple(fact.members), fact.at_least, fact.multiple_of)
        for name, fact in zip(names, facts, strict=True)
    ]
    stacks = trace.blocks
    groups += [
        Group(name, "block", len(stack.modules), stack.exact, (), blocks=stack.modules, substitutes=stack.substitutes)
        for name, stack in zip(_unique([stack.name for stack in stacks]), stacks, strict=True)
    ]
    units = {module: (g, u) for g, group in enumerate(groups) for u, module in enumerate(group.blocks)}

    def layout(dimension: Dimension) -> Layout:
        terms = [term for term in resolve(dimension) if term_size(term)]  # tensors may be empty
        return tuple(tuple(index.get(id(f), -f.size) for f in term) for term in terms)

    def layouts(label: Label) -> tuple[Layout, ...]:
        return tuple(layout(dimension) for dimension in label)

    def owners(scope: Scope) -> tuple[Owner, ...]:
        return tuple(units[module] for module in scope if module in units)

    def shared_owners(names: list[str]) -> tuple[Owner, ...]:
        """What several blocks hold, such as a rotary embedding, goes with none of them."""
        found = [owners(_parents(name)) for name in names]
        return tuple(owner for owner in found[0] if all(owner in others for others in found))

    return Structure(
        groups=tuple(groups),
        frozen=_frozen(trace),
        tensors={name: layouts(label) for name, label in trace.parameters.items()},
        owners={name: shared_owners(names) for name, names in trace.names.items()},
        work=tuple(Term(work.constant, layouts(work.dimensions), owners(work.scope)) for work in trace.work),
        live=tuple(
            Moment(tuple(Term(held.itemsize, layouts(held.label)) for held in moment.storages), owners(moment.scope))
            for moment in trace.live
        ),
        sites=_sites(trace, layout, groups),
        scales=tuple(
            Scale(layout(scale.head_dim), tuple(scale.parameters), tuple(scale.rows))
            for scale in trace.scales
            if groups_in(layout(scale.head_dim))
        ),
    )


def freeze_groups(trace: Trace, structure: Structure, reasons: dict[str, str]) -> None:
    """Freeze groups for good, by name, with their reasons; build the structure again afterwards."""
    facts = _collect(trace)
    for position, group in enumerate(structure.groups):
        if group.name not in reasons:
            continue
        if group.kind == "block":
            trace.blocks = [stack for stack in trace.blocks if stack.modules != group.blocks]
            trace.refused_blocks.append((group.name, reasons[group.name]))
        else:
            facts[position].factor.frozen = reasons[group.name]


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
        factors = _free(hint.dimension)
        for position, factor in enumerate(factors):
            if id(factor) in facts:
                _take(facts[id(factor)], hint.role, hint.text, position, len(factors))
    return list(facts.values())


def _take(fact: _Facts, role: str, text: str, position: int, count: int) -> None:
    if role == "kind":
        fact.kinds.add(text)
    elif role == "heads":
        # Heads that are a product are key/value groups and the query heads in each.
        fact.kinds.add("kv_group" if count == 2 and position == 0 else "head")
        ending = "heads" if count == 1 else "kv_groups" if position == 0 else "query_heads"
        fact.name = fact.name or f"{text}.{ending}"
    elif role == "head_dim":
        fact.kinds.add("head_dim")
        fact.name = fact.name or f"{text}.head_dim"
    elif role in ("residual", "normalised", "embedding"):
        fact.kinds.add(role)
    elif role == "name":
        fact.name = fact.name or text
    elif role == "producer":
        fact.producer = fact.producer or text
    elif role == "groups":
        fact.suffix = ".groups"
    elif role == "inexact":
        fact.exact = False
    elif role == "at_least":
        fact.at_least = max(fact.at_least, int(text))
    elif role == "multiple_of":
        fact.multiple_of = math.lcm(fact.multiple_of, int(text))


def _free(dimension: Dimension) -> list[Factor]:
    return [find(factor) for term in resolve(dimension) for factor in term if not factor.frozen]


def groups_in(layout: Layout) -> list[int]:
    """The groups that a dimension is made of, ascending."""
    return sorted({factor for term in layout for factor in term if factor >= 0})


def is_squared(layout: Layout) -> bool:
    """Whether a unit stands twice in a term, as where a tensor was multiplied with itself and flattened."""
    return any(len(held := [factor for factor in term if factor >= 0]) > len(set(held)) for term in layout)


def _base_names(facts: list[_Facts]) -> list[str]:
    hidden = [fact for fact in facts if fact.kind == "hidden"]
    return ["hidden" if hidden == [fact] else _base_name(fact) for fact in facts]


def _base_name(fact: _Facts) -> str:
    producer = fact.producer or fact.members[0].tensor.rpartition(".")[0] or fact.members[0].tensor
    if fact.kind in ("head", "kv_group", "head_dim", "expert"):
        return fact.name.lstrip(".")
    return f"{producer}.hidden" if fact.kind == "hidden" else producer + fact.suffix


def _unique(bases: Iterable[str]) -> list[str]:
    names: list[str] = []
    for base in bases:
        name, count = base, 1
        while name in names:
            count += 1
            name = f"{base}:{count}"
        names.append(name)
    return names


def _parents(tensor: str) -> Scope:
    parts = tensor.split(".")
    return tuple(".".join(parts[:end]) for end in range(1, len(parts)))


def _sites(
    trace: Trace, layout: Callable[[Dimension], Layout], groups: list[Group]
) -> tuple[tuple[str, str, Layout], ...]:
    """One layout an attribute: what it was seen to give the size of, else what its value equals.

    Of several equal sizes, the one that its name speaks of, and the last of those: a forward takes its inputs as they
    come, and shapes its output as its attributes say.
    """
    choices: dict[tuple[str, str], list[Layout]] = {}
    given = [*(IntegerSite(*site, dimension) for site, dimension in trace.sizes.equal), *trace.given_sizes]
    seen = {(site.module, site.attribute) for site in given}
    read = seen | trace.sizes.calculated
    kinds = [group.kind for group in groups]
    for site in [*given, *(s for s in trace.sites if (s.module, s.attribute) not in seen)]:
        found, key = layout(site.dimension), (site.module, site.attribute)
        is_read = key in read or (site.is_bound and key in trace.sizes.bounds)
        if groups_in(found) and (is_read or _is_count_of_heads(site.attribute, found, kinds)):
            choices.setdefault(key, []).append(found)
    chosen = {
        key: min(reversed(layouts), key=partial(_mismatch, key[1], kinds=kinds)) for key, layouts in choices.items()
    }
    chosen |= {(site.module, site.attribute): layout(site.dimension) for site in trace.known_sites}
    return tuple((*key, found) for key, found in chosen.items() if groups_in(found))


def _is_count_of_heads(attribute: str, layout: Layout, kinds: list[str]) -> bool:
    """Attributes that only another branch of the forward reads, such as that of a model with fewer layers."""
    found = {kinds[factor] for term in layout for factor in term if factor >= 0}
    return ("heads" in attribute.lower() or "groups" in attribute.lower()) and found <= {"head", "kv_group"}


def _mismatch(attribute: str, layout: Layout, kinds: list[str]) -> int:
    """0 if the attribute's name speaks of what the layout is made of; 1 otherwise."""
    found = {kinds[factor] for term in layout for factor in term if factor >= 0}
    name = attribute.lower()
    if "head" not in name or "all" in name:
        return 0
    of_width = "dim" in name or "size" in name or "channels" in name
    return int(found != {"head_dim"} if of_width else "head_dim" in found)


def _frozen(trace: Trace) -> tuple[Frozen, ...]:
    """One entry a parameter dimension that is frozen for a reason worth telling."""
    found: dict[tuple[str, str], Frozen] = {}
    for tensor, label in trace.parameters.items():
        module = tensor.rpartition(".")[0] or tensor
        for dimension in label:
            for term in resolve(dimension):
                hidden = {STRUCTURAL} if all(factor.frozen for factor in term) else {STRUCTURAL, SELECTOR}
                for factor in term:
                    if factor.frozen and factor.frozen not in hidden:
                        found.setdefault((module, str(factor.frozen)), Frozen(module, str(factor.frozen)))
    return (*found.values(), *(Frozen(name, reason) for name, reason in trace.refused_blocks))
