"""Run the model once and label every dimension of every tensor that an operator touches."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary

from .errors import TraceError
from .inputs import Inputs, output_tensors
from .labels import (
    Dimension,
    are_always_as_long,
    fixed,
    freeze,
    fresh,
    is_frozen,
    multiply,
    resolve,
    size,
    unify,
)
from .modes import EagerMode
from .origins import Origins, Rows, storage_key
from .residual import ModuleCalls, Stack
from .sizes import (
    CREATING,
    CREATING_LIKE,
    Site,
    SizeNotes,
    TracedInt,
    known_quotients,
    known_sizes,
    lengths_in_call,
    note_bounds,
    note_sizes,
    of_tensor,
    traced_in,
    traced_integers,
)

logger = logging.getLogger(__name__)

Label = list[Dimension]
#: Names of the modules that are running, outermost first; what is done inside a removed block is not done at all.
Scope = tuple[str, ...]


@dataclass
class Work:
    """Multiply-accumulates of one operator: the product of the widths of ``dimensions``, times ``constant``."""

    constant: int
    dimensions: Label
    scope: Scope


@dataclass
class Storage:
    """One allocation of an activation."""

    itemsize: int
    label: Label


@dataclass
class Moment:
    """The allocations alive after an operator."""

    storages: list[Storage]
    scope: Scope


@dataclass
class IntegerSite:
    """An integer attribute that the forward reads and that must follow the width of ``dimension``."""

    module: str
    attribute: str
    dimension: Dimension
    #: Whether a slice ended there.
    is_bound: bool = False


@dataclass
class ScaleSite:
    """An attention whose scale is computed from the width of ``head_dim``: the ``rows`` of dimension ``dim`` of the
    parameters, which make the queries, take up the change."""

    head_dim: Dimension
    parameters: list[tuple[str, int]]
    rows: list[int]


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
    #: By tensor, its names: modules may share it.
    names: dict[str, list[str]] = field(default_factory=dict)
    work: list[Work] = field(default_factory=list)
    live: list[Moment] = field(default_factory=list)
    #: Attributes whose meaning a rule knows.
    known_sites: list[IntegerSite] = field(default_factory=list)
    #: Attributes whose value equals the size of a dimension that their module has shaped.
    sites: list[IntegerSite] = field(default_factory=list)
    #: The same, seen in the calls themselves instead of concluded from equal values.
    given_sizes: list[IntegerSite] = field(default_factory=list)
    #: What else is known of attributes that give sizes.
    sizes: SizeNotes = field(default_factory=SizeNotes)
    scales: list[ScaleSite] = field(default_factory=list)
    #: Queries times keys: the dimension that is summed over, and what :meth:`.Origins.rows_of` says of one of them.
    scores: list[tuple[Dimension, Rows | None]] = field(default_factory=list)
    hints: list[Hint] = field(default_factory=list)
    calls: ModuleCalls = field(default_factory=ModuleCalls)
    unknown_operators: set[str] = field(default_factory=set)
    #: Blocks that can be taken out, stack by stack, and stacks that were refused, with the reason.
    blocks: list[Stack] = field(default_factory=list)
    refused_blocks: list[tuple[str, str]] = field(default_factory=list)


@dataclass
class Call:
    """One operator call, with its arguments by the name that the operator's schema gives them."""

    name: str
    arguments: dict[str, Any]
    outputs: list[torch.Tensor]
    recorder: Recorder

    @property
    def module(self) -> str:
        return self.recorder.stack[-1]

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

    def inexact(self, dimension: Dimension) -> None:
        """The operator's result depends on how many elements there are."""
        if not is_frozen(dimension):
            self.hint(dimension, "inexact", f"normalised by {self.why}")

    def work(self, constant: int, *dimensions: Dimension) -> None:
        """Multiply-accumulates: ``constant`` times the sizes of the output's dimensions and of the one summed over,
        which comes last."""
        self.recorder.trace.work.append(Work(constant, list(dimensions), tuple(self.recorder.stack)))

    def integer(self, value: int, dimension: Dimension, is_bound: bool = False) -> None:
        """The forward used ``value`` as a size of ``dimension``: attributes that hold it follow its width."""
        if value > 1 and not is_frozen(dimension):
            module = self.recorder.modules.get(self.module)
            for attribute, held in traced_in(module) if module is not None else ():
                if held == value:
                    self.recorder.trace.sites.append(IntegerSite(self.module, attribute, dimension, is_bound))

    def is_weight(self, argument: str) -> bool:
        return self.recorder.parameter_of(self.arguments[argument]) is not None

    def produced(self, dim: int, weight: str, weight_dim: int, bias: str | None) -> None:
        """Dimension ``dim`` of the output is made by dimension ``weight_dim`` of the argument ``weight``."""
        self.recorder.origins.note_producer(
            self.outputs[0], dim, self[weight], weight_dim, self[bias] if bias else None
        )


