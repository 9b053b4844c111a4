"""What of a model may be searched, and in which steps: the user's choices."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from .errors import ConfigError
from .groups import KINDS, Group

#: Kinds for which a lone ``round_to`` is meant; heads, groups, blocks and experts are counted one by one.
ROUNDED_KINDS = ("channel", "neuron", "hidden")


@dataclass(frozen=True)
class Options:
    """``kinds``: None for all. ``include`` and ``exclude``: patterns of group names (``layer?.*``).

    ``min_ratio`` and ``max_ratio``: the share of a group's units that is removed at least and at most. ``round_to``:
    widths are multiples of this. The last three are one value, or values by kind or name pattern. ``uniform``: groups
    of one kind and size have one width, and what the configuration of a Hugging Face model cannot say stays as it is.
    """

    kinds: Sequence[str] | None = None
    include: Sequence[str] = ("*",)
    exclude: Sequence[str] = ()
    min_ratio: float | Mapping[str, float] = 0.0
    max_ratio: float | Mapping[str, float] = 1.0
    round_to: int | Mapping[str, int] = 1
    uniform: bool = False

    def to_json(self) -> dict[str, Any]:
        """The options as plain JSON values."""
        plain: dict[str, Any] = json.loads(json.dumps({key: _plain(value) for key, value in vars(self).items()}))
        return plain

    def check(self, names: Sequence[str]) -> None:
        """Raises ConfigError for an unknown kind, a pattern that matches nothing, or a value out of range."""
        check_kinds(self.kinds or ())
        patterns = [p for p in (*self.include, *self.exclude) if p != "*"]
        for name, kind, low, high in (
            ("min_ratio", float, 0, 1),
            ("max_ratio", float, 0, 1),
            ("round_to", int, 1, sys.maxsize),
        ):
            for key, number in _items(getattr(self, name)):
                if type(number) not in (int, kind) or not low <= number <= high:
                    of = f"{name} of {key}" if key else name
                    wanted = "a whole number of at least 1" if kind is int else "a number in 0..1"
                    raise ConfigError(f"{of} must be {wanted}, not {number!r}")
                patterns += [key] if key and key != "default" and key not in KINDS else []
        for pattern in patterns:
            if not any(fnmatchcase(name, pattern) for name in names):
                known = f"{', '.join(names)}; kinds are {', '.join(KINDS)}"
                raise ConfigError(f"no group is called {pattern!r}; this model has {known}")

    def excludes(self, group: Group) -> str | None:
        """Why ``group`` is not to be searched, or None."""
        if self.kinds is not None and group.kind not in self.kinds:
            return f"kind {group.kind} is not among the space's kinds"
        if not any(fnmatchcase(group.name, pattern) for pattern in self.include):
            return "not included in the space"
        if any(fnmatchcase(group.name, pattern) for pattern in self.exclude):
            return "excluded from the space"
        return None

    def step(self, group: Group) -> int:
        """Widths of ``group`` are multiples of this, at most its size."""
        default = self.round_to if isinstance(self.round_to, int) else self.round_to.get("default", 1)
        fallback = default if group.kind in ROUNDED_KINDS else 1
        return min(group.size, math.lcm(group.multiple_of, int(_special(self.round_to, group, fallback))))

    def bounds(self, group: Group) -> tuple[int, int]:
        """The smallest and the largest width of ``group``: multiples of its step, or its whole size."""
        step = self.step(group)
        most = _special(self.max_ratio, group, _default(self.max_ratio, 1.0))
        least = _special(self.min_ratio, group, _default(self.min_ratio, 0.0))
        low = max(step, group.at_least, math.ceil(round((1 - most) * group.size, 9)))
        low = min(group.size, math.ceil(low / step) * step)
        high = group.size if least == 0 else math.floor(round((1 - least) * group.size, 9)) // step * step
        if high < low:
            raise ConfigError(
                f"{group.name}: no multiple of {step} lies between the widths that max_ratio={most} and "
                f"min_ratio={least} allow for its {group.size} units"
            )
        return low, high


def check_kinds(kinds: Sequence[str]) -> None:
    """Raises ConfigError for an unknown kind."""
    if isinstance(kinds, str) or (unknown := sorted(set(kinds) - set(KINDS))):
        wrong = kinds if isinstance(kinds, str) else ", ".join(unknown)
        raise ConfigError(f"unknown kinds {wrong!r}; expected a list of {', '.join(KINDS)}")


def _plain(value: Any) -> Any:
    return dict(value) if isinstance(value, Mapping) else list(value) if isinstance(value, tuple) else value


def _items(value: float | Mapping[str, float]) -> list[tuple[str, float]]:
    return [(str(key), number) for key, number in value.items()] if isinstance(value, Mapping) else [("", value)]


def _default(value: float | Mapping[str, float], otherwise: float) -> float:
    return value.get("default", otherwise) if isinstance(value, Mapping) else value


def _special(value: float | Mapping[str, float], group: Group, otherwise: float) -> float:
    """By name pattern (the last that matches), else by kind, else ``otherwise``."""
    if not isinstance(value, Mapping):
        return otherwise
    patterns = [key for key in value if key not in (*KINDS, "default") and fnmatchcase(group.name, key)]
    return value[patterns[-1]] if patterns else value.get(group.kind, otherwise)
