"""Which rows of which parameters made a tensor: those that make queries take up what changes in an attention's scale.

Known by storage: what an operator has made of parameters, copies of that with the elements in other places, and what
rotary embeddings make of it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from .labels import Dimension, is_frozen

#: Parameters as (name, dimension), and rows of them.
Rows = tuple[list[tuple[str, int]], list[int]]
#: Operators that rotary embeddings are made of: they keep how their results grow with the queries.
_TURNING = {"mul", "add", "sub", "neg", "cat", "stack", "clone", "_to_copy"}


@dataclass
class Producer:
    """The parameters that an operator multiplied to make dimension ``dim`` of its output."""

    parameters: list[tuple[str, int]]
    stride: int
    size: int


@dataclass
class Copied:
    """How the elements of a copy lie in the memory that it was copied from."""

    #: Kept, so that no other tensor gets its place while it is asked for.
    memory: torch.UntypedStorage
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    source_strides: tuple[int, ...]
    source_offset: int

    @property
    def source(self) -> int:
        return int(self.memory._cdata)

    def offsets(self, offsets: torch.Tensor) -> torch.Tensor:
        """Offsets in the source of the elements at ``offsets`` in the copy."""
        found = torch.full_like(offsets, self.source_offset)
        for length, stride, other in zip(self.shape, self.strides, self.source_strides, strict=True):
            if length > 1:
                found += offsets // stride % length * other
        return found


class Origins:
    """Filled while the model runs. ``state``: parameters and buffers by name; ``parameter_of``: the name of the one
    that a tensor is a view of; ``label``: of a tensor."""

    def __init__(
        self,
        state: Mapping[str, torch.Tensor],
        parameter_of: Callable[[torch.Tensor], str | None],
        label: Callable[[torch.Tensor], Sequence[Dimension]],
    ) -> None:
        self._state, self._parameter_of, self._label = state, parameter_of, label
        self._producers: dict[int, Producer] = {}
        self._copies: dict[int, Copied] = {}
        self._turned: dict[int, Rows] = {}

    def forget(self, key: int) -> None:
        self._producers.pop(key, None)
        self._copies.pop(key, None)
        self._turned.pop(key, None)

    def note_producer(
        self, output: torch.Tensor, dim: int, weight: torch.Tensor, weight_dim: int, bias: torch.Tensor | None
    ) -> None:
        name = self._parameter_of(weight)
        if name is None:
            return
        held = self._state[name]
        strides = [d for d in range(held.dim()) if held.stride(d) == weight.stride(weight_dim)]
        if len(strides) != 1 or held.shape[strides[0]] != weight.shape[weight_dim]:
            return
        parameters = [(name, strides[0])]
        if bias is not None:
            bias_name = self._parameter_of(bias)
            if bias_name is None:
                return
            parameters.append((bias_name, 0))
        self._producers[storage_key(output)] = Producer(parameters, output.stride(dim), output.shape[dim])

    def note_bias(self, output: torch.Tensor, product: torch.Tensor, bias: torch.Tensor) -> None:
        """``output`` is the product of some parameters plus another one along its last dimension."""
        producer, name = self._producers.get(storage_key(product)), self._parameter_of(bias)
        if producer is not None and name is not None and bias.dim() == 1 and producer.size == len(bias):
            parameters = [*producer.parameters, (name, 0)]
            self._producers[storage_key(output)] = Producer(parameters, output.stride(-1), output.shape[-1])

    def note_copy(self, output: torch.Tensor, source: torch.Tensor) -> None:
        """``output`` holds the elements of ``source`` in other places."""
        if output.storage_offset() == 0 and storage_key(output) != storage_key(source):
            self._copies[storage_key(output)] = Copied(
                source.untyped_storage(),
                tuple(output.shape),
                tuple(output.stride()),
                tuple(source.stride()),
                int(source.storage_offset()),
            )

    def rows_of(self, tensor: torch.Tensor) -> Rows | None:
        """The parameters, and the rows of them, that made ``tensor``: a view or copy of what they made, or that turned
        and scaled."""
        # A complex number lies where two others were made.
        parts = 2 if tensor.is_complex() else 1
        offsets = torch.arange(parts) + parts * int(tensor.storage_offset())
        for length, stride, dimension in zip(tensor.shape, tensor.stride(), self._label(tensor), strict=True):
            # What has a place along a fixed dimension was made by the same rows as its neighbours there.
            steps = torch.arange(1 if is_frozen(dimension) else length) * parts * stride
            offsets = (offsets[:, None] + steps).reshape(-1)
        key = storage_key(tensor)
        while key in self._copies:
            offsets, key = self._copies[key].offsets(offsets), self._copies[key].source
        producer = self._producers.get(key)
        if producer is None:
            return self._turned.get(key)
        rows = (offsets // producer.stride) % producer.size
        return producer.parameters, sorted(set(rows.tolist()))

    def note_turned(self, operator: str, inputs: Sequence[torch.Tensor], output: torch.Tensor) -> None:
        """What a rotary embedding makes of queries grows with the rows that made these."""
        if operator not in _TURNING or output.dim() < 3 or self._parameter_of(output) is not None:
            return
        found = [rows for tensor in inputs if tensor.dim() > 2 and (rows := self.rows_of(tensor)) is not None]
        if found and all(parameters == found[0][0] for parameters, _ in found):
            self._turned[storage_key(output)] = found[0][0], sorted({row for _, rows in found for row in rows})


def storage_key(tensor: torch.Tensor) -> int:
    """Identifies the memory of ``tensor`` while it lives."""
    return int(tensor.untyped_storage()._cdata)
