"""The example inputs of a model, and the outputs that matter."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map

from .devices import moved
from .modes import EagerMode

#: Endings of the names of what Hugging Face models return beside their logits, and of what none is after.
CACHES = ("past_key_values", "cache_params")
BY_PRODUCTS = (*CACHES, "hidden_states", "hidden_state", "attentions", "router_logits", "router_probs", "loss")


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
        has_numbers = not any(tensor.is_meta for tensor in self.tensors())
        with nullcontext() if has_numbers else OrdinaryBranches():
            return model(*self.args, **(self.kwargs or {}))

    def call_or_raise(self, model: nn.Module, error_type: type[Exception], what: str, advice: str) -> Any:
        """As :meth:`call`; where the model rejects these arguments, ``error_type`` says so of ``what``."""
        try:
            return self.call(model)
        except Exception as error:
            shapes = [tuple(tensor.shape) for tensor in self.tensors()]
            told = f"(arguments of shapes {shapes}): {type(error).__name__}: {error}. {advice}"
            raise error_type(f"the model rejects {what} {told}") from error

    def map(self, function: Callable[[Any], Any]) -> Inputs:
        """``function`` applied to every leaf."""
        return Inputs(tree_map(function, self.args), None if self.kwargs is None else tree_map(function, self.kwargs))

    def only(self, names: frozenset[str] | None) -> Inputs:
        """Without keyword arguments of other names; None for all."""
        if names is None or not self.kwargs:
            return self
        return Inputs(self.args, {key: value for key, value in self.kwargs.items() if key in names})

    def accepted_by(self, model: nn.Module) -> Inputs:
        """Without keyword arguments that the forward does not name."""
        return self.only(argument_names(model)) if self.kwargs else self

    def to(self, device: torch.device | str) -> Inputs:
        return Inputs(moved(self.args, device), None if self.kwargs is None else moved(self.kwargs, device))

    def leaves(self) -> list[Any]:
        return tree_leaves([self.args, dict(self.kwargs or {})])

    def tensors(self) -> list[torch.Tensor]:
        return [leaf for leaf in self.leaves() if isinstance(leaf, torch.Tensor)]


def argument_names(model: nn.Module) -> frozenset[str] | None:
    """What the forward calls its arguments; None where it takes any. A batch may have more, such as labels."""
    parameters = inspect.signature(model.forward).parameters
    if any(parameter.kind == inspect.Parameter.VAR_KEYWORD for parameter in parameters.values()):
        return None
    return frozenset(parameters)


class OrdinaryBranches(EagerMode):
    """Without numbers, what a forward asks of all elements (``all``, or a sum that equals something) holds.

    So it does on ordinary inputs: Hugging Face's attention masks are left out where all positions follow each other and
    no token is padding. Any other question of a tensor's value is an error, as always on the meta device.
    """

    def __init__(self) -> None:
        super().__init__()
        self._asked: torch.Tensor | None = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name == "_local_scalar_dense" and args[0] is self._asked:
            return True
        result = func(*args, **(kwargs or {}))
        is_question = name in ("all", "eq") and result.is_meta and not result.dim()
        self._asked = result if is_question else None
        return result


def output_tensors(output: Any) -> list[torch.Tensor]:
    """The tensors of what a model returns that its user is after: those in tuples, lists, mappings, dataclasses and
    other objects, the logits first where some are named so.

    Of a Hugging Face output that has logits, hidden states and the like are by-products, whose shape may change; caches
    are in every one.
    """
    if isinstance(output, Mapping):
        is_of_transformers = any(base.__name__ == "ModelOutput" for base in type(output).__mro__)
        left_out = BY_PRODUCTS if is_of_transformers and "logits" in output else CACHES
        named = {key: value for key, value in output.items() if not str(key).endswith(left_out)}
        output = [named[key] for key in sorted(named, key=lambda key: key != "logits")]
    return [tensor for leaf in tree_leaves(output) for tensor in _tensors_in(leaf)]


def _tensors_in(leaf: Any, depth: int = 3) -> list[torch.Tensor]:
    """``leaf`` itself, or what an object that torch does not look into holds."""
    if isinstance(leaf, torch.Tensor):
        return [leaf]
    if isinstance(leaf, nn.Module | type) or not depth:
        return []
    held = tree_leaves(list(getattr(leaf, "__dict__", {}).values()))
    held += [getattr(leaf, name, None) for name in getattr(leaf, "__slots__", ())]
    return [tensor for inner in held for tensor in _tensors_in(inner, depth - 1)]
