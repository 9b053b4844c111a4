"""What every criterion has to do on every kind of group, and each one against an independent calculation."""

import copy
import functools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import prunefront
from prunefront.spaces.calibration import Calibration
from prunefront.spaces.criteria import CRITERIA, Evidence, unit_scores
from prunefront.spaces.criteria.sensitivity import sensitivity
from prunefront.spaces.errors import CalibrationError, ConfigError
from prunefront.spaces.groups import KINDS
from prunefront.spaces.least_squares import ridge
from prunefront.spaces.surgery import elements, mask_model
from tests.models import build, spread

MODELS = ["residual", "vit", "llama", "mixtral", "gpt2"]
NEED_DATA = ["taylor", "obd", "head_gradient", "activation", "reconstruction"]


class Block(nn.Module):
    def __init__(self, channels: int, inner: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(channels, inner, 3, padding=1, bias=False), nn.BatchNorm2d(inner)
        self.conv2, self.bn2 = nn.Conv2d(inner, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels)

    def forward(self, x):
        return F.relu(x + self.bn2(self.conv2(F.gelu(self.bn1(self.conv1(x))))))


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.blocks = nn.Sequential(Block(8, 6), Block(8, 6), Block(8, 6))
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        return self.head(self.blocks(F.relu(self.norm(self.stem(x)))).mean((2, 3)))


class Attention(nn.Module):
    """With a gate a sample on each of the three heads, and on each of the seven neurons."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = nn.Linear(6, 12), nn.Linear(6, 12), nn.Linear(6, 12), nn.Linear(12, 6)
        self.up, self.down, self.side = nn.Linear(6, 7), nn.Linear(7, 5), nn.Linear(7, 5)
        self.gates, self.neuron_gates = None, None

    def forward(self, x):
        q, k, v = (p(x).view(*x.shape[:2], -1, 4).transpose(1, 2) for p in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
        y = y if self.gates is None else y * self.gates[:, None, :, None]
        h = torch.tanh(self.up(self.out(y.flatten(2))))
        h = h if self.neuron_gates is None else h * self.neuron_gates[:, None]
        return self.down(h) * self.side(h)


@functools.cache
def space_of(name):
    torch.manual_seed(0)
    if name != "residual":
        model, inputs = build(name)
        return prunefront.discover(model, inputs), batches(inputs)
    model, inputs = Residual().eval(), torch.randn(1, 3, 8, 8)
    with torch.no_grad():
        spread(model)
    return prunefront.discover(model, inputs), batches(inputs)


def batches(inputs):
    if "pixel_values" in inputs if isinstance(inputs, dict) else True:
        images = inputs["pixel_values"] if isinstance(inputs, dict) else inputs
        drawn = [torch.randn(4, *images.shape[1:]) for _ in range(2)]
        return [{"pixel_values": x} for x in drawn] if isinstance(inputs, dict) else drawn
    return [{"input_ids": torch.randint(1, 90, (4, 16))} for _ in range(2)]


def evidence_of(name, model=None, seed=0):
    space, data = space_of(name)
    return Evidence(model or space._prepared, space._structure, Calibration(data), seed)


def evidence_for(model, inputs, data, **options):
    space = prunefront.discover(model, inputs, proof="shapes", **options)
    return Evidence(space._prepared, space._structure, Calibration(data))


def index_of(evidence, name):
    return [group.name for group in evidence.structure.groups].index(name)


def test_the_models_have_groups_of_every_kind():
    assert {group.kind for name in MODELS for group in space_of(name)[0].groups} == set(KINDS)


@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize("name", MODELS)
def test_scores_are_finite_and_repeat(name, criterion):
    scores, again = (unit_scores(criterion, evidence_of(name)) for _ in range(2))
    for group, values, repeated in zip(space_of(name)[0].groups, scores, again, strict=True):
        assert values.shape == (group.size,) and values.dtype == np.float64
        assert np.isfinite(values).all() and (values >= 0).all()
        assert np.array_equal(values, repeated)
        assert len(np.unique(values)) > 1


@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize("name", MODELS)
def test_the_model_stays_as_it_was(name, criterion):
    model = copy.deepcopy(space_of(name)[0]._prepared)
    for place, (module, parameter) in enumerate(zip(model.modules(), model.parameters(), strict=False)):
        module.training = place % 3 == 0
        parameter.requires_grad_(place % 2 == 0)

    def state(model):
        tensors = [*model.named_parameters(), *model.named_buffers()]
        modules = [(m.training, len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
        return {n: (t, t.requires_grad) for n, t in tensors}, modules

    before = copy.deepcopy(state(model))
    unit_scores(criterion, evidence_of(name, model))
    after = state(model)
    assert before[1] == after[1] and before[0].keys() == after[0].keys()
    for key, (tensor, requires) in before[0].items():
        assert torch.equal(tensor, after[0][key][0]) and requires == after[0][key][1]
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("criterion", [name for name in CRITERIA if name != "random"])
@pytest.mark.parametrize("what", ["units", "blocks"])
@pytest.mark.parametrize("name", MODELS)
def test_a_dead_unit_goes_first(name, what, criterion):
    space, _ = space_of(name)
    chosen = [i for i, group in enumerate(space.groups) if bool(group.blocks) == (what == "blocks")]
    # Of nested blocks the inner ones, whose death leaves the layer around them alive, then the outer ones.
    outer = [i for i in chosen if space.groups[i].substitutes is None and what == "blocks"]
    for part in [outer, [i for i in chosen if i not in outer]]:
        kept = [np.ones(group.size, dtype=bool) for group in space.groups]
        for place, i in enumerate(part):
            kept[i][place % space.groups[i].size] = False
        scores = unit_scores(criterion, evidence_of(name, mask_model(space._prepared, space._structure, kept)))
        for i in part:
            dead = np.flatnonzero(~kept[i])[0]
            assert (np.delete(scores[i], dead) > scores[i][dead]).all(), space.groups[i].name


def test_random_scores_follow_the_seed():
    one, other = (unit_scores("random", evidence_of("residual", seed=seed)) for seed in (0, 1))
    assert not np.array_equal(one[0], other[0])


def test_bn_scale_takes_the_scales_alone():
    evidence = evidence_of("residual")
    scale = evidence.model.blocks[0].bn1.weight.detach().abs().double().numpy()
    scores = unit_scores("bn_scale", evidence)[index_of(evidence, "blocks.0.conv1")]
    np.testing.assert_allclose(scores, scale / scale.mean())


def test_l1_and_l2_add_up_the_weights_of_a_unit_everywhere():
    evidence = evidence_of("residual")
    block, index = evidence.model.blocks[0], index_of(evidence, "blocks.0.conv1")
    for criterion, power in (("l1", 1), ("l2", 2)):
        sums = [
            np.array([np.sum(np.abs(w.detach().numpy().astype(float).take(u, dim)) ** power) for u in range(6)])
            for w, dim in ((block.conv1.weight, 0), (block.conv2.weight, 1))
        ]
        expected = sum(values / values.mean() for values in sums)
        np.testing.assert_allclose(unit_scores(criterion, evidence)[index], expected, rtol=1e-6)


@pytest.mark.parametrize("chunk", [2, 1024])
def test_fpgm_is_a_sum_of_distances(chunk, monkeypatch):
    monkeypatch.setattr("prunefront.spaces.criteria.weights.CHUNK", chunk)
    evidence = evidence_of("residual")
    block = evidence.model.blocks[0]
    expected = np.zeros(6)
    for weight, dim in ((block.conv1.weight, 0), (block.conv2.weight, 1)):
        units = weight.detach().double().movedim(dim, 0).flatten(1).numpy()
        distances = np.array([sum(np.linalg.norm(units[a] - units[b]) for b in range(6)) for a in range(6)])
        expected += distances / distances.mean()
    scores = unit_scores("fpgm", evidence)[index_of(evidence, "blocks.0.conv1")]
    np.testing.assert_allclose(scores, expected, rtol=1e-5)


class Tied(nn.Module):
    """Units of one group in both dimensions of a weight, and a weight that is used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.inner, self.last = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x):
        x = torch.tanh(self.first(x))
        x = x + torch.tanh(self.inner(x))
        return self.last(x + torch.tanh(self.inner(x)))


