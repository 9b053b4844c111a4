"""Groups, proofs, plans and candidates on real convolutional networks."""

import copy

import pytest
import torch
import torch.nn.functional as F
import torchvision
from fvcore.nn import FlopCountAnalysis
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import prunefront
from prunefront.spaces.errors import ConfigError, EmptySpaceError, PlanError, TraceError
from prunefront.spaces.plan import Plan

ZOO = ["resnet18", "shufflenet_v2_x1_0", "mobilenet_v3_small", "densenet121", "resnext50_32x4d"]
#: fvcore also counts these, which multiply and accumulate nothing.
NOT_MACS = ("batch_norm", "adaptive_avg_pool2d")


class Padded(nn.Module):
    """A residual block whose shortcut subsamples and zero-pads, as in CIFAR ResNets."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.conv1, self.bn1 = nn.Conv2d(8, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16)
        self.conv2, self.bn2 = nn.Conv2d(16, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16)
        self.linear = nn.Linear(16, 5)

    def forward(self, x):
        x = F.relu(self.stem(x))
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        y = F.relu(y + F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 4, 4)))
        return self.linear(y.mean((2, 3)))


class Upsampler(nn.Module):
    """Transposed and grouped transposed convolutions, concatenation, slicing, GroupNorm, flatten."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Conv2d(3, 8, 4, 2, 1)
        self.norm = nn.GroupNorm(4, 8)
        self.up = nn.ConvTranspose2d(8, 8, 2, 2)
        self.up2 = nn.ConvTranspose2d(8, 4, 1, groups=2)
        self.mix = nn.Conv2d(11, 6, 1)
        self.shared = nn.Conv2d(6, 6, 3, padding=1)
        self.head = nn.Sequential(nn.Flatten(), nn.Linear(6 * 64, 12), nn.ReLU(), nn.Linear(12, 2))

    def forward(self, x):
        y = self.up(F.silu(self.norm(self.down(x))))
        y = self.mix(torch.cat([x, y], 1)) + F.pad(self.up2(y), (0, 0, 0, 0, 2, 0))
        return self.head(self.shared(F.relu(self.shared(y))))


def random_plan(space: prunefront.Space, seed: int) -> Plan:
    generator = torch.Generator().manual_seed(seed)
    draw = {g.name: int(torch.randint(1, g.size + 1, (), generator=generator)) for g in space.groups if g.exact}
    return space.plan(draw)


def assert_equals_mask(space: prunefront.Space, plan: Plan, inputs: torch.Tensor) -> None:
    candidate, masked = space.apply(plan).double().eval(), space.mask(plan).double().eval()
    with torch.no_grad():
        torch.testing.assert_close(candidate(inputs.double()), masked(inputs.double()), rtol=1e-8, atol=1e-10)


@pytest.fixture(scope="module", params=ZOO)
def zoo(request):
    torch.manual_seed(0)
    model = getattr(torchvision.models, request.param)(weights=None).eval()
    inputs = torch.randn(1, 3, 64, 64)
    return model, inputs, prunefront.discover(model, inputs)


def test_zoo_is_pruned_exactly_and_nothing_fails_its_proof(zoo):
    _, inputs, space = zoo
    assert space.groups
    assert not [frozen for frozen in space.frozen if "proof" in frozen.reason]
    for plan in (space.uniform(0.3), space.uniform(0.6), random_plan(space, 1)):
        assert_equals_mask(space, plan, inputs)


def test_costs_equal_what_others_count_on_the_built_candidate(zoo):
    _, inputs, space = zoo
    for seed in range(5):
        plan = random_plan(space, seed)
        candidate, cost = space.apply(plan).eval(), space.cost(plan)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            candidate(inputs)
        assert cost.flops == counter.get_total_flops()
        analysis = FlopCountAnalysis(candidate, inputs).unsupported_ops_warnings(False)
        by_operator = analysis.uncalled_modules_warnings(False).by_operator()
        assert cost.macs == sum(count for name, count in by_operator.items() if name not in NOT_MACS)
        assert cost.params == sum(p.numel() for p in candidate.parameters())
        state = [*candidate.parameters(), *candidate.buffers()]
        assert cost.size_bytes == sum(t.numel() * t.element_size() for t in state)


@pytest.mark.parametrize("network", [Padded, Upsampler])
def test_hand_made_networks(network):
    torch.manual_seed(0)
    model, inputs = network(), torch.randn(2, 3, 8, 8)
    before = copy.deepcopy(model.state_dict())
    space = prunefront.discover(model, inputs)
    assert not [frozen for frozen in space.frozen if "proof" in frozen.reason]
    for seed in range(10):
        assert_equals_mask(space, random_plan(space, seed), inputs)
    assert model.training
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_zero_padded_shortcut_couples_the_stages():
    space = prunefront.discover(Padded(), torch.randn(1, 3, 8, 8))
    assert {group.name: group.size for group in space.groups} == {"stem": 8, "conv1": 16}
    assert {member.tensor for member in space.groups[0].members} >= {"stem.weight", "conv2.weight", "linear.weight"}


