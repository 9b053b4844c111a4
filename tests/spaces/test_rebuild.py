"""A model from JSON and tensors alone: the same function, and no way for a file to choose what code runs."""

import copy
import json
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

import prunefront
from prunefront.spaces.errors import StorageError
from prunefront.spaces.proof import outputs_of
from prunefront.spaces.rebuild import describe, rebuild, refill
from prunefront.spaces.surgery import dense_names, tensors_of
from tests.models import build


class Odd(nn.Module):
    """Shared modules, tied weights, a buffer that is not persistent, tuples, infinities, a lambda."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.again = self.first
        self.tied = nn.Linear(6, 6)
        self.tied.weight = self.first.weight
        self.act = torch.nn.functional.gelu
        self.limits = (-float("inf"), {"high": 2.5, "kinds": [nn.Linear, torch.float32]})
        self.register_buffer("shift", torch.randn(6), persistent=False)
        self.absent = None
        self.register_parameter("none", None)
        self.first.bias.requires_grad = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        low, options = self.limits
        return self.act(self.tied(self.again(self.first(x)))).clamp(low, options["high"]) + self.shift


def copied(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in tensors_of(model).items()}


def roundtrip(model: nn.Module) -> nn.Module:
    return rebuild(json.loads(json.dumps(describe(model))), copied(model))


def test_odd_models_come_back():
    model = Odd().eval()
    again, x = roundtrip(model), torch.randn(3, 6)
    assert torch.equal(again(x), model(x))
    assert again.again is again.first and again.tied.weight is again.first.weight
    assert not again.first.bias.requires_grad and again.first.weight.requires_grad
    assert set(again.state_dict()) == set(model.state_dict()) and again.limits == model.limits


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small", "shufflenet_v2_x1_0", "densenet121", "googlenet"])
def test_torchvision_models_come_back(name):
    torchvision = pytest.importorskip("torchvision")
    extra = {"init_weights": False, "aux_logits": False} if name == "googlenet" else {}
    model = getattr(torchvision.models, name)(weights=None, **extra).eval()
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(roundtrip(model)(x), model(x))


@pytest.mark.parametrize("name", ["llama", "bert", "gpt2", "t5", "vit", "mixtral", "nn.TransformerEncoder", "swin_t"])
def test_pruned_transformers_come_back_alone(name):
    """Blocks gone, widths that no configuration can express, equivalents of attention modules."""
    pytest.importorskip("transformers")
    model, inputs = build(name)
    space = prunefront.discover(model, inputs)
    candidate = space.apply(space.uniform(0.4)).eval()
    description = json.loads(json.dumps(describe(candidate)))
    assert not description["left_out"]
    again = rebuild(description, copied(candidate))
    for actual, expected in zip(outputs_of(again, inputs), outputs_of(candidate, inputs), strict=True):
        assert torch.equal(actual, expected)


def test_a_file_cannot_call_a_configuration_something_else():
    pytest.importorskip("transformers")
    description = describe(build("llama")[0])
    for path in ("torch.nn.modules.linear:Linear", "transformers.utils.import_utils:is_torch_available"):
        description["configs"][0]["class"] = path
        with pytest.raises(StorageError, match="no configuration"):
            rebuild(description, {})


def test_what_json_cannot_express_is_listed():
    model = Odd()
    model.act = lambda x: x
    model.tied.register_forward_hook(lambda *_: None)
    description = describe(model)
    assert description["left_out"] == ["act", "tied._forward_hooks"]
    again = refill(model, description, copied(model))
    assert again is not model and torch.equal(again(torch.ones(1, 6)), model(torch.ones(1, 6)))


def test_refill_wants_the_same_model():
    model = nn.Sequential(nn.Linear(3, 2))
    with pytest.raises(StorageError, match=r"differ in 0\.bias"):
        refill(nn.Sequential(nn.Linear(3, 2, bias=False)), describe(model), copied(model))


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("os:system", "not a module class"),
        ("subprocess:Popen", "not a module class"),
        ("this:Zen", "import this first"),
        ("torch.distributed.__main__:X", "import torch"),
        ("torch.nn.modules.nothing:X", "cannot be imported"),
        ("torch:hub.load", "not a module class"),
    ],
)
def test_a_file_cannot_choose_other_code(path, message):
    model = nn.Sequential(nn.ReLU())
    description = describe(model)
    description["modules"][1]["class"] = path
    with pytest.raises(StorageError, match=message):
        rebuild(description, {})


@pytest.mark.parametrize(
    "attributes",
    [{"forward": {"function": "relu"}}, {"__class__": 1}, {"x": {"function": "importlib"}}, {"x": {"pickle": "gASV"}}],
)
def test_attributes_cannot_change_what_runs(attributes):
    description = describe(nn.Sequential(nn.ReLU()))
    description["modules"][1]["attributes"] = attributes
    with pytest.raises(StorageError):
        rebuild(description, {})


def test_damage_is_reported():
    good = describe(nn.Sequential(nn.Linear(2, 2)))
    for key in ("class", "attributes", "children", "parameters"):
        bad = copy.deepcopy(good)
        del bad["modules"][1][key]
        with pytest.raises(StorageError, match="damaged"):
            rebuild(bad, {"0.weight": torch.ones(2, 2), "0.bias": torch.ones(2)})


@dataclass
class Sizes:
    heads: int = 4
    act: object = None
    inner: object = None


class Attending(nn.Module):
    """Of widths that a record says."""

    def __init__(self, sizes, hidden=lambda x: x):
        super().__init__()
        self.sizes, self.hidden = sizes, hidden
        self.embedding, self.value, self.out = nn.Embedding(7, 16), nn.Linear(16, 16), nn.Linear(16, 5)
        layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)

    def forward(self, tokens):
        x = self.encoder(self.embedding(tokens))
        x = self.value(x).view(*tokens.shape, self.sizes.heads, -1)
        return self.out(x.softmax(-1).flatten(2))


TOKENS = torch.arange(12).reshape(2, 6) % 7


def pruned_attending(sizes):
    model = Attending(sizes).eval()
    space = prunefront.discover(model, TOKENS)
    stack = {"encoder.layers": 2, "encoder.layers.*.self_attn": 1}
    heads = {group.name: 2 for group in space.groups if group.kind == "head"}
    candidate = space.slice(space.plan({**heads, **stack}))
    assert "Substitute" in str(candidate)
    return model, candidate, json.loads(json.dumps(describe(candidate)))


@pytest.mark.parametrize(
    "sizes", [Sizes(), Sizes(act=object()), Sizes(act=nn.GELU, inner=Sizes()), SimpleNamespace(heads=4)]
)
def test_records_and_removed_blocks_come_back(sizes):
    model, candidate, description = pruned_attending(sizes)
    assert "hidden" in description["left_out"]
    with torch.no_grad():
        again = refill(model, description, copied(candidate))
        assert torch.equal(again(TOKENS), candidate(TOKENS))
        # Alone too: the forward does not use what is left out.
        assert torch.equal(rebuild(description, copied(candidate))(TOKENS), candidate(TOKENS))
    assert model.sizes is sizes and len(model.encoder.layers) == 3


def test_records_that_hold_each_other_end():
    sizes = Sizes()
    sizes.inner = sizes
    _, candidate, description = pruned_attending(sizes)
    assert any(name.endswith("inner.inner") for name in description["left_out"])
    assert torch.equal(rebuild(description, copied(candidate))(TOKENS), candidate(TOKENS))


@pytest.mark.parametrize("path", ["subprocess:Popen", "pathlib:Path", "torch.nn:Linear", "builtins:dict"])
def test_a_record_is_a_dataclass(path):
    description = describe(nn.Sequential(nn.ReLU()))
    description["modules"][1]["attributes"] = {"x": {"record": {"class": path, "attributes": {"args": 1}}}}
    with pytest.raises(StorageError, match="no dataclass"):
        rebuild(description, {})


class Recurrent(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.layer, self.head = kind(4, 8, num_layers=2, bidirectional=True), nn.Linear(16, 3)
        self.scale = np.sqrt(2.0)

    def forward(self, x):
        return self.head(self.layer(x)[0] * float(self.scale))


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent_layers_come_back_alone(kind):
    model, x = Recurrent(kind).eval(), torch.randn(5, 2, 4)
    description = json.loads(json.dumps(describe(model)))
    assert not description["left_out"]
    again = rebuild(description, copied(model))
    assert torch.equal(again(x), model(x))
    with torch.no_grad():
        again.layer.weight_hh_l0.zero_()
    assert not torch.equal(again(x), model(x))  # the layer runs on the parameters that it shows


class Scaled(nn.Module):
    def __init__(self, scale):
        super().__init__()
        self.scale, self.act, self.layer = scale, lambda x: x, nn.Linear(8, 8)

    def forward(self, x):
        return x + self.scale * self.act(self.layer(x))


def test_the_blocks_that_stayed_are_taken_from_the_dense_model():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), *(Scaled(0.5 * i) for i in range(1, 5)), nn.Linear(8, 3)).eval()
    x = torch.randn(2, 4)
    space = prunefront.discover(model, x, include=["blocks"])
    candidate = space.slice(prunefront.spaces.Plan.of({"blocks": [1, 3]}))
    description = json.loads(json.dumps(describe(candidate)))
    again = refill(model, description, copied(candidate))
    assert torch.equal(again(x), candidate(x)) and [again[1].scale, again[2].scale] == [1.0, 2.0]
    # Pruned once more.
    smaller = prunefront.discover(candidate, x, include=["blocks"])
    twice = smaller.slice(prunefront.spaces.Plan.of({"blocks": [1]}))
    assert dense_names(twice)["1"] == "4" and dense_names(twice)["2"] == "5"
    again = refill(model, json.loads(json.dumps(describe(twice))), copied(twice))
    assert torch.equal(again(x), twice(x))
