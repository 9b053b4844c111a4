"""Stair-cases in latency that are known are found, and none is seen where there is none."""

import numpy as np
import pytest
import torch
from hydra.core.override_parser.overrides_parser import OverridesParser
from torch import nn

import prunefront
from prunefront.search.stairs import LEAST_WIDTHS, Stairs, override, stair_widths
from prunefront.search.timing import Timing
from prunefront.spaces.errors import TargetError
from prunefront.spaces.inputs import Inputs

INPUTS = torch.randn(1, 3, 8, 8)


class StairTarget:
    """Convolutions take the time of the next multiple of ``channels`` outputs, linear layers of ``neurons``."""

    def __init__(self, channels: int, neurons: int, noise: float = 0.0, fails: bool = False) -> None:
        self.periods, self.noise, self.fails = {nn.Conv2d: channels, nn.Linear: neurons}, noise, fails
        self.description = {"target": "stairs"}
        self.rng = np.random.default_rng(0)

    def seconds(self, model: nn.Module) -> float:
        total = 1e-3
        for layer in model.modules():
            if period := self.periods.get(type(layer)):
                width = getattr(layer, "out_channels", None) or layer.out_features
                total += 1e-4 * period * np.ceil(width / period)
        return float(total)

    def times(self, models, inputs, settings):
        if self.fails and len(models) > 1:
            raise TargetError("narrow kernels hang")
        drawn = 1 + self.noise * self.rng.standard_normal((len(models), 15))
        return [(self.seconds(m) * row).tolist() for m, row in zip(models, drawn, strict=True)], {"load": 0.0}


@pytest.fixture(scope="module")
def space() -> prunefront.Space:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.ReLU(),
        nn.Conv2d(8, 80, 3),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(1280, 70),
        nn.Linear(70, 4),
    )
    return prunefront.discover(model.eval(), INPUTS)


def stairs(space, **options) -> dict[str, Stairs]:
    timing = Timing(StairTarget(**options))
    return {found.kind: found for found in timing.stairs(space, Inputs.of(INPUTS))}


def test_widths_are_the_largest_of_the_most_expensive_group_of_every_kind(space):
    widths = stair_widths(space)
    assert [(values[0], values[-1], len(values)) for values in widths.values()] == [(17, 80, 64), (7, 70, 64)]


@pytest.mark.parametrize(
    ("channels", "neurons", "noise"),
    [
        (8, 1, 0),
        (1, 32, 0),
        (16, 4, 0),
        (1, 1, 0),
        (2, 2, 0),
        (8, 1, 0.002),
        (1, 32, 0.002),
        (16, 4, 0.002),
        (1, 1, 0.002),
    ],
)
def test_known_steps_are_found_and_no_others(space, channels, neurons, noise):
    found = stairs(space, channels=channels, neurons=neurons, noise=noise)
    assert (found["channel"].round_to, found["neuron"].round_to) == (channels, neurons)


def test_the_override_is_one_that_a_search_takes(space):
    found = list(stairs(space, channels=8, neurons=4).values())
    parsed = OverridesParser.create().parse_override(override(found))
    assert parsed.key_or_group == "space.round_to" and parsed.value() == {"channel": 8, "neuron": 4}
    rounded = prunefront.discover(space.model, INPUTS, round_to=parsed.value())
    assert {group.kind: rounded.options.step(group) for group in rounded.groups} == {"channel": 8, "neuron": 4}
    assert override(list(stairs(space, channels=1, neurons=1).values())) == "space.round_to=1"


def test_a_flat_line_has_no_steps():
    widths = list(range(LEAST_WIDTHS))
    assert Stairs.of("channel", "a", 12, widths, [1.0] * len(widths)).round_to == 1


def test_widths_that_cannot_be_measured_are_told(space):
    with pytest.raises(TargetError, match="only 0 widths of"):
        stairs(space, channels=8, neurons=1, fails=True)