def test_group_norm_is_inexact_inside_its_groups():
    space = prunefront.discover(Upsampler(), torch.randn(1, 3, 8, 8))
    assert {g.name: g.exact for g in space.groups if g.name.startswith("down")} == {"down.groups": True, "down": False}


def test_candidate_trains():
    model, inputs = Padded(), torch.randn(4, 3, 8, 8)
    space = prunefront.discover(model, inputs)
    candidate = space.apply(space.uniform(0.5)).train()
    optimizer = torch.optim.SGD(candidate.parameters(), 0.1)
    candidate(inputs).sum().backward()
    optimizer.step()
    assert all(p.grad is not None for p in candidate.parameters())
    assert candidate.conv1.out_channels == candidate.conv2.in_channels == candidate.bn1.num_features == 8


def test_memory_equals_the_activations_alive_in_a_chain():
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 16, 3, padding=1), nn.Conv2d(16, 4, 1))
    space = prunefront.discover(model, torch.randn(1, 3, 8, 8))
    # The user holds the input; the second convolution has both its input and its output alive.
    assert space.dense_cost.memory_bytes == 4 * 64 * (3 + 8 + 16)


@pytest.mark.parametrize("criterion", ["l1", "l2", "bn_scale", "random"])
def test_criterion_orders_units(criterion):
    model = Padded()
    space = prunefront.discover(model, torch.randn(1, 3, 8, 8), criterion=criterion)
    with torch.no_grad():
        for tensor in (model.conv1.weight, model.bn1.weight):
            tensor[3] = 100.0
    kept = dict(prunefront.discover(model, torch.randn(1, 3, 8, 8), criterion=criterion).plan({"conv1": 1}).kept)
    assert len(kept["conv1"]) == 1
    assert criterion == "random" or kept["conv1"] == (3,)
    assert len(space.groups) == 2


def test_widths_are_rounded_never_zero_and_never_silently_full():
    space = prunefront.discover(Padded(), torch.randn(1, 3, 8, 8), round_to=4)
    assert space.uniform(0.99).widths == {"stem": 4, "conv1": 4}
    assert space.uniform(0.05).widths == {"stem": 4, "conv1": 12}
    assert space.uniform(0.0).widths == {"stem": 8, "conv1": 16}


def test_plan_survives_json_and_is_checked():
    space = prunefront.discover(Padded(), torch.randn(1, 3, 8, 8))
    plan = space.uniform(0.5)
    again = Plan.from_json(plan.to_json())
    assert again == plan and hash(again) == hash(plan) and again.fingerprint == plan.fingerprint
    for bad in ([], {"stem": [0, 0]}, {"stem": ["a"]}, {"stem": [-1]}):
        with pytest.raises(PlanError):
            Plan.from_json(bad)
    with pytest.raises(PlanError, match="another space"):
        space.apply(Plan.of({"other": [0]}))
    with pytest.raises(PlanError, match="stem"):
        space.cost(Plan.of({"stem": [99], "conv1": [0]}))
    with pytest.raises(PlanError, match="unknown groups"):
        space.plan({"stemm": 3})
    with pytest.raises(PlanError, match=r"1\.\.8"):
        space.plan({"stem": 0})


def test_bad_input_is_refused_with_what_to_do():
    with pytest.raises(TraceError, match="rejects the example inputs"):
        prunefront.discover(Padded(), torch.randn(1, 4, 8, 8))
    with pytest.raises(EmptySpaceError, match="output of the model"):
        prunefront.discover(nn.Linear(3, 4), torch.randn(2, 3))
    with pytest.raises(ConfigError, match="unknown criterion"):
        prunefront.discover(Padded(), torch.randn(1, 3, 8, 8), criterion="l3")
    with pytest.raises(ConfigError, match="round_to"):
        prunefront.discover(Padded(), torch.randn(1, 3, 8, 8), round_to=0)


class HardCoded(nn.Module):
    """The forward writes a size that pruning breaks: only the proof can see that."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x):
        x = F.relu(self.first(x)) * (6 / self.first.out_features)
        return self.last(F.relu(self.second(x)))


def test_a_group_that_fails_its_proof_is_left_out_with_the_reason(caplog):
    space = prunefront.discover(HardCoded(), torch.randn(2, 4))
    assert [group.name for group in space.groups] == ["second"]
    assert "group first is left out" in caplog.text
    assert any(frozen.name == "first" and "failed its proof" in frozen.reason for frozen in space.frozen)
