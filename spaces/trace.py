"""Run the model once and label every dimension of every tensor that an operator touches."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary

from .errors import TraceError
from .labels import Dimension, fixed, freeze, fresh, size, unify

logger = logging.getLogger(__name__)

Label = list[Dimension]


@dataclass
class Work:
    """Multiply-accumulates of one operator: the product of the widths of ``dimensions``, times ``constant``."""

    constant: int
    dimensions: Label


@dataclass
class Storage:
    """One allocation of an activation."""

    itemsize: int
    label: Label


@dataclass
class IntegerSite:
    """An integer attribute that the forward reads and that must follow the width of ``dimension``."""

    module: str
    attribute: str
    dimension: Dimension


@dataclass
class Hint:
    """What an operator tells about a dimension: ``producer`` of it, its ``kind``, or that it is ``inexact``."""

    dimension: Dimension
    role: str
    text: str


@dataclass
class Trace:
    """Everything that one forward pass revealed. Labels are resolved when they are read."""

    parameters: dict[str, Label] = field(default_factory=dict)
    work: list[Work] = field(default_factory=list)
    #: Activations alive at once, after each operator that allocated.
    live: list[list[Storage]] = field(default_factory=list)
    sites: list[IntegerSite] = field(default_factory=list)
    hints: list[Hint] = field(default_factory=list)
    unknown_operators: set[str] = field(default_factory=set)


@dataclass
class Call:
    """One operator call, with its arguments by the name that the operator's schema gives them."""

    name: str
    arguments: dict[str, Any]
    outputs: list[torch.Tensor]
    module: str
    recorder: Recorder

    @property
    def why(self) -> str:
        return f"{self.name} in {self.module}" if self.module else self.name

    def __getitem__(self, argument: str) -> Any:
        return self.arguments[argument]

    def label(self, argument: str) -> Label:
        return self.recorder.label(self.arguments[argument])

    def tensors(self) -> list[torch.Tensor]:
        return [leaf for leaf in tree_leaves(list(self.arguments.values())) if isinstance(leaf, torch.Tensor)]

    def unify(self, left: Dimension, right: Dimension) -> None:
        unify(left, right, self.why)

    def freeze(self, dimension: Dimension, reason: str) -> None:
        freeze(dimension, f"{reason} ({self.why})")

    def hint(self, dimension: Dimension, role: str, text: str = "") -> None:
        self.recorder.trace.hints.append(Hint(dimension, role, text or self.module))

    def work(self, constant: int, *dimensions: Dimension) -> None:
        self.recorder.trace.work.append(Work(constant, list(dimensions)))

    def integer(self, value: int, dimension: Dimension) -> None:
        """The forward used ``value`` as a size of ``dimension``: attributes that hold it follow its width."""
        module = self.recorder.modules.get(self.module)
        for attribute, held in vars(module).items() if module is not None else ():
            if type(held) is int and held == value and value > 1:
                self.recorder.trace.sites.append(IntegerSite(self.module, attribute, dimension))


