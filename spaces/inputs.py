"""The example inputs of a model, and the outputs that matter."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map


@dataclass(frozen=True)
class Inputs:
    """The arguments of one forward pass."""

    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] | None = None

    @classmethod
    def of(cls, example_inputs: Any) -> Inputs:
        """``example_inputs``: one tensor, a tuple or list of arguments, or a mapping of keyword arguments, as
        tokenizers return it."""
        if isinstance(example_inputs, Inputs):
            return example_inputs
        if isinstance(example_inputs, Mapping):
            return cls(kwargs=dict(example_inputs))
        return cls(args=tuple(example_inputs) if isinstance(example_inputs, tuple | list) else (example_inputs,))

    def call(self, model: nn.Module) -> Any:
        return model(*self.args, **(self.kwargs or {}))

    def map(self, function: Callable[[Any], Any]) -> Inputs:
        """``function`` applied to every leaf."""
        return Inputs(tree_map(function, self.args), None if self.kwargs is None else tree_map(function, self.kwargs))

    def leaves(self) -> list[Any]:
        return tree_leaves([self.args, dict(self.kwargs or {})])

    def tensors(self) -> list[torch.Tensor]:
        return [leaf for leaf in self.leaves() if isinstance(leaf, torch.Tensor)]


def output_tensors(output: Any) -> list[torch.Tensor]:
    """The tensors of what a model returns that its user is after.

    Of a Hugging Face output these are the logits where there are any: caches and hidden states are by-products, whose
    shape may change.
    """
    if isinstance(output, Mapping):
        output = output["logits"] if "logits" in output else [v for k, v in output.items() if k != "past_key_values"]
    return [leaf for leaf in tree_leaves(output) if isinstance(leaf, torch.Tensor)]
