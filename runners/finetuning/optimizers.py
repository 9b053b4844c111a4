"""Optimizers, master weights, the average of the weights, and their states as named tensors."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import nn

from .recipe import Recipe


class Masters:
    """Float32 copies of a model's half-precision parameters, which are too coarse for the steps of training; all other
    parameters are their own masters."""

    def __init__(self, model: nn.Module) -> None:
        self._pairs = [(parameter, _master(parameter)) for parameter in model.parameters()]

    @property
    def parameters(self) -> list[nn.Parameter]:
        return [master for _, master in self._pairs]

    def take_gradients(self) -> None:
        for parameter, master in self._copied():
            master.grad = None if parameter.grad is None else parameter.grad.float()

    @torch.no_grad()
    def give_weights(self) -> None:
        for parameter, master in self._copied():
            parameter.copy_(master)

    def tensors(self) -> dict[str, torch.Tensor]:
        """Those that are copies, by the place of their parameter."""
        return {str(place): master for place, (held, master) in enumerate(self._pairs) if held is not master}

    @torch.no_grad()
    def restore(self, tensors: Mapping[str, torch.Tensor]) -> None:
        for place, master in self.tensors().items():
            master.copy_(tensors[place])

    def _copied(self) -> Iterable[tuple[nn.Parameter, nn.Parameter]]:
        return ((parameter, master) for parameter, master in self._pairs if parameter is not master)


def _master(parameter: nn.Parameter) -> nn.Parameter:
    if parameter.dtype not in (torch.bfloat16, torch.float16):
        return parameter
    return nn.Parameter(parameter.detach().float(), requires_grad=parameter.requires_grad)


def make_optimizer(parameters: Iterable[nn.Parameter], recipe: Recipe) -> torch.optim.Optimizer:
    """Weight decay is for matrices and kernels: norms and biases, which have one dimension, go without."""
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    groups = [
        {"params": [p for p in trained if p.dim() > 1], "weight_decay": recipe.weight_decay},
        {"params": [p for p in trained if p.dim() <= 1], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if recipe.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=recipe.lr, momentum=recipe.momentum, nesterov=recipe.momentum > 0)
    return torch.optim.AdamW(groups, lr=recipe.lr, betas=(recipe.momentum, 0.999))


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """Moments and step counts by ``<parameter>/<name>``, parameters being counted."""
    state = optimizer.state_dict()["state"]
    return {
        f"{index}/{name}": value
        for index, values in state.items()
        for name, value in values.items()
        if isinstance(value, torch.Tensor)
    }


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: Mapping[str, torch.Tensor]) -> None:
    """What :func:`optimizer_tensors` returned; moments lie in memory as their parameters do."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state: dict[int, dict[str, torch.Tensor]] = {}
    for key, tensor in tensors.items():
        index, _, name = key.partition("/")
        parameter = parameters[int(index)]
        if tensor.shape == parameter.shape:
            tensor = torch.empty_like(parameter, dtype=tensor.dtype).copy_(tensor)
        state.setdefault(int(index), {})[name] = tensor
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


@torch.no_grad()
def move_average(average: Masters, weights: Masters, decay: float, step: int) -> None:
    """Exponential moving average of the parameters; the first steps, ``step`` counted from 1, decay faster."""
    decay = min(decay, (1 + step) / (10 + step))
    for kept, parameter in zip(average.parameters, weights.parameters, strict=True):
        kept.lerp_(parameter, 1 - decay)
    average.give_weights()


@torch.no_grad()
def copy_buffers(average: nn.Module, model: nn.Module) -> None:
    for kept, buffer in zip(average.buffers(), model.buffers(), strict=True):
        kept.copy_(buffer)