class Recorder(TorchDispatchMode):
    """Applies the rule of every operator, and keeps count of work and of live activations."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.trace = Trace()
        self.modules = dict(model.named_modules())
        self.names = {module: name for name, module in model.named_modules()}
        self.stack: list[str] = [""]
        self._labels = WeakTensorKeyDictionary()
        self._constants = {t.untyped_storage()._cdata for t in [*model.parameters(), *model.buffers()]}
        self._storages: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            label = [fresh(length) for length in tensor.shape]
            self._labels[tensor] = label
            self.trace.parameters[name] = label

    def label(self, tensor: torch.Tensor) -> Label:
        """The label of ``tensor``; one that no rule has seen is fixed."""
        if tensor not in self._labels:
            reason = "made inside the forward"
            self._labels[tensor] = [fixed(length, reason) for length in tensor.shape]
        return self._labels[tensor]

    def mark_input(self, value: Any) -> None:
        for tensor in _tensors(value):
            self._labels[tensor] = [fixed(length, "input of the model") for length in tensor.shape]
            self._allocate(tensor)

    def mark_output(self, value: Any) -> None:
        for tensor in _tensors(value):
            for dimension in self.label(tensor):
                freeze(dimension, "output of the model")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        from .rules import apply_rule

        result = func(*args, **(kwargs or {}))
        outputs = _tensors(result)
        arguments = _bind(func, args, kwargs or {})
        call = Call(func.overloadpacket.__name__, arguments, outputs, self.stack[-1], self)
        labels = apply_rule(func, call)
        for tensor, label in zip(outputs, labels, strict=True):
            if [size(dimension) for dimension in label] != list(tensor.shape):
                raise AssertionError(f"rule of {call.why} labelled {tuple(tensor.shape)} as {[size(d) for d in label]}")
            self._labels[tensor] = label
            self._allocate(tensor)
        self._note_live()
        return result

    def _allocate(self, tensor: torch.Tensor) -> None:
        key = tensor.untyped_storage()._cdata
        if key not in self._constants and tensor not in self._storages:
            self._storages[tensor] = (key, Storage(tensor.element_size(), self._labels[tensor]))

    def _note_live(self) -> None:
        owners: dict[int, Storage] = {}
        for key, storage in self._storages.values():
            known = owners.get(key)
            if known is None or _elements(storage) > _elements(known):
                owners[key] = storage
        self.trace.live.append(list(owners.values()))


def _elements(storage: Storage) -> int:
    total = storage.itemsize
    for dimension in storage.label:
        total *= size(dimension)
    return total


def _tensors(value: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, torch.Tensor)]


def _bind(func: Any, args: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
    bound = {}
    for position, argument in enumerate(func._schema.arguments):
        if position < len(args):
            bound[argument.name] = args[position]
        elif argument.name in kwargs:
            bound[argument.name] = kwargs[argument.name]
        else:
            bound[argument.name] = argument.default_value if argument.has_default_value() else None
    return bound


def record(model: nn.Module, example_inputs: tuple[Any, ...]) -> Trace:
    """Trace one forward pass of ``model`` in evaluation mode.

    Raises:
        TraceError: the model rejects the example inputs, or its output is not finite.
    """
    recorder = Recorder(model)
    recorder.mark_input(example_inputs)
    try:
        with evaluating(model), torch.no_grad(), _module_stack(recorder), recorder:
            output = model(*example_inputs)
    except AssertionError:
        raise
    except Exception as error:
        shapes = [tuple(tensor.shape) for tensor in _tensors(example_inputs)]
        raise TraceError(
            f"the model rejects the example inputs (shapes {shapes}): {type(error).__name__}: {error}. "
            "Pass example_inputs that model(*example_inputs) accepts"
        ) from error
    if not all(torch.isfinite(tensor).all() for tensor in _tensors(output) if tensor.is_floating_point()):
        raise TraceError("the model's output on the example inputs is not finite; nothing can be checked against it")
    recorder.mark_output(output)
    if recorder.trace.unknown_operators:
        logger.info("operators without a rule, frozen: %s", ", ".join(sorted(recorder.trace.unknown_operators)))
    return recorder.trace


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put ``model`` into evaluation mode, and every module back into its own mode afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextmanager
def _module_stack(recorder: Recorder) -> Iterator[None]:
    """Keep the name of the module that is running."""

    def enter(module: nn.Module, _: Any) -> None:
        recorder.stack.append(recorder.names.get(module, recorder.stack[-1]))

    def leave(module: nn.Module, _: Any, __: Any) -> None:
        recorder.stack.pop()

    before = nn.modules.module.register_module_forward_pre_hook(enter)
    after = nn.modules.module.register_module_forward_hook(leave)
    try:
        yield
    finally:
        before.remove()
        after.remove()
