"""Penalties against autograd, and what they do to units."""

from dataclasses import replace

import pytest
import torch
from torch import nn

import prunefront
from prunefront.runners.finetuning.sparsity import make_penalty, unit_norms, units_of
from prunefront.spaces import discover
from prunefront.spaces.errors import ConfigError
from prunefront.spaces.inputs import Inputs

INPUTS = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def net() -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 6, 3), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3))


def gradients(model: nn.Module, kind: str, weight: float = 0.5) -> dict[str, torch.Tensor]:
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    make_penalty(model, kind, weight, Inputs.of(INPUTS[:1]))()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def test_the_group_lasso_is_that_of_autograd():
    model = net()
    found = gradients(model, "groups")
    first, second, last = model[0].weight, model[3].weight, model[7].weight
    model.zero_grad()
    between = (first.flatten(1).square().sum(1) + second.transpose(0, 1).flatten(1).square().sum(1)).sqrt().sum()
    after = (second.flatten(1).square().sum(1) + last.square().sum(0)).sqrt().sum()
    (0.5 * (between + after)).backward()
    for name, parameter in model.named_parameters():
        expected = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        assert torch.allclose(found[name], expected, atol=1e-6), name


def test_the_penalty_on_scales_is_their_sign():
    model = net()
    with torch.no_grad():
        model[1].weight[:4] *= -1
    found = gradients(model, "bn_scale", 0.1)
    assert torch.allclose(found["1.weight"], 0.1 * model[1].weight.sign())
    assert all(not gradient.any() for name, gradient in found.items() if name != "1.weight")
    with pytest.raises(ConfigError, match="no BatchNorm"):
        make_penalty(nn.Sequential(nn.Linear(2, 2)), "bn_scale", 1.0, Inputs.of(torch.zeros(1, 2)))


@pytest.mark.parametrize("kind", ["groups", "bn_scale"])
def test_training_with_a_penalty_leaves_some_units_small_beside_others(kind):
    labels = (INPUTS.mean((1, 2, 3)) > 0).long()
    recipe = prunefront.Recipe(precision="float32", steps=150, lr=0.05, weight_decay=0.0)

    def smallest(sparsity: float) -> float:
        trained = prunefront.finetune(
            net(),
            training=[(INPUTS, labels)],
            loss=lambda output, batch: nn.functional.cross_entropy(output, batch[1]),
            recipe=replace(recipe, sparsity=sparsity, sparsity_kind=kind),
        ).model
        norms = (
            trained[1].weight.detach().abs()
            if kind == "bn_scale"
            else unit_norms(units_of(trained, Inputs.of(INPUTS[:1]))[1])
        )
        return float(norms.min() / norms.max())

    assert smallest(0.03) < 0.1 * smallest(0.0)


def test_groups_are_those_of_the_space():
    space = discover(net(), INPUTS[:1])
    assert [len(parts) for parts in units_of(net(), Inputs.of(INPUTS[:1]))] == [2] * len(space.groups)
