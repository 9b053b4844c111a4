"""First-order effects on the loss of every unit's parameters, and of gates on what its consumers multiply."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from ..calibration import Calibration
from ..consumers import Call, Watcher
from ..devices import device_of
from ..errors import CalibrationError
from ..groups import Structure, groups_in
from ..inputs import Inputs, output_tensors
from ..trace import evaluating
from ..units import by_unit, positions
from .blocks import adds_itself, block_calls

_Array = NDArray[np.float64]


@dataclass
class Sensitivity:
    """Means over the data, one array ``(size,)`` a group.

    ``squared_sums``: over batches, of the square of the sum of gradient x weight. ``sums_of_squares``: over batches, of
    the sum of (gradient x weight)^2. ``gates``: over samples, of the absolute gradient of a gate; None without any.
    """

    squared_sums: list[_Array]
    sums_of_squares: list[_Array]
    gates: list[_Array | None]


def sensitivity(model: nn.Module, structure: Structure, calibration: Calibration, seed: int = 0) -> Sensitivity:
    """One pass with gradients of ``calibration`` over ``model``, in evaluation mode and left as it was.

    Without a loss the gradients are those of a random probe, the sum over the model's outputs ``o`` of ``<o, r> / |o|``
    with ``r`` standard normal: their squares are in expectation the squared relative change of the output, which is
    the diagonal of the Gauss-Newton matrix of a squared error (Hutchinson 1990, A Stochastic Estimator of the Trace).

    Raises:
        CalibrationError: the loss is no scalar, or depends on no parameter.
    """
    gradients = _Pass(model, structure)
    generator = torch.Generator(device_of(model)).manual_seed(seed)
    with evaluating(model), _differentiable(model), torch.enable_grad(), _recurrent_gradients(model):
        for batch in calibration.batches:
            inputs = calibration.inputs(batch)
            with calibration.precision(model):
                output = gradients.forward(inputs)
                loss = _probe(output, generator) if calibration.loss is None else calibration.loss(output, batch)
            gradients.backward(_checked(loss))
    return gradients.result()


@dataclass
class _Pass:
    model: nn.Module
    structure: Structure
    batches: int = 0
    samples: int = 0
    squared_sums: list[_Array] = field(init=False)
    sums_of_squares: list[_Array] = field(init=False)
    gates: list[_Array] = field(init=False)
    #: Groups with a gate.
    gated: set[int] = field(default_factory=set)
    #: Of this batch, by group and number of samples: gradients of gates, ``(samples, size)``.
    signed: dict[tuple[int, int], torch.Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        groups = self.structure.groups
        self.squared_sums, self.sums_of_squares, self.gates = (
            [np.zeros(group.size) for group in groups] for _ in range(3)
        )
        self.blocks = {block: (g, u) for g, group in enumerate(groups) for u, block in enumerate(group.blocks)}
        self.reached = {
            (name, dim): {g: positions(self.structure, name, dim, g) for g in groups_in(layout)}
            for name, layouts in self.structure.tensors.items()
            for dim, layout in enumerate(layouts)
        }
        self.parameters = {
            name: parameter
            for name, parameter in self.model.named_parameters()
            if parameter.is_floating_point()
            and (self.structure.owners[name] or any(self.reached[name, dim] for dim in range(parameter.dim())))
        }

    def forward(self, inputs: Inputs) -> Any:
        tensors = inputs.tensors()
        self.size = len(tensors[0]) if tensors and tensors[0].dim() else 1
        with block_calls(self.model, self.blocks, self.add_block), _Gates(self):
            return inputs.call(self.model)

    def backward(self, loss: torch.Tensor) -> None:
        parameters = list(self.parameters.items())
        found = torch.autograd.grad(loss, [parameter for _, parameter in parameters], allow_unused=True)
        sums = [np.zeros_like(total) for total in self.squared_sums]
        for (name, parameter), gradient in zip(parameters, found, strict=True):
            if gradient is not None:
                products = gradient.detach().float() * parameter.detach().float()
                self.add_parameter(name, products, sums)
                self.add_parameter(name, products.square_(), self.sums_of_squares)
        for total, values in zip(self.squared_sums, sums, strict=True):
            total += values**2
        for (group, _), signed in self.signed.items():
            self.gates[group] += signed.abs().sum(0).cpu().numpy()
        self.gated |= {group for group, _ in self.signed}
        self.signed.clear()
        self.batches += 1
        self.samples += self.size

    def add_parameter(self, name: str, values: torch.Tensor, totals: list[_Array]) -> None:
        """Add ``values`` up by unit; each counts once for a unit that it belongs to by two dimensions."""
        for dim in range(values.dim()):
            for group, places in self.reached[name, dim].items():
                totals[group] += by_unit(_sum_to(values, dim), places).cpu().numpy()
                for other in range(dim):
                    if group in self.reached[name, other]:
                        both = _sum_to(values, other, dim)
                        rows = self.reached[name, other][group].to(values.device)
                        totals[group] -= (
                            both[rows[:, :, None], places.to(values.device)[:, None]].sum((1, 2)).cpu().numpy()
                        )
        for group, unit in self.structure.owners[name]:
            totals[group][unit] += float(values.sum(dtype=torch.float64))

    def add_consumer(self, call: Call, x: torch.Tensor, gradient: torch.Tensor) -> None:
        products = x.float() * gradient.detach().float()
        products = products.movedim(1, -1) if call.window is not None else products
        per_sample = products.dim() > 1 and len(products) == self.size
        rows = products.reshape(self.size if per_sample else -1, *([-1] if per_sample else []), products.shape[-1])
        vectors = rows.sum(1, dtype=torch.float64) if per_sample else rows.double()
        for group, places in self.reached[call.parameter, call.in_dim].items():
            self.add(group, by_unit(vectors, places))

    def add_block(self, name: str, x: torch.Tensor, y: torch.Tensor) -> None:
        group, unit = self.blocks[name]
        branch = y.detach() - x if adds_itself(self.structure.groups[group], unit) else y.detach().clone()

        def add(gradient: torch.Tensor) -> None:
            products = branch.float() * gradient.detach().float()
            samples = self.size if len(products) == self.size else products.numel() // products.shape[-1]
            gates = torch.zeros(samples, self.structure.groups[group].size, dtype=torch.float64, device=products.device)
            gates[:, unit] = products.reshape(samples, -1).sum(1, dtype=torch.float64)
            self.add(group, gates)

        if y.requires_grad:
            y.register_hook(add)

    def add(self, group: int, gates: torch.Tensor) -> None:
        held = self.signed.get((group, len(gates)))
        self.signed[group, len(gates)] = gates if held is None else held + gates.to(held.device)

    def result(self) -> Sensitivity:
        batches, samples = max(self.batches, 1), max(self.samples, 1)
        return Sensitivity(
            [total / batches for total in self.squared_sums],
            [np.maximum(total, 0) / batches for total in self.sums_of_squares],
            [total / samples if group in self.gated else None for group, total in enumerate(self.gates)],
        )


class _Gates(Watcher):
    """Gives every consumer a view of its input of its own, so that its gradient is that of this consumer alone."""

    def __init__(self, gradients: _Pass) -> None:
        super().__init__(gradients.model)
        self.gradients = gradients

    def consumer(self, call: Call) -> Any:
        if not self.gradients.reached[call.parameter, call.in_dim] or not call.x.requires_grad:
            return call.run()
        x = call.x.view_as(call.x)
        x.register_hook(partial(self.gradients.add_consumer, call, x.detach()))
        return call.run(x)


def _recurrent_gradients(model: nn.Module) -> AbstractContextManager[Any]:
    """cuDNN has no gradients of recurrent layers in evaluation mode."""
    recurrent = any(isinstance(module, nn.RNNBase) for module in model.modules())
    return torch.backends.cudnn.flags(enabled=False) if recurrent else nullcontext()


@contextmanager
def _differentiable(model: nn.Module) -> Iterator[None]:
    frozen = [p for p in model.parameters() if p.is_floating_point() and not p.requires_grad]
    try:
        for parameter in frozen:
            parameter.requires_grad_(True)
        yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)


def _probe(output: Any, generator: torch.Generator) -> torch.Tensor:
    total = torch.zeros((), device=generator.device)
    for tensor in output_tensors(output):
        if tensor.requires_grad:
            values = tensor.float().to(generator.device)
            drawn = torch.randn(values.shape, generator=generator, device=generator.device)
            total = total + (values * drawn).sum() / values.detach().norm().clamp_min(1e-12)
    return total


def _checked(loss: Any) -> torch.Tensor:
    if not isinstance(loss, torch.Tensor) or loss.numel() != 1:
        found = tuple(loss.shape) if isinstance(loss, torch.Tensor) else type(loss).__name__
        raise CalibrationError(f"the calibration's loss must return a scalar tensor, not {found}")
    if not loss.requires_grad:
        raise CalibrationError("the calibration's loss depends on no parameter: is the forward under torch.no_grad?")
    return loss.sum()


def _sum_to(values: torch.Tensor, *dims: int) -> torch.Tensor:
    others = [dim for dim in range(values.dim()) if dim not in dims]
    return values.sum(others, dtype=torch.float64) if others else values.double()