class Recorder(EagerMode):
    """Applies the rule of every operator, and keeps count of work and of live activations."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.trace = Trace()
        self.modules = dict(model.named_modules())
        self.names = {module: name for name, module in model.named_modules()}
        self.stack: list[str] = [""]
        self.muted = False
        #: The experts among which a router has chosen last.
        self.routed: Dimension | None = None
        #: Widths of heads, by the module that attends.
        self.head_dims: dict[str, list[Dimension]] = {}
        self._labels = WeakTensorKeyDictionary()
        self._storages = WeakTensorKeyDictionary()
        self._pending_softmax: list[tuple[Dimension, str]] = []
        self._used: set[str] = set()
        #: By storage, the bytes in which each parameter and buffer lies: several may share one.
        self._constants: dict[int, list[tuple[int, int, str]]] = {}
        self._state = dict([*model.named_parameters(), *model.named_buffers()])
        self.origins = Origins(self._state, self.parameter_of, self.label)
        for name, tensor in self._state.items():
            start = int(tensor.storage_offset()) * tensor.element_size()
            held = self._constants.setdefault(storage_key(tensor), [])
            held.append((start, start + tensor.nbytes, name))
            self._labels[tensor] = self.trace.parameters[name] = [fresh(length) for length in tensor.shape]
        first = {id(tensor): name for name, tensor in self._state.items()}
        every = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
        for name, tensor in every:
            self.trace.names.setdefault(first[id(tensor)], []).append(name)

    def label(self, tensor: torch.Tensor) -> Label:
        """The label of ``tensor``; one that no rule has seen is fixed."""
        if tensor not in self._labels:
            reason = "made inside the forward"
            self._labels[tensor] = [fixed(length, reason) for length in tensor.shape]
        label: Label = self._labels[tensor]
        return label

    def parameter_of(self, tensor: torch.Tensor) -> str | None:
        """The parameter or buffer that ``tensor`` is, or is a view of."""
        return next(self._lying_at(tensor), None)

    def _lying_at(self, tensor: torch.Tensor) -> Iterator[str]:
        """Names of all parameters and buffers that have the first element of ``tensor``."""
        held = self._constants.get(storage_key(tensor))
        if held is not None:
            place = tensor.storage_offset() * tensor.element_size()
            yield from (name for start, end, name in held if start <= place < end or len(held) == 1)

    def mark_input(self, tensors: list[torch.Tensor]) -> None:
        for tensor in tensors:
            self._labels[tensor] = [fixed(length, "input of the model") for length in tensor.shape]
            self._allocate(tensor)

    def finish(self, output: Any) -> None:
        """Freeze what the model returns, what it does not use, and softmaxes that are no routing."""
        for tensor in output_tensors(output):
            for dimension in self.label(tensor):
                freeze(dimension, "output of the model")
        self._tie_sizes()
        self._keep_scales()
        self._freeze_chosen()
        for name, label in self.trace.parameters.items():
            for dimension in label if name not in self._used else ():
                freeze(dimension, "not used on the example inputs")
        routed = {id(f) for h in self.trace.hints if h.text == "expert" for t in resolve(h.dimension) for f in t}
        for dimension, why in self._pending_softmax:
            if not all(id(f) in routed for term in resolve(dimension) for f in term):
                freeze(dimension, why)

    def _tie_sizes(self) -> None:
        """An attribute has one value: all dimensions that it gives the size of, or is compared with, are as long."""
        known: dict[Site, Dimension] = {}
        given = [((site.module, site.attribute), site.dimension) for site in self.trace.given_sizes]
        for site, dimension in [*given, *self.trace.sizes.equal]:
            tie(known.setdefault(site, dimension), dimension, f"{site[1]} of {site[0] or 'the model'}")

    def _keep_scales(self) -> None:
        """Scales of attentions that the forward computes from the width of a head, as fused kernels do too: the weights
        that make the queries must take up the change, where they can be found."""
        by_site = {(site.module, site.attribute): site.dimension for site in self.trace.given_sizes}
        known = [by_site.get(found, ()) if isinstance(found[0], str) else found for found in self.trace.sizes.scaled_by]
        widths = {resolve(dimension) for dimension in known if dimension and not is_frozen(dimension)}
        for dimension, queries in self.trace.scores:
            if resolve(dimension) in widths:
                self.keep_scale(dimension, queries)

    def keep_scale(self, head_dim: Dimension, queries: Rows | None) -> None:
        if queries is None:
            freeze(head_dim, "the attention's scale is computed from it")
        else:
            self.trace.scales.append(ScaleSite(head_dim, *queries))

    def _freeze_chosen(self) -> None:
        """What layers go on to read is no choice among experts, although the largest of it were taken."""
        read = {
            id(factor)
            for label in self.trace.parameters.values()
            if len(label) == 2
            for term in resolve(label[1])
            for factor in term
        }
        for hint in self.trace.hints:
            if hint.text == "expert" and any(id(f) in read for term in resolve(hint.dimension) for f in term):
                freeze(hint.dimension, "the largest of it are chosen")

    def await_routing(self, dimension: Dimension, why: str) -> None:
        """Freeze ``dimension`` in the end unless it turns out to be the experts of a router."""
        self._pending_softmax.append((dimension, why))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        from .rules import has_rule

        if not has_rule(func):  # inside torch.inference_mode, operators come whole that are others elsewhere
            with self:
                result = func.decompose(*args, **(kwargs or {}))
            if result is not NotImplemented:
                return result
        result = func(*args, **(kwargs or {}))
        if not self.muted:
            self.record(func, _bind(func, args, kwargs or {}), result)
        return result

    def record(self, func: Any, arguments: dict[str, Any], result: Any) -> None:
        """Label the outputs of one operator."""
        from .rules import apply_rule

        outputs = _tensors(result)
        call = Call(func.overloadpacket.__name__, arguments, outputs, self)
        held = {storage_key(tensor) for tensor in call.tensors()}
        for tensor in outputs:
            if (key := storage_key(tensor)) not in held:
                self.origins.forget(key)  # memory is used again: what was known is about a dead tensor
        self.label_outputs(call, partial(apply_rule, func))

    def label_outputs(self, call: Call, rule: Callable[[Call], list[Label]]) -> None:
        from .rules.unknown import unknown

        try:
            labels = rule(call)
            _check_labels(call, labels)
        except Exception as error:  # ours: it must cost no more than what the operator touches
            logger.warning("the rule of %s fails, and what it touches is frozen: %s", call.why, error)
            labels = unknown(call)
        for tensor, label in zip(call.outputs, labels, strict=True):
            self._labels[tensor] = label
            self._allocate(tensor)
        for tensor in call.outputs[:1]:
            self.origins.note_turned(call.name, call.tensors(), tensor)
        inputs = call.tensors()
        for tensor in inputs:
            self._used.update(self._lying_at(tensor))
        self.trace.calls.operator(call.name, inputs, call.outputs)
        self._note_live()

    def _allocate(self, tensor: torch.Tensor) -> None:
        key = storage_key(tensor)
        if key not in self._constants and tensor not in self._storages:
            self._storages[tensor] = (key, Storage(tensor.element_size(), self._labels[tensor]))

    def _note_live(self) -> None:
        owners: dict[int, Storage] = {}
        for key, storage in self._storages.values():
            known = owners.get(key)
            if known is None or _elements(storage) > _elements(known):
                owners[key] = storage
        self.trace.live.append(Moment(list(owners.values()), tuple(self.stack)))


class FunctionRecorder(TorchFunctionMode):
    """Sees what operators no longer show: which attributes gave the sizes, and whether an attention's scale is given.

    Fused attention and recurrent layers are labelled as one operator, whatever kernels run them.
    """

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self.recorder = recorder

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        from .rules import FUNCTIONS

        name = getattr(func, "__name__", "")
        if name in FUNCTIONS:
            return self._as_one(func, *FUNCTIONS[name], args, kwargs or {})
        return self._with_sizes(func, name, args, kwargs or {}, func(*args, **(kwargs or {})))

    def _with_sizes(self, func: Any, name: str, args: Any, kwargs: dict[str, Any], result: Any) -> Any:
        """Learn from the sizes that the call is given; ``result``, or where it is a tensor's size, what knows that."""
        notes = self.recorder.trace.sizes
        if getattr(func, "__self__", None) is torch.Tensor.shape:
            return of_tensor(result, self.recorder.label(args[0]), notes)
        if func is torch.Tensor.size:
            known = of_tensor(args[0].shape, self.recorder.label(args[0]), notes)
            return known if isinstance(result, torch.Size) else known[args[1] if len(args) > 1 else kwargs["dim"]]
        if name == "__getitem__":
            note_bounds(args[1], notes)
        note_sizes(name, args, kwargs, notes)
        given = list(lengths_in_call(name, args, kwargs, result))
        for length, (tensor, dim) in known_sizes(given, notes):
            if name in (*CREATING, *CREATING_LIKE):
                self.recorder.label(tensor)[dim] = fresh(tensor.shape[dim])
            self._follow(length, self.recorder.label(tensor)[dim], name)
        for dimension, places in known_quotients(given, notes):
            tie(dimension, multiply([self.recorder.label(tensor)[dim] for tensor, dim in places]), f"{name} by sizes")
        return result

    def _follow(self, length: TracedInt, dimension: Dimension, name: str) -> None:
        """``dimension`` is as long as ``length`` says."""
        if length.site is not None:
            self.recorder.trace.given_sizes.append(IntegerSite(*length.site, dimension))
        elif length.dimension is not None:
            tie(length.dimension, dimension, f"{name} by sizes")

    def _as_one(self, func: Any, bind: Any, rule: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        self.recorder.muted = True
        try:
            result = func(*args, **kwargs)
        finally:
            self.recorder.muted = False
        call = Call(func.__name__, bind(args, kwargs), _tensors(result), self.recorder)
        self.recorder.label_outputs(call, rule)
        return result


def tie(one: Dimension, other: Dimension, why: str) -> None:
    """Both are as long, and more is not known of them: a shuffle of channels leaves their order free."""
    if not are_always_as_long(one, other):
        unify(one, other, why)


def _elements(storage: Storage) -> int:
    total = storage.itemsize
    for dimension in storage.label:
        total *= size(dimension)
    return total


def _check_labels(call: Call, labels: list[Label]) -> None:
    sizes = [[size(dimension) for dimension in label] for label in labels]
    if sizes != (shapes := [list(tensor.shape) for tensor in call.outputs]):
        raise AssertionError(f"it labels {shapes} as {sizes}")


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


def record(model: nn.Module, example_inputs: Any) -> Trace:
    """Trace one forward pass of ``model`` in evaluation mode.

    Raises:
        TraceError: the model rejects the example inputs, or its output is not finite.
    """
    inputs = Inputs.of(example_inputs)
    recorder = Recorder(model)
    recorder.mark_input(inputs.tensors())
    try:
        with (
            evaluating(model),
            keeping_buffers(model),
            torch.inference_mode(False),
            torch.no_grad(),
            _module_stack(recorder),
            traced_integers(recorder.modules, recorder.trace.sizes),
            FunctionRecorder(recorder),
            recorder,
        ):
            output = inputs.call(model)
    except Exception as error:
        shapes = [tuple(tensor.shape) for tensor in inputs.tensors()]
        raise TraceError(
            f"the model rejects the example inputs (shapes {shapes}): {type(error).__name__}: {error}. "
            "Pass example_inputs that the model accepts: a tensor, a tuple of arguments, or a dictionary of them"
        ) from error
    if not output_tensors(output):
        raise TraceError(
            f"no tensor is found in the {type(output).__name__} that the model returns: return tensors, alone or in "
            "tuples, lists, dictionaries or dataclasses"
        )
    if not all(_is_finite(tensor) for tensor in output_tensors(output)):
        raise TraceError("the model's output on the example inputs is not finite; nothing can be checked against it")
    recorder.finish(output)
    if recorder.trace.unknown_operators:
        logger.info("operators without a rule, frozen: %s", ", ".join(sorted(recorder.trace.unknown_operators)))
    return recorder.trace


def _is_finite(tensor: torch.Tensor) -> bool:
    return tensor.is_meta or not tensor.is_floating_point() or bool(torch.isfinite(tensor).all())


@contextmanager
def keeping_buffers(model: nn.Module) -> Iterator[None]:
    """Put back what a forward changes in buffers: counters, caches."""
    held = [(module, name, tensor) for module in model.modules() for name, tensor in module._buffers.items()]
    values = [None if tensor is None or tensor.is_meta else tensor.clone() for _, _, tensor in held]
    try:
        yield
    finally:
        known = {(id(module), name) for module, name, _ in held}
        for module in model.modules():
            for name in [name for name in module._buffers if (id(module), name) not in known]:
                delattr(module, name)  # the forward makes it again
        with torch.no_grad():
            for (module, name, tensor), value in zip(held, values, strict=True):
                module._buffers[name] = tensor
                if tensor is not None and value is not None and not torch.equal(tensor, value):
                    tensor.copy_(value)


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
    """Keep the names of the modules that are running, and what goes in and out of each."""
    calls = recorder.trace.calls

    def enter(module: nn.Module, args: Any, kwargs: Any) -> None:
        name = recorder.names[module]
        recorder.stack.append(name)
        calls.enter(name, args, kwargs)

    def leave(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        calls.leave(recorder.stack.pop(), output)

    with ExitStack() as hooks:
        for module in recorder.modules.values():
            _add(hooks, module.register_forward_pre_hook(enter, prepend=True, with_kwargs=True))
            _add(hooks, module.register_forward_hook(leave, with_kwargs=True))
        yield


def _add(hooks: ExitStack, handle: Any) -> None:
    remove: Callable[[], None] = handle.remove
    hooks.callback(remove)
