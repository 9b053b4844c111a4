"""What a space may be told: kinds, patterns, bounds, steps, shared widths."""

import numpy as np
import pytest
import torch

import prunefront
from prunefront.spaces.errors import BudgetError, ConfigError, EmptySpaceError, PlanError
from tests.models import build


@pytest.fixture(scope="module")
def vit():
    return build("vit")


def test_kinds_and_patterns_leave_the_rest_whole(vit):
    model, inputs = vit
    space = prunefront.discover(model, inputs, kinds=["neuron", "head"], exclude=["vit.layers.0.*"])
    assert {group.kind for group in space.groups} == {"neuron", "head"}
    assert all(group.name.startswith(("vit.layers.1", "vit.layers.2")) for group in space.groups)
    reasons = {frozen.reason for frozen in space.frozen}
    assert "kind hidden is not among the space's kinds" in reasons and "excluded from the space" in reasons
    only = prunefront.discover(model, inputs, include=["*.heads"])
    assert {group.kind for group in only.groups} == {"head"}


def test_bounds_and_steps_by_kind_and_pattern(vit):
    model, inputs = vit
    space = prunefront.discover(
        model,
        inputs,
        max_ratio={"hidden": 0.5, "default": 0.9, "vit.layers.1.*": 0.25},
        min_ratio={"head": 0.25},
        round_to={"hidden": 16, "neuron": 8},
    )
    bounds = {group.name: (*space.options.bounds(group), space.options.step(group)) for group in space.groups}
    assert bounds["hidden"] == (32, 48, 16)  # 24 is no multiple of 16
    assert bounds["vit.layers.0.mlp.fc1"] == (8, 80, 8)
    assert bounds["vit.layers.1.mlp.fc1"] == (64, 80, 8)
    assert bounds["vit.layers.0.attention.heads"] == (1, 3, 1)
    # min_ratio is a bound of what a search removes, a part of a plan can still keep everything.
    widths = dict(zip(space.dimensions, space.round_widths(space.sizes.astype(float)), strict=True))
    assert widths["vit.layers.0.attention.heads"] == 3 and widths["hidden"] == 48
    assert (space.next_widths(space.smallest_widths()) > space.smallest_widths()).sum() > 10


def test_a_lone_step_is_for_widths_not_for_heads(vit):
    model, inputs = vit
    space = prunefront.discover(model, inputs, round_to=16)
    steps = {group.kind: space.options.step(group) for group in space.groups}
    assert steps["hidden"] == steps["neuron"] == 16 and steps["head"] == steps["block"] == 1


def test_shared_widths_are_one_dimension(vit):
    model, inputs = vit
    space = prunefront.discover(model, inputs, uniform=True)
    assert "vit.layers.*.mlp.fc*" in space.dimensions
    plan = space.plan({"vit.layers.*.mlp.fc*": 33})
    assert [width for name, width in plan.widths.items() if "fc1" in name] == [33, 33, 33]
    widths = np.array([[space.sizes[i] if d != "vit.layers.*.mlp.fc*" else 33 for i, d in enumerate(space.dimensions)]])
    assert space.cost_batch(widths)[0, 1] == space.cost(plan).params
    projected = prunefront.project(space, {"params": "70%"})
    assert space.cost(projected).params <= 0.7 * space.dense_cost.params
    assert len({width for name, width in projected.widths.items() if "fc1" in name}) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kinds": ["heads"]}, "unknown kinds 'heads'"),
        ({"kinds": "head"}, "expected a list"),
        ({"exclude": ["nothing.*"]}, r"no group is called 'nothing\.\*'"),
        ({"max_ratio": {"layer9": 0.5}}, "no group is called 'layer9'"),
        ({"max_ratio": 1.5}, r"max_ratio must be a number in 0\.\.1, not 1\.5"),
        ({"round_to": {"head": 0}}, "round_to of head must be a whole number"),
        ({"round_to": 2.5}, "round_to must be a whole number"),
        ({"min_ratio": 0.9, "max_ratio": 0.5}, "no multiple of 1 lies between"),
        ({"proof": "maybe"}, "unknown proof 'maybe'"),
    ],
)
def test_wrong_options_are_refused_by_name(vit, options, message):
    model, inputs = vit
    with pytest.raises(ConfigError, match=message):
        prunefront.discover(model, inputs, **options)


def test_blocks_cost_what_they_hold_and_the_last_one_stays(vit):
    model, inputs = vit
    space = prunefront.discover(model, inputs, kinds=["block"])
    plan = space.plan({"vit.layers": 1, "vit.layers.*.mlp": 2})
    assert space.cost(plan).params == sum(parameter.numel() for parameter in space.apply(plan).parameters())
    assert len(space.apply(plan).vit.layers) == 1
    with pytest.raises(PlanError, match=r"1\.\.3"):
        space.plan({"vit.layers": 0})


def test_widths_that_a_kernel_refuses_are_no_plan():
    model, inputs = build("mixtral")
    space = prunefront.discover(model, inputs)
    with pytest.raises(PlanError, match="width of hidden must be a multiple of 8"):
        space.plan({"hidden": 30})
    assert all(group.at_least == 2 for group in space.groups if group.kind == "expert")


def test_meta_models_have_no_numbers_to_compare():
    with torch.device("meta"):
        model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        inputs = torch.randn(1, 4)
    with pytest.raises(ConfigError, match="meta device"):
        prunefront.discover(model, inputs, proof="full")
    assert prunefront.discover(model, inputs).dense_cost.params == 58


def test_options_that_leave_nothing_to_prune_are_an_error():
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2)).eval()
    with pytest.raises(EmptySpaceError, match="no width in this space can become smaller: lower round_to"):
        prunefront.discover(model, torch.randn(1, 4), round_to=64)


def test_what_is_no_plan_says_how_to_make_one():
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2)).eval()
    space = prunefront.discover(model, torch.randn(1, 4))
    for use in (space.apply, space.mask, space.cost):
        with pytest.raises(PlanError, match=r"space\.plan\("):
            use({"0": 4})
    for budget in ("50%", 0.5):
        with pytest.raises(BudgetError, match="must be a dictionary"):
            prunefront.project(space, budget)
