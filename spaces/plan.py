"""A plan: which units of every group stay; and what one costs."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .errors import PlanError


class Ranking:
    """The units of every group, most important first: what all plans of one criterion are prefixes of."""

    def __init__(self, names: Sequence[str], orders: Sequence[NDArray[np.intp]]) -> None:
        """``orders``: for the group of each name, a permutation of its units."""
        self.names, self.orders = tuple(names), list(orders)
        #: For every group, the place of each unit in its order.
        self.ranks = [np.argsort(order) for order in self.orders]
        #: Positions of the groups by name, as plans list them.
        self.by_name = sorted(range(len(self.names)), key=self.names.__getitem__)
        self.sorted_names = tuple(sorted(self.names))

    def first(self, widths: Sequence[int]) -> list[NDArray[np.bool_]]:
        """Which units the plan keeps that keeps the ``widths`` most important ones, for every group in order."""
        return [rank < width for rank, width in zip(self.ranks, widths, strict=True)]


class Plan:
    """One point of a space. Hashable, and as JSON a dictionary of group names to kept unit indices (ascending).

    A plan that a space makes is a prefix of the space's ranking, and lists its units only when it is asked for them:
    thousands of plans are compared by their widths alone.
    """

    __slots__ = ("_fingerprint", "_kept", "_lengths", "_names", "_ranking")

    def __init__(self, kept: tuple[tuple[str, tuple[int, ...]], ...]) -> None:
        """``kept``: ascending units by group, in the order of the names; :meth:`of` sorts."""
        self._kept: tuple[tuple[str, tuple[int, ...]], ...] | None = kept
        self._ranking: Ranking | None = None
        self._names = tuple(name for name, _ in kept)
        self._lengths = tuple(len(units) for _, units in kept)
        self._fingerprint: str | None = None

    @classmethod
    def of(cls, kept: Mapping[str, Any]) -> Plan:
        return cls(tuple((name, tuple(sorted(int(unit) for unit in kept[name]))) for name in sorted(kept)))

    @classmethod
    def first(cls, ranking: Ranking, widths: Sequence[int]) -> Plan:
        """The plan that keeps the ``widths`` most important units, for every group of ``ranking`` in its order."""
        plan = cls.__new__(cls)
        plan._kept, plan._fingerprint, plan._ranking, plan._names = None, None, ranking, ranking.sorted_names
        plan._lengths = tuple([widths[position] for position in ranking.by_name])
        return plan

    @property
    def kept(self) -> tuple[tuple[str, tuple[int, ...]], ...]:
        if self._ranking is None:
            assert self._kept is not None
            return self._kept
        pairs = zip(self._ranking.by_name, self._lengths, strict=True)
        units = (tuple(np.sort(self._ranking.orders[position][:width]).tolist()) for position, width in pairs)
        return tuple(zip(self._names, units, strict=True))

    @property
    def widths(self) -> dict[str, int]:
        return dict(zip(self._names, self._lengths, strict=True))

    @property
    def fingerprint(self) -> str:
        """Sixteen hexadecimal digits that identify the kept units."""
        if self._fingerprint is None:
            text = json.dumps(self.to_json(), sort_keys=True)
            self._fingerprint = hashlib.sha256(text.encode()).hexdigest()[:16]
        return self._fingerprint

    def prefix_of(self, ranking: Ranking) -> list[int] | None:
        """The widths in the order of the ranking's groups, if this plan was made from ``ranking``; None otherwise."""
        if self._ranking is not ranking:
            return None
        widths = [0] * len(self._lengths)
        for position, width in zip(ranking.by_name, self._lengths, strict=True):
            widths[position] = width
        return widths

    def to_json(self) -> dict[str, list[int]]:
        return {name: list(units) for name, units in self.kept}

    @classmethod
    def from_json(cls, value: Any) -> Plan:
        """Raises PlanError if ``value`` is not what :meth:`to_json` returns."""
        if not isinstance(value, dict) or not all(_is_units(units) for units in value.values()):
            raise PlanError("a plan is a JSON object of group names to lists of distinct unit indices")
        return cls.of(value)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Plan):
            return NotImplemented
        if self._names != other._names or self._lengths != other._lengths:
            return False
        return (self._ranking is not None and self._ranking is other._ranking) or self.kept == other.kept

    def __hash__(self) -> int:
        return hash((self._names, self._lengths))

    def __repr__(self) -> str:
        return f"Plan(kept={self.kept!r})"

    def __reduce__(self) -> tuple[type[Plan], tuple[Any, ...]]:
        # The ranking belongs to one space of one process.
        return Plan, (self.kept,)


def _is_units(units: Any) -> bool:
    return isinstance(units, list) and all(type(u) is int and u >= 0 for u in units) and len(set(units)) == len(units)


@dataclass(frozen=True)
class Cost:
    """What a plan costs.

    ``macs``: multiply-accumulates of one forward pass on the example inputs (batch included). ``params``: number of
    parameters. ``memory_bytes``: peak of the activations alive at once in that pass, inputs included.
    ``size_bytes``: parameters and buffers.
    """

    macs: int
    params: int
    memory_bytes: int
    size_bytes: int

    @property
    def flops(self) -> int:
        """Two per multiply-accumulate."""
        return 2 * self.macs