def test_taylor_and_obd_equal_gates_on_parameters():
    torch.manual_seed(1)
    model, data = Tied(), [(torch.randn(5, 4), torch.randint(3, (5,))) for _ in range(3)]
    space = prunefront.discover(model, data[0][0])
    structure, groups = space._structure, space.groups
    calibration = Calibration(data, loss=lambda output, batch: F.cross_entropy(output, batch[1]))
    evidence = Evidence(space._prepared, structure, calibration)
    for index, group in enumerate(groups):
        taylor, obd = np.zeros(group.size), np.zeros(group.size)
        for unit in range(group.size):
            kept = [np.ones(g.size, dtype=bool) for g in groups]
            kept[index][unit] = False
            parts = {}
            for name, parameter in model.named_parameters():
                stays = functools.reduce(np.multiply.outer, [elements(e, kept) for e in structure.tensors[name]])
                parts[name] = torch.from_numpy(~stays).view_as(parameter)
            for x, y in data:
                gate = torch.ones((), requires_grad=True)
                gates = {n: torch.ones_like(p, requires_grad=True) for n, p in model.named_parameters()}
                gated = {
                    n: p.detach() * gates[n] * torch.where(parts[n], gate, 1.0) for n, p in model.named_parameters()
                }
                loss = F.cross_entropy(torch.func.functional_call(model, gated, (x,)), y)
                whole, *single = torch.autograd.grad(loss, [gate, *gates.values()])
                taylor[unit] += whole.item() ** 2 / len(data)
                squares = [(g[parts[n]] ** 2).sum().item() for n, g in zip(gates, single, strict=True)]
                obd[unit] += sum(squares) / len(data)
        np.testing.assert_allclose(unit_scores("taylor", evidence)[index], taylor, rtol=1e-4)
        np.testing.assert_allclose(unit_scores("obd", evidence)[index], obd, rtol=1e-4)


