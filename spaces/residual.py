"""Which modules add a branch to what they are given: the blocks that can be taken out whole.

While the model runs, every tensor is given a number, and remembers the numbers of the tensors that reach it unchanged
but for additions: through the identity, views, sums and rectifiers (``exact``), through layer normalisation too
(``normed``), and through elementwise products (``near``). A module is a residual block if its input reaches its own
output so, and a branch if its output is added to a tensor from which its input was derived.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary

Numbers = frozenset[int]

#: The output holds the input's values, perhaps with something added, or rectified: a second rectifier changes nothing.
_EXACT = {"add", "view", "_unsafe_view", "reshape", "permute", "transpose", "t", "clone", "_to_copy", "detach", "alias"}
_EXACT |= {"unsqueeze", "squeeze", "contiguous", "native_dropout", "dropout", "relu", "lift_fresh"}
_POOLS = {"max_pool2d_with_indices", "max_pool2d", "avg_pool2d", "adaptive_avg_pool2d", "_adaptive_avg_pool2d", "mean"}
_NORMED = {"native_layer_norm", "_fused_rms_norm"}
_PLAIN = (bool, int, float, str, type(None))
_NEAR = {"mul", "native_batch_norm", "_native_batch_norm_legit_no_training", "native_group_norm"}


@dataclass(frozen=True)
class Reach:
    """Numbers of the tensors that reach one tensor, itself included."""

    number: int
    exact: Numbers
    normed: Numbers
    near: Numbers
    #: Those of ``normed`` with a sum on the way, and with a rectifier.
    summed: Numbers
    rectified: Numbers
    #: Nothing in the tensor is negative, so that a rectifier is the identity.
    positive: bool


@dataclass(frozen=True)
class ModuleCall:
    """One call of a module: what reached its first tensor argument and its first output, if of the same shape."""

    name: str
    source: Reach
    result: Reach
    #: Length of the tuple that it returned, or None for a lone tensor.
    length: int | None


@dataclass
class ModuleCalls:
    """Filled while the model runs."""

    finished: list[ModuleCall] = field(default_factory=list)
    sums: list[tuple[Reach, Reach]] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=dict)
    _open: list[tuple[torch.Tensor | None, Reach | None]] = field(default_factory=list)
    _reach: WeakTensorKeyDictionary = field(default_factory=WeakTensorKeyDictionary)
    _last: int = 0

    def reach(self, tensor: torch.Tensor) -> Reach:
        if tensor not in self._reach:
            self._reach[tensor] = self._new([])
        found: Reach = self._reach[tensor]
        return found

    def operator(self, name: str, inputs: list[torch.Tensor], outputs: list[torch.Tensor]) -> None:
        plain = name.removesuffix("_")
        sources = [self.reach(tensor) for tensor in inputs if len(outputs) and tensor.numel() == outputs[0].numel()]
        if plain == "add" and len(sources) == 2:
            self.sums.append((sources[0], sources[1]))
        level = 3 if plain in _EXACT else 2 if plain in _NORMED else 1 if plain in _NEAR else 0
        for position, tensor in enumerate(outputs):
            self._reach[tensor] = self._new(sources if position == 0 else [], level, plain)
            if position == 0 and inputs and plain in _POOLS:
                self._reach[tensor] = replace(self._reach[tensor], positive=self.reach(inputs[0]).positive)

    def _new(self, sources: list[Reach], level: int = 0, name: str = "") -> Reach:
        self._last += 1
        own = frozenset((self._last,))
        return Reach(
            self._last,
            own.union(*(source.exact for source in sources if level >= 3)),
            own.union(*(source.normed for source in sources if level >= 2)),
            own.union(*(source.near for source in sources if level >= 1)),
            frozenset().union(*(source.normed if name == "add" else source.summed for source in sources if level >= 2)),
            frozenset().union(*(s.normed if name == "relu" else s.rectified for s in sources if level >= 2)),
            name == "relu" or (level >= 3 and bool(sources) and all(source.positive for source in sources)),
        )

    def enter(self, name: str, args: Any, kwargs: Any) -> None:
        self.counts[name] = self.counts.get(name, 0) + 1
        tensor = first_tensor([args, kwargs])
        self._open.append((tensor, None if tensor is None else self.reach(tensor)))

    def leave(self, name: str, output: Any) -> None:
        tensor, source = self._open.pop()
        result = first_tensor(output)
        if source is not None and tensor is not None and result is not None and tensor.shape == result.shape:
            length = len(output) if isinstance(output, tuple | list) else None
            self.finished.append(ModuleCall(name, source, self.reach(result), length))

    def residual_blocks(self) -> dict[str, bool]:
        """Modules whose output is their input plus branches; whether without a normalisation on the way."""
        found = {}
        for call in self.finished:
            changed = call.source.number in call.result.rectified and not call.source.positive
            if call.source.number in call.result.summed and not changed:
                found[call.name] = call.source.number in call.result.exact
        return {name: exact for name, exact in found.items() if self.counts[name] == 1}

    def branches(self) -> set[str]:
        """Modules whose output is added to a tensor that their input was derived from."""
        return {call.name for call in self.finished if self.counts[call.name] == 1 and self._is_branch(call)}

    def _is_branch(self, call: ModuleCall) -> bool:
        made = call.result.number
        return any(
            made in branch.near and made not in stream.near and stream.near & call.source.near
            for one, other in self.sums
            for stream, branch in ((one, other), (other, one))
        )


class Substitute(nn.Module):
    """Stands for a removed part of a layer: hands on its first tensor argument (``skip``), or zeros of its shape.

    It has the plain attributes of the ``original`` and none of its parameters, since layers ask for both before they
    call it (``self_attn.batch_first``, ``self_attn.in_proj_bias is None``).
    """

    def __init__(self, original: nn.Module, skip: bool, length: int | None) -> None:
        super().__init__()
        state = vars(original).items()
        vars(self).update({key: value for key, value in state if type(value) in _PLAIN and key not in vars(self)})
        for name in original._parameters:
            self.register_parameter(name, None)
        self.skip, self.length = skip, length

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        tensor = first_tensor([args, kwargs])
        if tensor is None:
            raise TypeError("a removed block was called without a tensor")
        result = tensor if self.skip else torch.zeros_like(tensor)
        return result if self.length is None else (result, *[None] * (self.length - 1))


@dataclass(frozen=True)
class Stack:
    """Blocks of one class in one container, in the order of the container: the units of a group of kind block."""

    name: str
    modules: tuple[str, ...]
    exact: bool
    #: What takes the place of each unit: None if it is taken out of its container.
    substitutes: tuple[Substitute, ...] | None


def find_stacks(model: nn.Module, calls: ModuleCalls) -> list[Stack]:
    """Stacks of whole layers, each followed by the stacks of their parts (attention, feed-forward, branches).

    Layers are the outermost residual blocks in a container (:class:`torch.nn.Sequential` or
    :class:`torch.nn.ModuleList`); the parts of a layer are the outermost blocks and branches inside it. A stack has two
    units or more, since the last one is never removed.
    """
    modules = dict(model.named_modules())
    # A part without parameters costs next to nothing, and there is nothing in it to set to zero for its proof.
    heavy = {name for name, module in modules.items() if next(module.parameters(), None) is not None}
    blocks = {name: exact for name, exact in calls.residual_blocks().items() if name in heavy}
    branches = calls.branches() & heavy
    # A sequence of blocks adds up as a whole too; what can go one by one are the blocks in it.
    sequences = {name.rpartition(".")[0] for name in blocks}
    blocks = {n: e for n, e in blocks.items() if n not in sequences or not isinstance(modules[n], nn.Sequential)}
    layers = _layers({name for name in blocks if _in_container(name, modules)}, modules)
    parts = _outermost(n for n in [*blocks, *branches] if n not in layers and _inside(n, layers))
    stacks: dict[tuple[str, type], list[str]] = {}
    for name in modules:
        if name in layers:
            stacks.setdefault(_stack_of(name, modules), []).append(name)
    for name in modules:
        if name in parts:
            layer = next(layer for layer in layers if _inside(name, [layer]))
            container = layer.rpartition(".")[0]
            key = f"{container}.*{name[len(layer) :]}".lstrip(".")
            stacks.setdefault((key, type(modules[name])), []).append(name)
    lengths = {call.name: call.length for call in calls.finished}

    def stack(name: str, units: list[str]) -> Stack:
        exact = all(blocks.get(unit, True) for unit in units)
        if units[0] in layers:
            return Stack(name or "blocks", tuple(units), exact, None)
        substitutes = tuple(Substitute(modules[unit], unit in blocks, lengths[unit]) for unit in units)
        return Stack(name, tuple(units), exact, substitutes)

    return [stack(name, units) for (name, _), units in stacks.items() if len(units) > 1]


def _layers(candidates: set[str], modules: dict[str, nn.Module]) -> set[str]:
    """The outermost of the candidates, but for those that are alone in their container around several others: a whole
    encoder adds up to a residual block too."""
    while True:
        layers = _outermost(candidates)
        counts = Counter(_stack_of(name, modules) for name in layers)
        alone = {name for name in layers if counts[_stack_of(name, modules)] == 1}
        wrappers = {name for name in alone if any(_inside(other, [name]) for other in candidates)}
        if not wrappers:
            return layers
        candidates = candidates - wrappers


def _stack_of(name: str, modules: dict[str, nn.Module]) -> tuple[str, type]:
    return name.rpartition(".")[0], type(modules[name])


def _outermost(names: Iterable[str]) -> set[str]:
    found = set(names)
    return {name for name in found if not _inside(name, found - {name})}


def _inside(name: str, others: Iterable[str]) -> bool:
    return any(name.startswith(f"{other}.") for other in others)


def _in_container(name: str, modules: dict[str, nn.Module]) -> bool:
    parent = modules[name.rpartition(".")[0]] if name else None
    return isinstance(parent, nn.Sequential | nn.ModuleList)


def first_tensor(value: Any) -> torch.Tensor | None:
    return next((leaf for leaf in tree_leaves(value) if isinstance(leaf, torch.Tensor)), None)
