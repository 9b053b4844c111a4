"""Budgets are read exactly, and every projected plan holds them."""

import itertools

import numpy as np
import pytest
import torch
from torch import nn

import prunefront
from prunefront.search import parse_budget
from prunefront.search.projection import Projector
from prunefront.spaces.errors import BudgetError, PlanError


@pytest.fixture(scope="module", params=[1, 4])
def space(request):
    torch.manual_seed(0)
    layers = [
        nn.Conv2d(3, 8, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 6, 3),
        nn.ReLU(),
        nn.Conv2d(6, 16, 1),
        nn.Flatten(),
    ]
    model = nn.Sequential(*layers, nn.Linear(16 * 36, 3))
    return prunefront.discover(model, torch.randn(1, 3, 8, 8), round_to=request.param)


@pytest.mark.parametrize(
    "budget", [{"macs": "50%"}, {"macs": "70%", "params": "2k"}, {"size": "10kB", "memory": "90%"}]
)
def test_projected_plans_hold_the_budget_and_cannot_grow(space, budget):
    limits = parse_budget(budget, space.dense_cost)
    generator = np.random.default_rng(0)
    for _ in range(50):
        widths = Projector(space, limits).fill(np.exp(generator.normal(size=len(space.groups))))
        cost = space.cost(space.plan(dict(zip([g.name for g in space.groups], map(int, widths), strict=True))))
        found = np.array([cost.macs, cost.params, cost.memory_bytes, cost.size_bytes])
        assert (found <= np.array(limits.values[:4])).all()
        assert all(
            w == g.size or w % min(space.options.round_to, g.size) == 0
            for w, g in zip(widths, space.groups, strict=True)
        )
        for position in range(len(widths)):
            larger = widths.copy()
            larger[position] = space.next_widths(widths)[position]
            if larger[position] > widths[position]:
                assert (space.cost_batch(larger[None])[0] > np.array(limits.values[:4])).any()


def test_an_impossible_budget_names_the_smallest_reachable_cost(space):
    allowed = [
        [w for w in range(1, g.size + 1) if w in (g.size,) or w % space.options.round_to == 0] for g in space.groups
    ]
    smallest = min(space.cost_batch(np.array(w)[None])[0, 0] for w in itertools.product(*allowed))
    with pytest.raises(BudgetError, match=f"has {smallest:,.0f}, "):
        prunefront.project(space, {"macs": smallest - 1})
    assert space.cost(prunefront.project(space, {"macs": smallest})).macs == smallest


def test_units(space):
    dense = space.dense_cost
    assert parse_budget({"macs": "1.5k"}, dense).values[0] == 1500
    assert parse_budget({"flops": "3k"}, dense).values[0] == 1500
    assert parse_budget({"params": "50%"}, dense).values[1] == dense.params / 2
    assert parse_budget({"size": "2KiB"}, dense).values[3] == 2048
    assert parse_budget({"memory": 1000}, dense).values[2] == 1000


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        ({}, "empty"),
        ({"mcas": "50%"}, "unknown budget 'mcas'"),
        ({"macs": "5ms"}, "cannot read"),
        ({"macs": "5MB"}, "cannot read"),
        ({"macs": "0%"}, "positive"),
        ({"params": True}, "cannot read"),
    ],
)
def test_budgets_that_cannot_be_read(space, budget, message):
    with pytest.raises(BudgetError, match=message):
        prunefront.project(space, budget)


def test_ratios_are_checked(space):
    with pytest.raises(PlanError, match="unknown groups"):
        prunefront.project(space, {"macs": "50%"}, {"nothing": 1})
    with pytest.raises(PlanError, match="positive"):
        prunefront.project(space, {"macs": "50%"}, {space.groups[0].name: 0})