def test_head_gradient_equals_masks_on_heads_and_neurons():
    torch.manual_seed(2)
    model, data = Attention(), [torch.randn(4, 9, 6), torch.randn(3, 9, 6)]

    def loss(output, batch):
        return (output**3).sum()

    space = prunefront.discover(model, data[0])
    scores = unit_scores("head_gradient", Evidence(space._prepared, space._structure, Calibration(data, loss=loss)))
    heads, neurons = np.zeros(3), np.zeros(7)
    for x in data:
        model.gates = torch.ones(len(x), 3, requires_grad=True)
        model.neuron_gates = torch.ones(len(x), 7, requires_grad=True)
        found = torch.autograd.grad(loss(model(x), x), [model.gates, model.neuron_gates])
        heads += found[0].abs().sum(0).numpy() / 7
        neurons += found[1].abs().sum(0).numpy() / 7
    by_kind = {group.kind: values for group, values in zip(space.groups, scores, strict=True)}
    np.testing.assert_allclose(by_kind["head"], heads, rtol=1e-4)
    np.testing.assert_allclose(by_kind["neuron"], neurons, rtol=1e-4)


def test_head_gradient_of_blocks_equals_gates_on_branches():
    evidence = evidence_of("residual")
    evidence.calibration = Calibration(space_of("residual")[1], loss=lambda output, batch: (output**2).sum())
    model, expected = evidence.model, np.zeros(3)
    for x in evidence.calibration.batches:
        gates = torch.ones(len(x), 3, requires_grad=True)
        y = F.relu(model.norm(model.stem(x)))
        for u, block in enumerate(model.blocks):
            y = y + gates[:, u, None, None, None] * (block(y) - y)
        loss = (model.head(y.mean((2, 3))) ** 2).sum()
        expected += torch.autograd.grad(loss, gates)[0].abs().sum(0).numpy() / 8
    np.testing.assert_allclose(
        unit_scores("head_gradient", evidence)[index_of(evidence, "blocks")], expected, rtol=1e-4
    )


