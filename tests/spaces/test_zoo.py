"""Real architectures from one call, without a recipe: every group proven, every candidate equal to its mask.

``python -m pytest tests/spaces/test_zoo.py`` prints the table that stands in docs/zoo.md.
"""

import collections
from collections.abc import Iterator

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import prunefront
from prunefront.spaces import Plan, Space
from prunefront.spaces.inputs import Inputs, output_tensors
from prunefront.spaces.proof import Comparable, outputs_of
from tests.models import ZOO, build

RATIOS = (0.3, 0.6)


@pytest.fixture(scope="module", params=ZOO)
def zoo(request) -> Iterator[tuple[str, Space, Inputs]]:
    for package in ("torchvision", "timm", "transformers"):
        pytest.importorskip(package)
    model, example_inputs = build(request.param)
    space = prunefront.discover(model, example_inputs)
    yield request.param, space, Inputs.of(example_inputs)


def plans(space: Space) -> Iterator[Plan]:
    """Each kind alone and all mixed."""
    for kinds in (None, *([kind] for kind in sorted({group.kind for group in space.groups}))):
        for ratio in RATIOS:
            yield space.uniform(ratio, kinds)


def difference(space: Space, plan: Plan, inputs: Inputs, normalising: bool) -> float:
    """Largest difference between candidate and mask relative to the largest output, in double precision."""
    doubled = inputs.map(lambda leaf: leaf.double() if torch.is_tensor(leaf) and leaf.is_floating_point() else leaf)
    candidate, masked = space.apply(plan).double(), space.mask(plan).double()
    comparable = Comparable(normalising)
    with comparable:
        actual = outputs_of(candidate, doubled)
    with comparable, comparable.routing(masked, space._structure, space._kept(plan)):
        expected = outputs_of(masked, doubled)
    pairs = list(zip(actual, expected, strict=True))
    assert pairs and all(a.shape == e.shape and bool(torch.isfinite(a).all()) for a, e in pairs)
    return max(((a - e).abs().max() / e.abs().max()).item() for a, e in pairs)


def restricted(space: Space, plan: Plan, chosen: set[str]) -> Plan:
    return space.plan({name: width for name, width in plan.widths.items() if name in chosen})


def test_every_group_holds_and_every_candidate_equals_its_mask(zoo, zoo_rows):
    name, space, inputs = zoo
    assert space.groups
    refused = {frozen.name for frozen in space.frozen if "failed its proof" in frozen.reason}
    assert not refused
    exact = {group.name for group in space.groups if group.exact}
    # A block behind whose sum a normalisation follows is no identity; with it there is nothing to compare.
    comparable = exact | {group.name for group in space.groups if group.kind != "block"}
    for plan in plans(space):
        assert difference(space, restricted(space, plan, exact), inputs, normalising=False) < 1e-9
        if comparable - exact:
            assert difference(space, restricted(space, plan, comparable), inputs, normalising=True) < 1e-9
    zoo_rows.append(row(name, space))


def test_costs_are_what_torch_counts_and_candidates_run(zoo):
    _, space, inputs = zoo
    for plan in plans(space):
        candidate, cost = space.apply(plan).eval(), space.cost(plan)
        counter = FlopCounterMode(display=False, custom_mapping=UNCOUNTED)
        with counter, torch.no_grad():
            outputs = output_tensors(inputs.call(candidate))
        assert all(bool(torch.isfinite(output).all()) for output in outputs)
        assert cost.flops == counter.get_total_flops()
        assert cost.params == sum(parameter.numel() for parameter in candidate.parameters())
        tensors = [*candidate.parameters(), *candidate.buffers()]
        assert cost.size_bytes == sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def grouped_flops(rows, weights, *_, **__) -> int:
    return 2 * rows[0] * rows[1] * weights[2]


def recurrent_flops(steps, inward, recurrent, *_, **__) -> int:
    return 2 * steps[0] * steps[1] * inward[0] * (inward[1] + recurrent[1])


#: What torch's counter does not know.
UNCOUNTED = {torch.ops.aten._grouped_mm: grouped_flops, torch.ops.aten.mkldnn_rnn_layer: recurrent_flops}


def row(name: str, space: Space) -> list[str]:
    kinds = collections.Counter(group.kind for group in space.groups)
    smallest = space.cost(space.uniform(0.999))
    return [
        name,
        str(len(space.groups)),
        ", ".join(f"{count} {kind}" for kind, count in kinds.items()),
        f"{sum(group.size for group in space.groups):,}",
        f"{1 - smallest.params / space.dense_cost.params:.1%}",
        f"{space.seconds['trace']:.2f}",
        f"{space.seconds['proof']:.2f}",
    ]
