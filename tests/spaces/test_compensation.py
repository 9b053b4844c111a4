"""Repaired candidates against fits computed by other means, and against models in which nothing need be lost."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import prunefront
from prunefront.spaces import calibration as calibration_module
from prunefront.spaces import least_squares, sequential
from prunefront.spaces.calibration import Calibration, collect
from prunefront.spaces.compensation import METHODS
from prunefront.spaces.errors import CalibrationError, ConfigError, PlanError


class Perceptron(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 12), nn.Linear(12, 5)

    def forward(self, x):
        return self.second(torch.relu(self.first(x)))


class Convolutions(nn.Module):
    """Two convolutions of different strides; the second has a BatchNorm, or a bias."""

    def __init__(self, norm: bool) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.second = nn.Conv2d(8, 6, 3, stride=2, padding=(1, 0), dilation=(1, 2), bias=not norm)
        self.norm = nn.BatchNorm2d(6) if norm else nn.Identity()

    def forward(self, x):
        return self.norm(self.second(torch.relu(self.first(x)))).mean((2, 3))


class Attention(nn.Module):
    """A transformer layer: pre-norm, fused q, k, v, residual stream."""

    def __init__(self, width: int = 16, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.embed = nn.Linear(7, width)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 32), nn.Linear(32, width)
        self.head = nn.Linear(width, 3)

    def forward(self, x):
        x = self.embed(x)
        batch, length, _ = x.shape
        q, k, v = self.qkv(self.norm1(x)).reshape(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, length, -1)
        x = x + self.proj(attended)
        return self.head(x + self.down(F.gelu(self.up(self.norm2(x)))))


class Residual(nn.Module):
    """Residual blocks of convolutions with BatchNorm, one after another, in a container."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.blocks = nn.Sequential(*(ResidualBlock(8) for _ in range(3)))
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        return self.head(self.blocks(self.stem(x)).mean((2, 3)))


class ResidualBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(width, 10, 3, padding=1, bias=False), nn.BatchNorm2d(10)
        self.conv2, self.bn2 = nn.Conv2d(10, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)

    def forward(self, x):
        return x + self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))


def made(cls, *args):
    torch.manual_seed(0)
    model = cls(*args)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.running_mean, -0.2, 0.2)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
    return model.eval()


def images(batches: int = 2) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return list(torch.randn(batches, 96, 3, 9, 9, generator=generator))


def ridge_fit(x: torch.Tensor, y: torch.Tensor, start: torch.Tensor, kept, centred: bool) -> torch.Tensor:
    """Weights ``(out, kept)`` with ``x @ w.T`` near ``y``, by an augmented system: another way than the code's."""
    x, y, start = x.double(), y.double(), start.double()
    if centred:
        x, y = x - x.mean(0), y - y.mean(0)
    scale = least_squares.ridge(x.shape[1], len(x)) * x.square().sum(0).mean()
    z = x[:, kept]
    augmented = torch.cat([z, scale.sqrt() * torch.eye(z.shape[1], dtype=z.dtype)])
    target = torch.cat([y, scale.sqrt() * start[:, kept].T])
    return torch.linalg.lstsq(augmented, target).solution.T