def test_a_probe_estimates_the_change_of_the_output():
    """Squared gradients of many probes: the squared norm of the output's derivative by each gate."""
    torch.manual_seed(3)
    model, x = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 64)), torch.randn(6, 4)
    space = prunefront.discover(model, x)
    found = [sensitivity(model, space._structure, Calibration([x]), seed).gates[0] for seed in range(200)]
    hidden = torch.tanh(model[0](x)).detach()
    output = model(x).detach()
    changes = (hidden[:, :, None] * model[2].weight.detach().T).norm(dim=2) / output.norm()  # (samples, units)
    # The mean of the absolute value of a normal variable of that deviation.
    expected = (changes * (2 / np.pi) ** 0.5).mean(0).numpy()
    np.testing.assert_allclose(np.mean(found, 0), expected, rtol=0.1)


def inputs_of(model, module, data):
    """What ``module`` is given, all batches together."""
    found = []
    hook = module.register_forward_hook(lambda _, args, output: found.append((args[0].detach(), output[0].detach())))
    with torch.no_grad():
        for batch in data:
            model(**batch) if isinstance(batch, dict) else model(batch)
    hook.remove()
    return torch.cat([x for x, _ in found]), found


def test_activation_is_energy_of_inputs_times_weights():
    evidence = evidence_of("residual")
    model, data = evidence.model, space_of("residual")[1]
    scores = unit_scores("activation", evidence)
    x, _ = inputs_of(model, model.blocks[0].conv2, data)
    windows = F.unfold(x, 3, padding=1).square().mean((0, 2)).view(6, 9)
    expected = (windows * model.blocks[0].conv2.weight.square().sum(0).flatten(1)).sum(1).detach().double().numpy()
    np.testing.assert_allclose(scores[index_of(evidence, "blocks.0.conv1")], expected / expected.mean(), rtol=1e-4)

    evidence = evidence_of("vit")
    model, data = evidence.model, space_of("vit")[1]
    mlp = model.vit.layers[1].mlp
    x, _ = inputs_of(model, mlp.fc2, data)
    expected = (x.square().mean((0, 1)) * mlp.fc2.weight.square().sum(0)).detach().double().numpy()
    scores = unit_scores("activation", evidence)
    np.testing.assert_allclose(
        scores[index_of(evidence, "vit.layers.1.mlp.fc1")], expected / expected.mean(), rtol=1e-4
    )


def test_blocks_are_scored_by_how_far_they_turn_and_by_their_energy():
    evidence = evidence_of("residual")
    model, data = evidence.model, space_of("residual")[1]
    index = index_of(evidence, "blocks")
    x, y = [], model.norm(model.stem(torch.cat(data))).relu().detach()
    turns, energies = [], []
    for block in model.blocks:
        x, y = y, block(y).detach()
        dot = (x * y).sum(1) / (x.norm(dim=1) * y.norm(dim=1)).clamp_min(1e-8)
        turns.append(float((1 - dot).mean()))
        energies.append(float((y - x).square().sum() / y.square().sum()))
    np.testing.assert_allclose(unit_scores("activation", evidence)[index], turns, rtol=1e-3)
    np.testing.assert_allclose(unit_scores("reconstruction", evidence)[index], energies, rtol=1e-4)


def greedy(columns, weight, units, width):
    """Order of removal, with an explicit least-squares fit for every candidate at every step."""
    columns = columns.double() - columns.double().mean(0)
    variance = columns.square().sum(0).mean() / len(columns)
    share = ridge(columns.shape[1], len(columns))
    added = (share * variance).sqrt() * torch.eye(columns.shape[1], dtype=torch.float64)
    x = torch.cat([columns / len(columns) ** 0.5, added]).numpy()
    target, left, order = x @ weight.detach().double().numpy().T, list(range(units)), []

    def error(gone):
        kept = [c for u in left if u != gone for c in range(u * width, (u + 1) * width)]
        fit = np.linalg.lstsq(x[:, kept], target, rcond=None)[0] if kept else np.zeros((0, target.shape[1]))
        return np.square(x[:, kept] @ fit - target).sum()

    while left:
        order.append(min(left, key=error))
        left.remove(order[-1])
    return order


