"""Copies of models: the user's own is never changed."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves


def copy_model(model: nn.Module, memo: dict[int, Any] | None = None) -> nn.Module:
    """A deep copy of ``model``; ``memo``: what takes the place of objects, by their id.

    Activations that modules keep as attributes come along without the graph that made them, which cannot be copied.
    """
    memo = {} if memo is None else memo
    for module in model.modules():
        for leaf in tree_leaves(list(vars(module).values())):
            if isinstance(leaf, torch.Tensor) and not leaf.is_leaf and id(leaf) not in memo:
                memo[id(leaf)] = leaf.detach().clone()
    return copy.deepcopy(model, memo)