@pytest.mark.parametrize("arbitrary", [False, True])
def test_linear_fit_equals_an_independent_solution(arbitrary):
    model, x = made(Perceptron), torch.randn(300, 6, generator=torch.Generator().manual_seed(1))
    space = prunefront.discover(
        model, x[:1], calibration=[x[:150], x[150:]], criterion="l1", compensation="least_squares"
    )
    plan = space.plan({"first": 5})
    if arbitrary:
        plan = prunefront.Plan.of({"first": [0, 3, 4, 9]})
    kept = list(dict(plan.kept)["first"])
    hidden = torch.relu(model.first(x)).detach()
    wanted = ridge_fit(hidden, F.linear(hidden, model.second.weight), model.second.weight.detach(), kept, True)
    candidate = space.apply(plan)
    torch.testing.assert_close(candidate.second.weight.double(), wanted, rtol=1e-3, atol=1e-4)
    # The bias takes up the mean: outputs have the dense model's mean.
    torch.testing.assert_close(candidate(x).mean(0), model(x).mean(0), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("norm", [False, True])
def test_convolution_fit_equals_an_independent_solution(norm):
    model, batches = made(Convolutions, norm), images()
    space = prunefront.discover(
        model, batches[0][:1], calibration=batches, criterion="l1", compensation="least_squares"
    )
    plan = space.plan({"first": 3})
    kept = dict(plan.kept)["first"]
    with torch.no_grad():
        hidden = torch.relu(model.first(torch.cat(batches)))
    second = model.second
    windows = F.unfold(hidden, 3, second.dilation, second.padding, second.stride)  # (n, 8 * 9, places)
    windows = windows.transpose(1, 2).reshape(-1, 72)
    weight = second.weight.detach().reshape(6, -1)
    columns = [9 * channel + place for channel in kept for place in range(9)]
    wanted = ridge_fit(windows, windows @ weight.T, weight, columns, True).reshape(6, 3, 3, 3)
    fitted = space.build(plan).second.weight.double()
    torch.testing.assert_close(fitted, wanted, rtol=1e-3, atol=1e-4)


def duplicate(model: nn.Module) -> dict[str, int]:
    """Make units of ``model`` depend on others, so that nothing is lost without them; widths that leave them out."""
    with torch.no_grad():
        if isinstance(model, Perceptron):
            half = 6
            model.first.weight[half:], model.first.bias[half:] = (
                3 * model.first.weight[:half],
                3 * model.first.bias[:half],
            )
            model.first.weight[:half].mul_(10)
            model.first.bias[:half].mul_(10)
            return {"first": half}
        if isinstance(model, Convolutions):
            model.first.weight[4:], model.first.bias[4:] = 0.5 * model.first.weight[:4], 0.5 * model.first.bias[:4]
            return {"first": 4}
        width = 16
        for part in range(3):  # heads 2 and 3 are heads 0 and 1, which other columns of the projection take up
            rows = slice(part * width, part * width + 8), slice(part * width + 8, (part + 1) * width)
            model.qkv.weight[rows[1]], model.qkv.bias[rows[1]] = model.qkv.weight[rows[0]], model.qkv.bias[rows[0]]
        model.up.weight[16:], model.up.bias[16:] = model.up.weight[:16], model.up.bias[:16]
        return {"up": 16}


@pytest.mark.parametrize("method", ["least_squares", "sequential"])
@pytest.mark.parametrize("cls", [Perceptron, Convolutions, Attention])
def test_units_that_depend_on_others_are_lost_without_a_trace(cls, method):
    model = made(cls, True) if cls is Convolutions else made(cls)
    widths = duplicate(model)
    batches = images() if cls is Convolutions else list(torch.randn(2, 100, 5, 7 if cls is Attention else 6))
    name, width = next(iter(widths.items()))
    space = prunefront.discover(model, batches[0][:1], calibration=batches, compensation=method)
    plan = prunefront.Plan.of({g.name: range(width if g.name == name else g.size) for g in space.groups})
    plain = prunefront.discover(model, batches[0][:1]).apply(plan)
    if cls is Convolutions:
        model = prunefront.discover(model, batches[0][:1], calibration=batches, compensation="bn").apply(
            space.uniform(0.0)
        )
    x = torch.cat(batches)
    with torch.no_grad():
        wanted = model(x)
        error, unrepaired = ((c(x) - wanted).square().mean().sqrt() for c in (space.apply(plan), plain.eval()))
    assert error < 0.02 * unrepaired


@pytest.mark.parametrize("cls", [Attention, Residual])
def test_every_better_method_is_nearer_to_the_dense_model(cls):
    model = made(cls)
    include = ["*"] if cls is Attention else ["blocks.*.conv1"]
    batches = images() if cls is Residual else list(torch.randn(2, 128, 5, 7))
    x = torch.cat(batches)
    errors = {}
    for method in METHODS:
        options = {"calibration": batches, "compensation": method, "include": include}
        space = prunefront.discover(model, batches[0][:1], **options)
        reference = space.apply(space.uniform(0.0)).eval()  # BatchNorm statistics are those of the data
        with torch.no_grad():
            errors[method] = float((space.apply(space.uniform(0.4)).eval()(x) - reference(x)).square().mean())
    assert errors["sequential"] < 0.8 * errors["least_squares"] < 0.8 * errors["bn"]
    # A constant is taken back by a bias; where there is BatchNorm, its statistics do that.
    assert errors["bias"] < 0.99 * errors["bn"] if cls is Attention else errors["bias"] == pytest.approx(errors["bn"])


@pytest.mark.parametrize("method", METHODS)
def test_blocks_can_be_taken_out_and_the_model_is_left_as_it_was(method):
    model = made(Residual)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    batches = images()
    space = prunefront.discover(model, batches[0][:1], calibration=batches, compensation=method)
    stack = next(group for group in space.groups if group.blocks == ("blocks.0", "blocks.1", "blocks.2"))
    kept = {g.name: [0, 2] if g is stack else range(g.size) for g in space.groups}
    candidate = space.apply(prunefront.Plan.of(kept)).eval()
    assert len(candidate.blocks) == 2
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    reference = space.apply(space.uniform(0.0)).eval()
    with torch.no_grad():
        torch.testing.assert_close(candidate.blocks[0](batches[0].new_ones(2, 8, 9, 9)).shape, torch.Size([2, 8, 9, 9]))
        if method != "none":
            first = [m.blocks[0].bn1.running_mean for m in (candidate, reference)]
            torch.testing.assert_close(*first, rtol=1e-3, atol=1e-3)
    if method == "sequential":  # the last block is fitted under its own name
        assert not torch.equal(candidate.blocks[1].conv2.weight, model.blocks[2].conv2.weight)


def test_the_sum_is_fitted_where_an_output_is_added_to_a_stream():
    model, batches = made(Residual), images()
    space = prunefront.discover(model, batches[0][:1], calibration=batches, compensation="sequential")
    targets = space._compensation._targets_for("thorough").by_parameter
    assert {name for name, target in targets.items() if target.others is not None} == {
        f"blocks.{i}.conv2.weight" for i in range(3)
    }
    assert all(target.is_normalised == ("blocks" in name) for name, target in targets.items())


class Tied(nn.Module):
    """A language model whose output layer is its embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.up, self.down = nn.Embedding(20, 12), nn.Linear(12, 24), nn.Linear(24, 12)
        self.head = nn.Linear(12, 20, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens):
        x = self.embed(tokens)
        return self.head(x + self.down(torch.relu(self.up(x))))


@pytest.mark.parametrize("method", ["bias", "least_squares", "sequential"])
def test_tied_embeddings_stay_as_they_are(method):
    model, tokens = made(Tied), torch.randint(20, (64, 9), generator=torch.Generator().manual_seed(2))
    space = prunefront.discover(model, tokens[:1], calibration=[tokens], compensation=method)
    plan = space.uniform(0.5)
    candidate, sliced = space.apply(plan), space.slice(plan)
    assert candidate.head.weight is candidate.embed.weight
    assert torch.equal(candidate.embed.weight, sliced.embed.weight)
    assert not torch.equal(candidate.down.bias, sliced.down.bias)


def test_a_constant_unit_is_taken_up_by_the_bias():
    model = made(Perceptron)
    with torch.no_grad():
        model.first.weight[7:] = 0
        model.first.bias[7:] = torch.rand(5) + 1
    x = torch.randn(200, 6)
    space = prunefront.discover(model, x[:1], calibration=[x], compensation="bias")
    candidate = space.apply(prunefront.Plan.of({"first": range(7)}))
    torch.testing.assert_close(candidate(x), model(x), rtol=1e-4, atol=1e-4)


def test_memory_is_bounded_and_what_was_left_out_is_told(monkeypatch, caplog):
    model, batches = made(Convolutions, True), images()
    structure = prunefront.discover(model, batches[0][:1])._structure
    whole = collect(model, structure, Calibration(batches))
    assert whole.bytes == 8 * 72**2 and not whole.notes
    monkeypatch.setattr(calibration_module, "MAX_COLUMNS", 20)
    by_channel = collect(model, structure, Calibration(batches))
    assert by_channel.bytes == 8 * 8**2 and by_channel.notes == {"second.weight": calibration_module.BY_CHANNEL}
    monkeypatch.setattr(calibration_module, "MAX_BYTES", 100)
    means = collect(model, structure, Calibration(batches))
    assert means.bytes == 0 and "second.weight: no room for second moments" in caplog.text
    diagonals = [found.moments["second.weight"].mean_squares for found in (means, by_channel)]
    torch.testing.assert_close(*diagonals, rtol=1e-4, atol=0)


@pytest.mark.parametrize("constant", [0.0, 1e4])
def test_moments_far_from_zero_and_without_spread_can_be_factored(constant):
    model, generator = made(Perceptron), torch.Generator().manual_seed(1)
    with torch.no_grad():
        model.first.bias.fill_(constant)
        model.first.weight.mul_(1e-3)
    x = torch.randn(256, 6, generator=generator)
    space = prunefront.discover(model, x[:1], calibration=[x[:128], x[128:]], criterion="reconstruction")
    candidate = space.apply(space.plan({"first": 6}))  # as many as the layer has inputs: a linear map needs no more
    torch.testing.assert_close(candidate(x), model(x), rtol=1e-3, atol=1e-3 * max(constant, 1))


def test_by_channel_fits_are_better_than_none(monkeypatch):
    monkeypatch.setattr(calibration_module, "MAX_COLUMNS", 20)
    model, batches = made(Convolutions, False), images()
    duplicate(model)
    space = prunefront.discover(model, batches[0][:1], calibration=batches)
    plan = prunefront.Plan.of({"first": range(4)})
    x = torch.cat(batches)
    with torch.no_grad():
        errors = [
            float((c(x) - model(x)).square().mean())
            for c in (space.apply(plan), prunefront.discover(model, x[:1]).apply(plan))
        ]
    assert errors[0] < 1e-3 * errors[1]


def test_candidates_of_several_threads_are_the_same():
    model, x = made(Attention), torch.randn(128, 5, 7)
    space = prunefront.discover(model, x[:1], calibration=[x])
    plans = [space.uniform(ratio) for ratio in (0.2, 0.4, 0.6)] * 4
    alone = [space.apply(plan).state_dict() for plan in plans]
    with ThreadPoolExecutor(4) as pool:
        together = [model.state_dict() for model in pool.map(space.apply, plans)]
    for one, other in zip(alone, together, strict=True):
        assert all(torch.equal(one[name], other[name]) for name in one)


def test_several_criteria_give_plans_of_their_own():
    model, x = made(Perceptron), torch.randn(128, 6)
    space = prunefront.discover(model, x[:1], criterion=["l1", "reconstruction"], calibration=[x])
    first, second = (space.plan({"first": 4}, name) for name in space.criteria)
    assert space.plan({"first": 4}) == first != second
    assert first.widths == second.widths and space.cost(first) == space.cost(second)
    with pytest.raises(PlanError, match="this space has l1, reconstruction"):
        space.plan({"first": 4}, "taylor")


def test_bad_input_is_refused_with_what_to_do():
    model, x = made(Perceptron), torch.randn(128, 6)
    with pytest.raises(ConfigError, match="expected one of auto, none, bn"):
        prunefront.discover(model, x[:1], compensation="ls")
    with pytest.raises(ConfigError, match="needs calibration data"):
        prunefront.discover(model, x[:1], compensation="least_squares")
    with pytest.raises(ConfigError, match="needs calibration data"):
        prunefront.discover(model, x[:1], criterion="taylor")
    with pytest.raises(ConfigError, match="expected some of random, l1"):
        prunefront.discover(model, x[:1], criterion=[])
    with pytest.raises(CalibrationError, match="generator"):
        prunefront.discover(model, x[:1], calibration=(batch for batch in [x]))
    with pytest.raises(CalibrationError, match="no batches"):
        prunefront.discover(model, x[:1], calibration=[])
    with pytest.raises(CalibrationError, match="128"):
        prunefront.discover(made(Residual), images()[0][:1], calibration=[images()[0][:64]])


def test_first_samples_join_batches_of_one_shape():
    batches = [{"x": torch.full((4, 3), float(i)), "mask": torch.ones(4)} for i in range(3)]
    joined = sequential.first_samples(Calibration(batches), 10).kwargs
    assert joined["x"].shape == (10, 3) and joined["mask"].shape == (10,)
    assert joined["x"][:, 0].tolist() == [0.0] * 4 + [1.0] * 4 + [2.0] * 2
    uneven = [torch.zeros(4, 3), torch.zeros(4, 5)]
    assert sequential.first_samples(Calibration(uneven), 10).args[0].shape == (4, 3)


def test_lost_outputs_are_the_residuals_of_regressions():
    torch.manual_seed(0)
    model, data = Perceptron().eval(), torch.randn(400, 6)
    space = prunefront.discover(model, data[:1], calibration=[data], criterion="l1", compensation="least_squares")
    assert space.lost_outputs() == [None]  # nothing has taken moments yet
    space.apply(space.uniform(0.5))
    (curve,) = space.lost_outputs()
    hidden = torch.relu(model.first(data)).detach().double()
    hidden, weight = hidden - hidden.mean(0), model.second.weight.detach().double()
    outputs = hidden @ weight.T
    for width in range(1, 13):
        units = list(dict(space.plan({space.groups[0].name: width}).kept)[space.groups[0].name])
        fitted = hidden[:, units] @ torch.linalg.lstsq(hidden[:, units], outputs).solution
        residual = float((outputs - fitted).square().sum() / outputs.square().sum())
        assert curve[width] == pytest.approx(residual, abs=0.01)
    assert curve[0] == pytest.approx(1) and curve[12] == 0 and (curve[:-1] >= curve[1:]).all()


def test_lost_outputs_of_groups_that_no_single_consumer_has_are_unknown():
    torch.manual_seed(0)
    data = torch.randn(64, 4, 7)
    space = prunefront.discover(Attention().eval(), data[:1], calibration=[data], criterion="reconstruction")
    known = dict(zip(space.dimensions, space.lost_outputs(), strict=True))
    assert known["up"] is not None and len(known["up"]) == 33
    assert any(curve is None for curve in known.values())


@pytest.mark.parametrize(("strength", "low", "high"), [(0.0, 0.0, 0.2), (0.7, 0.5, 0.85), (30.0, 0.99, 1.0)])
def test_fits_are_shortened_by_their_noise_and_predict_better(strength, low, high):
    generator = torch.Generator().manual_seed(0)
    rows, columns, outputs = 400, 100, 30

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    x, truth = drawn(rows, columns), strength * drawn(columns, outputs) / 10
    wanted = x @ truth + drawn(rows, outputs)
    fitted = torch.linalg.lstsq(x, wanted).solution
    share = sequential.reliable_share(float(wanted.square().sum()), float((x @ fitted).square().sum()), rows, columns)
    assert low <= share <= high
    unseen = drawn(5000, columns)
    error, shortened = ((unseen @ (truth - f * fitted)).square().mean() for f in (1.0, share))
    assert shortened < error * 1.001


def test_a_fit_that_explains_nothing_is_dropped_and_one_without_noise_kept():
    assert sequential.reliable_share(0.0, 0.0, 100, 10) == 0.0
    assert sequential.reliable_share(1.0, 1.0, 4, 10) == 1.0
