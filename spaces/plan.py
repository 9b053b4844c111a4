"""A plan: which units of every group stay."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .errors import PlanError


@dataclass(frozen=True)
class Plan:
    """One point of a space. Hashable, and as JSON a dictionary of group names to kept unit indices (ascending)."""

    kept: tuple[tuple[str, tuple[int, ...]], ...]

    @classmethod
    def of(cls, kept: Mapping[str, Any]) -> Plan:
        return cls(tuple((name, tuple(sorted(int(unit) for unit in kept[name]))) for name in sorted(kept)))

    @property
    def widths(self) -> dict[str, int]:
        return {name: len(units) for name, units in self.kept}

    @property
    def fingerprint(self) -> str:
        """Sixteen hexadecimal digits that identify the kept units."""
        return hashlib.sha256(json.dumps(self.to_json(), sort_keys=True).encode()).hexdigest()[:16]

    def to_json(self) -> dict[str, list[int]]:
        return {name: list(units) for name, units in self.kept}

    @classmethod
    def from_json(cls, value: Any) -> Plan:
        """Raises PlanError if ``value`` is not what :meth:`to_json` returns."""
        if not isinstance(value, dict) or not all(_is_units(units) for units in value.values()):
            raise PlanError("a plan is a JSON object of group names to lists of distinct unit indices")
        return cls.of(value)


def _is_units(units: Any) -> bool:
    return isinstance(units, list) and all(type(u) is int and u >= 0 for u in units) and len(set(units)) == len(units)
