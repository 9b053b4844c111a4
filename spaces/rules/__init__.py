"""What each ATen operator does with the labels of its arguments.

A rule takes a :class:`~prunefront.spaces.trace.Call`, unifies or freezes what the operator aligns or fixes, and
returns the label of every output tensor. An operator without a rule freezes all that it touches.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ..trace import Call, Label
from . import contraction, normalisation, routing, shape, spatial
from .pointwise import POINTWISE_NAMES, pointwise
from .unknown import unknown

Rule = Callable[[Call], list[Label]]

RULES: dict[str, Rule] = {**contraction.RULES, **normalisation.RULES, **routing.RULES, **shape.RULES, **spatial.RULES}


def apply_rule(func: Any, call: Call) -> list[Label]:
    """The labels of the outputs of ``func``."""
    name = _name(func)
    return RULES[name](call) if name in RULES else pointwise(call) if has_rule(func) else unknown(call)


def has_rule(func: Any) -> bool:
    name = _name(func)
    return name in RULES or torch.Tag.pointwise in func.tags or name in POINTWISE_NAMES


def _name(func: Any) -> str:
    """Operators that work in place have the rules of the others."""
    name: str = func.overloadpacket.__name__
    return name[:-1] if name not in RULES and name.endswith("_") else name