@pytest.mark.parametrize("seed", range(5))
def test_reconstruction_removes_what_explicit_fits_miss_least(seed):
    torch.manual_seed(seed)
    model, x = nn.Sequential(nn.Linear(4, 6), nn.GELU(), nn.Linear(6, 5)), torch.randn(60, 4)
    scores = unit_scores("reconstruction", evidence_for(model, x, [x]))[0]
    hidden = model[1](model[0](x)).detach()
    assert np.argsort(scores).tolist() == greedy(hidden, model[2].weight, 6, 1)

    convolutions = nn.Sequential(nn.Conv2d(2, 6, 3), nn.ReLU(), nn.Conv2d(6, 4, 3, stride=2, padding=1))
    x = torch.randn(3, 2, 9, 9)
    scores = unit_scores("reconstruction", evidence_for(convolutions, x, [x]))[0]
    windows = F.unfold(convolutions[:2](x).detach(), 3, padding=1, stride=2).transpose(1, 2).flatten(0, 1)
    assert np.argsort(scores).tolist() == greedy(windows, convolutions[2].weight.flatten(1), 6, 9)


def test_reconstruction_removes_one_of_two_equal_units_of_many():
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(80, 200), nn.ReLU(), nn.Linear(200, 20)), torch.randn(2000, 80)
    with torch.no_grad():
        for module, dim in ((model[0], 0), (model[2], 1)):
            module.weight.select(dim, 7).copy_(module.weight.select(dim, 150))
        model[0].bias[7] = model[0].bias[150]
    scores = unit_scores("reconstruction", evidence_for(model, x, [x]))[0]
    assert sorted(scores) == list(range(200))
    assert min(scores[7], scores[150]) < 6 < max(scores[7], scores[150])


def test_inputs_that_never_change_have_no_covariance():
    """The class token of equal images: centred, nothing but rounding errors is left."""
    evidence = evidence_of("vit")
    image = space_of("vit")[1][0]["pixel_values"][:1].repeat(8, 1, 1, 1)
    evidence.calibration = Calibration([{"pixel_values": image}] * 2)
    unit_scores("reconstruction", evidence)


def test_recurrent_and_half_precision_models():
    model, inputs = build("lstm")
    evidence = evidence_for(model, inputs, [inputs])
    for criterion in CRITERIA:
        unit_scores(criterion, evidence)
    space, data = space_of("llama")
    half = copy.deepcopy(space._prepared).bfloat16()
    for criterion in CRITERIA:
        unit_scores(criterion, Evidence(half, space._structure, Calibration(data)))
    evidence = Evidence(space._prepared, space._structure, Calibration(data, autocast=torch.bfloat16))
    for criterion in CRITERIA:
        unit_scores(criterion, evidence)


def test_wrong_requests_say_what_to_do():
    space, data = space_of("residual")
    without = Evidence(space._prepared, space._structure, None)
    with pytest.raises(ConfigError, match="unknown criterion 'l3'; expected one of random, l1, l2"):
        unit_scores("l3", without)
    for criterion in CRITERIA:
        if criterion in NEED_DATA:
            message = f"criterion '{criterion}' needs calibration data: pass calibration="
            with pytest.raises(ConfigError, match=message):
                unit_scores(criterion, without)
        else:
            unit_scores(criterion, without)
    with pytest.raises(CalibrationError, match="no batches"):
        unit_scores("taylor", Evidence(space._prepared, space._structure, Calibration([])))
    for loss, message in (
        (lambda output, batch: output, "must return a scalar tensor"),
        (lambda output, batch: output.detach().sum(), "depends on no parameter"),
    ):
        with pytest.raises(CalibrationError, match=message):
            unit_scores("obd", Evidence(space._prepared, space._structure, Calibration(data, loss=loss)))
    bad = copy.deepcopy(space._prepared)
    bad.stem.weight.data[0] = torch.nan
    for criterion in ("l1", "taylor"):
        with pytest.raises(CalibrationError, match="not finite"):
            unit_scores(criterion, Evidence(bad, space._structure, Calibration(data)))


@pytest.mark.parametrize("criterion", CRITERIA)
def test_of_meta_models_the_first_units_stay(criterion):
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        space = prunefront.discover(model, torch.randn(1, 4))
    scores = unit_scores(criterion, Evidence(model, space._structure, None))
    assert scores[0].tolist() == list(range(8, 0, -1))
