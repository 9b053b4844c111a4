"""What each ATen operator does with the labels of its arguments.

A rule takes a :class:`~prunefront.spaces.trace.Call`, unifies or freezes what the operator aligns or fixes, and
returns the label of every output tensor. An operator without a rule freezes all that it touches.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ..trace import Call, Label
from . import attention, contraction, normalisation, recurrent, routing, shape, spatial
from .pointwise import POINTWISE_NAMES, pointwise
from .unknown import unknown

Rule = Callable[[Call], list[Label]]

RULES: dict[str, Rule] = {
    **contraction.RULES,
    **normalisation.RULES,
    **recurrent.RULES,
    **routing.RULES,
    **shape.RULES,
    **spatial.RULES,
}

#: Functions that are labelled as one, whatever kernels run them: their arguments by name, and the rule.
FUNCTIONS: dict[str, tuple[Callable[[Any, dict[str, Any]], dict[str, Any]], Rule]] = {
    "scaled_dot_product_attention": (attention.bind, attention.fused_attention),
    **dict.fromkeys(recurrent.LAYERS, (recurrent.bind_layer, recurrent.layer)),
    **dict.fromkeys(recurrent.CELLS, (recurrent.bind_cell, recurrent.cell)),
    "_pad_packed_sequence": (recurrent.bind_unpack, recurrent.unpack),
}


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
