"""Ways to write a forward that are common in the wild: candidates are right, or the group is refused."""

import math
import re
import sys
from argparse import Namespace
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import prunefront
from prunefront.spaces.errors import EmptySpaceError, ModelError, TraceError
from prunefront.spaces.inputs import output_tensors
from prunefront.spaces.sizes import TracedInt, fields_of

X = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
TOKENS = torch.arange(12).reshape(2, 6) % 7


@dataclass
class Out:
    logits: torch.Tensor
    boxes: torch.Tensor


def mlp(forward, inputs=4, outputs=5, bias=True, **extra):
    """A model of layers ``a``, ``b`` and ``c`` whose forward is ``forward``."""

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.a, self.b = nn.Linear(inputs, 8, bias=bias), nn.Linear(8, 6, bias=bias)
            self.c = nn.Linear(6, outputs, bias=bias)
            for name, value in extra.items():
                setattr(self, name, value() if isinstance(value, type) else value)

    Model.forward = forward
    return Model().eval()


def check(model, x, alternatives=(), **options):
    """All exact groups at random widths: sliced equals masked, for other inputs too."""
    space = prunefront.discover(model, x, **options)
    generator = torch.Generator().manual_seed(1)
    for _ in range(4):
        exact = [group for group in space.groups if group.exact]
        widths = {g.name: int(torch.randint(g.at_least, g.size + 1, (), generator=generator)) for g in exact}
        plan = space.plan(widths)
        sliced, masked = space.slice(plan).double(), space.mask(plan).double()
        assert space.cost(plan).params == sum(p.numel() for p in sliced.parameters())
        for given in (x, *alternatives):
            given = given if isinstance(given, tuple) else (given,)
            args = [arg.double() if arg.is_floating_point() else arg for arg in given]
            with torch.no_grad():
                outputs = [output_tensors(m(*args)) for m in (sliced, masked)]
            for left, right in zip(*outputs, strict=True):
                torch.testing.assert_close(left, right, rtol=1e-9, atol=1e-9)
    return {group.name: group.size for group in space.groups}


def layers(self, x):
    return self.c(F.relu(self.b(F.relu(self.a(x)))))


@pytest.mark.parametrize("wrap", [dict, SimpleNamespace, Out])
def test_all_that_a_model_returns_is_kept_and_compared(wrap):
    def forward(self, x):
        h = F.relu(self.a(x))
        return wrap(logits=self.c(F.relu(self.b(h))), boxes=self.box(h))

    assert check(mlp(forward, box=nn.Linear(8, 4)), X) == {"a": 8, "b": 6}


def test_a_model_that_returns_no_tensor_is_told_so():
    with pytest.raises(TraceError, match=r"no tensor is found in the str"):
        prunefront.discover(mlp(lambda self, x: str(layers(self, x))), X)


def test_by_products_of_hugging_face_outputs_may_change_and_predictions_may_not():
    transformers = pytest.importorskip("transformers")
    config = transformers.YolosConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24, image_size=[32, 32],
        patch_size=16, num_detection_tokens=4, num_labels=3,
    )  # fmt: skip
    groups = check(transformers.YolosForObjectDetection(config).eval(), torch.randn(1, 3, 32, 32))
    assert not any(size == 4 for size in groups.values())  # the coordinates of boxes


class Masked(nn.Module):
    """Counts on 8 features by a number that is written in the forward; one logit is masked."""

    def __init__(self, value):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c, self.value = nn.Linear(4, 8), nn.Linear(8, 6), nn.Linear(6, 3), value

    def forward(self, x):
        y = self.c(F.relu(self.b(F.relu(self.a(x)) / 8 * self.a(x).shape[1])))
        return y.masked_fill(torch.tensor([True, False, False]), self.value)


@pytest.mark.parametrize("value", [0.0, -1e9, torch.finfo(torch.float32).min])
def test_large_constants_in_the_output_hide_no_error(value):
    assert check(Masked(value), X) == {"b": 6}


def test_where_nothing_depends_on_a_group_nothing_is_proven():
    with pytest.raises(EmptySpaceError, match="nothing can be compared"):
        prunefront.discover(mlp(layers, bias=False), torch.zeros(3, 4))
    closed = nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 5))
    layers_of_it = list(closed)
    closed.forward = lambda t: layers_of_it[3](layers_of_it[2](layers_of_it[1](layers_of_it[0](t))))
    with pytest.raises(EmptySpaceError, match="nothing can be compared"):
        prunefront.discover(closed, TOKENS)


def test_complex_outputs_are_compared_whole():
    def forward(self, x):
        return torch.polar(torch.ones(len(x), 5).to(x), layers(self, x))

    assert check(mlp(forward), X) in ({}, {"a": 8, "b": 6})


class Attention(nn.Module):
    def __init__(self, dim, heads):
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(dim, dim) for _ in range(4))
        self.heads = heads

    def forward(self, x, heads=None):
        b, t, _ = x.shape
        q, k, v = (layer(x).view(b, t, heads or self.heads, -1).transpose(1, 2) for layer in (self.q, self.k, self.v))
        return self.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, t, -1))


class Parent(nn.Module):
    """Its number of heads is that of both of its attentions."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.heads = Attention(16, 4), Attention(16, 4), 4

    def forward(self, x):
        return self.b(self.a(x, self.heads), self.heads)


def test_attentions_that_share_a_number_of_heads_lose_the_same_ones():
    groups = check(Parent(), torch.randn(2, 6, 16))
    assert "a.heads" in groups and "b.heads" not in groups


def test_layers_that_hold_only_with_equal_widths_are_refused():
    class View(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = nn.Conv2d(3, 12, 1), nn.Conv2d(12, 12, 1)
            self.out = nn.Conv2d(12, 2, 1)

        def forward(self, x):
            h = F.relu(self.one(x))
            return self.out(F.relu(self.two(h)).view(len(x), int(f"{h.shape[1]}"), 4, 4))

    for seed in range(3):
        torch.manual_seed(seed)
        with pytest.raises(EmptySpaceError, match="is invalid for input of size"):
            prunefront.discover(View(), torch.randn(2, 3, 4, 4))


def test_einops_gives_every_layer_its_own_heads():
    pytest.importorskip("einops")
    from einops import rearrange

    class Rearranged(Attention):
        def forward(self, x):
            q, k, v = (rearrange(layer(x), "b n (h d) -> b h n d", h=self.heads) for layer in (self.q, self.k, self.v))
            return self.o(rearrange(F.scaled_dot_product_attention(q, k, v), "b h n d -> b n (h d)"))

    for _ in range(2):  # what the first space left in caches must not matter to the second
        torch.manual_seed(0)
        model = nn.Sequential(*(Rearranged(16, 4) for _ in range(3)))
        groups = check(model, torch.randn(2, 5, 16))
        assert {f"{layer}.heads" for layer in range(3)} <= set(groups)
    assert not any(isinstance(value, TracedInt) for module in model.modules() for value in vars(module).values())
    assert hasattr(sys.modules["einops.einops"]._reconstruct_from_shape, "cache_info")


def test_the_bound_of_a_slice_is_no_width():
    class Cut(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.max_len, self.heads = 8, 2
            self.q, self.o = nn.Linear(4, 16), nn.Linear(16, 3)

        def forward(self, x):
            x = x[:, : self.max_len]
            h = self.q(x).view(*x.shape[:2], self.heads, -1)
            return self.o(F.relu(h).flatten(2))

    check(Cut(), torch.randn(2, 4, 4), alternatives=[torch.randn(2, 9, 4)])


def test_the_largest_of_features_are_no_choice_of_experts():
    def forward(self, x):
        h = self.a(x)
        return self.c(F.relu(self.b(h * (h >= h.topk(3, 1).values[:, -1:]))))

    assert check(mlp(forward), X) == {"b": 6}


def test_masks_of_several_dimensions_are_looked_up_and_written():
    def forward(self, x, mask):
        h = F.relu(self.a(x))
        y = torch.zeros_like(h)
        y[mask] = h[mask]
        return self.c(F.relu(self.b(y)))

    x, mask = torch.randn(2, 3, 4), torch.tensor([[True, False, True], [False, True, True]])
    assert check(mlp(forward), (x, mask)) == {"a": 8, "b": 6}


def test_empty_tensors_are_concatenated_and_returned():
    def forward(self, x):
        return layers(self, x), torch.cat([x[:0], x[:0]])

    assert check(mlp(forward), X) == {"a": 8, "b": 6}


def test_a_buffer_that_the_forward_makes_is_made_again():
    def forward(self, x):
        if not hasattr(self, "mask"):
            self.register_buffer("mask", torch.tril(torch.ones(x.shape[1], x.shape[1])))
        return layers(self, x @ self.mask.to(x))

    model = mlp(forward)
    assert check(model, X) == {"a": 8, "b": 6} and not hasattr(model, "mask")


def test_parameters_of_one_storage_are_all_used():
    model = mlp(layers)
    nn.utils.vector_to_parameters(nn.utils.parameters_to_vector(model.parameters()), model.parameters())
    assert check(model, X) == {"a": 8, "b": 6}


def test_what_cannot_be_copied_is_told_with_what_to_do():
    class Single:
        def __deepcopy__(self, memo):
            raise TypeError("there is one of me")

    with pytest.raises(ModelError, match=r"cannot be copied: TypeError: there is one of me; .* __deepcopy__"):
        prunefront.discover(mlp(layers, one=Single()), X)


def test_an_error_of_the_forward_is_the_users():
    def forward(self, x):
        assert x.shape[0] == 99, "wrong batch"

    with pytest.raises(TraceError, match="wrong batch"):
        prunefront.discover(mlp(forward), X)


def test_a_rule_that_fails_freezes_what_it_touches(monkeypatch, caplog):
    from prunefront.spaces.rules import RULES

    monkeypatch.setitem(RULES, "addmm", lambda call: 1 / 0)
    with pytest.raises(EmptySpaceError, match="no rule for this operator"):
        prunefront.discover(mlp(layers), X)
    assert "the rule of addmm in a fails, and what it touches is frozen: division by zero" in caplog.text


@pytest.mark.parametrize("norm", [nn.LayerNorm, nn.RMSNorm])
def test_norms_without_weights_follow_the_width(norm):
    groups = check(nn.Sequential(nn.Linear(4, 8), norm(8, elementwise_affine=False), nn.Linear(8, 3)).eval(), X)
    assert groups == {"0": 8}


def test_rotary_embeddings_in_complex_numbers():
    class Rope(Attention):
        def __init__(self):
            super().__init__(16, 2)
            self.register_buffer("turn", torch.polar(torch.ones(6, 4), torch.arange(24.0).view(6, 4)))

        def turned(self, x):
            pairs = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2))
            return torch.view_as_real(pairs * self.turn.to(pairs)[:, None]).flatten(3)

        def forward(self, x):
            b, t, _ = x.shape
            q, k, v = (layer(x).view(b, t, self.heads, -1) for layer in (self.q, self.k, self.v))
            q, k, v = (each.transpose(1, 2) for each in (self.turned(q), self.turned(k), v))
            return self.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, t, -1))

    torch.manual_seed(0)
    assert {"heads", "head_dim"} <= set(check(Rope().double(), torch.randn(2, 6, 16, dtype=torch.float64)))


FILTER = torch.ones(1, 1, 3, 3)
OPERATORS = {
    "glu": (lambda h: F.glu(torch.cat([h, h], 1), 1), 1),
    "pixel_unshuffle": (lambda h: F.pixel_unshuffle(h, 2), 4),
    "grid_sample": (lambda h: F.grid_sample(h, torch.zeros(2, 3, 3, 2).to(h), align_corners=False), 1),
    "blur": (lambda h: F.conv2d(h, FILTER.to(h).expand(h.shape[1], 1, 3, 3), groups=h.shape[1]), 1),
}


@pytest.mark.parametrize("name", OPERATORS)
def test_channels_pass_through(name):
    operator, times = OPERATORS[name]

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8 * times, 5, 1)

        def forward(self, x):
            return self.b(operator(F.relu(self.a(x)))).mean((2, 3))

    assert [*check(Model(), torch.randn(2, 3, 8, 8)).values()] == [8]


def test_inside_inference_mode_operators_come_whole():
    assert check(mlp(torch.inference_mode()(layers)), X) == {"a": 8, "b": 6}
    with torch.inference_mode():
        assert {group.name for group in prunefront.discover(mlp(layers), X).groups} == {"a", "b"}


def test_read_only_values_of_a_configuration_stay_as_they_are():
    transformers = pytest.importorskip("transformers")
    config = transformers.FalconConfig(
        vocab_size=7, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, ffn_hidden_size=24
    )
    groups = check(transformers.FalconForCausalLM(config).eval(), TOKENS)
    assert any(re.search("mlp|h_to_4h", name) for name in groups)


def test_a_tensor_times_itself_is_repaired_as_far_as_that_goes():
    class Bilinear(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.a, self.out = nn.Conv2d(3, 8, 1), nn.Linear(64, 3)

        def forward(self, x):
            h = self.a(x).flatten(2)
            return self.out((h @ h.transpose(1, 2)).flatten(1))

    model, x = Bilinear(), torch.randn(64, 3, 4, 4)
    for compensation in ("least_squares", "sequential"):
        space = prunefront.discover(model, x[:2], calibration=[x, x], compensation=compensation)
        assert space.apply(space.uniform(0.5))(x).shape == (64, 3)


def test_statistics_of_a_norm_that_is_called_twice_are_those_of_both_calls():
    class Siamese(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.tower = nn.Sequential(nn.Linear(4, 16), nn.BatchNorm1d(16), nn.ReLU())
            self.out = nn.Linear(16, 3)

        def forward(self, x, y):
            return self.out(self.tower(x) * self.tower(y))

    torch.manual_seed(1)
    model = Siamese().train()
    batches = [(torch.randn(256, 4), 3 + 2 * torch.randn(256, 4)) for _ in range(4)]
    with torch.no_grad():
        for _ in range(30):
            for x, y in batches:
                model(x, y)
    model.eval()
    pairs = [(x, y, torch.zeros(256)) for x, y in batches]
    whole = []
    for options in ({"compensation": "sequential"}, {"criterion": "l1", "compensation": "bn"}):
        space = prunefront.discover(model, batches[0], calibration=pairs, **options)
        whole.append(space.apply(space.plan({})))
    norms = [found.tower[1] for found in whole]
    torch.testing.assert_close(norms[0].running_mean, norms[1].running_mean)
    torch.testing.assert_close(norms[0].running_var, norms[1].running_var)
    x, y = batches[0]
    with torch.no_grad():
        error, of_statistics = ((found(x, y) - model(x, y)).norm() / model(x, y).norm() for found in whole)
    assert error < 1.05 * of_statistics < 0.2


@dataclass(frozen=True)
class Config:
    n_head: int = 4
    n_embd: int = 32
    n_layer: int = 3

    @property
    def head_size(self):
        return self.n_embd // self.n_head


class ConfiguredAttention(nn.Module):
    """Reads its sizes from what it was made of, as many a hand-written transformer does."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.qkv, self.out = nn.Linear(32, 96), nn.Linear(32, 32)

    def forward(self, x):
        batch, length, _ = x.shape
        heads = self.config["n_head"] if isinstance(self.config, dict) else self.config.n_head
        q, k, v = (part.view(batch, length, heads, -1).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
        return x + self.out(mixed.reshape(batch, length, -1))


class PropertyAttention(ConfiguredAttention):
    def forward(self, x):
        batch, length, _ = x.shape
        shape = (batch, length, self.config.n_head, self.config.head_size)
        q, k, v = (part.view(shape).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        return x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Configured(nn.Module):
    def __init__(self, config, attention=ConfiguredAttention):
        super().__init__()
        torch.manual_seed(0)
        self.config, self.embedding, self.head = config, nn.Embedding(7, 32), nn.Linear(32, 5)
        self.layers = nn.ModuleList(attention(config) for _ in range(3))

    def forward(self, tokens):
        x = self.embedding(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


CONFIGS = (Config(), SimpleNamespace(n_head=4), Namespace(n_head=4), {"n_head": 4})


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: type(config).__name__)
def test_sizes_in_a_configuration_that_layers_share(config):
    model = Configured(config).eval()
    check(model, TOKENS)
    space = prunefront.discover(model, TOKENS)
    assert [group.kind for group in space.groups].count("head") == 3
    candidate = space.slice(space.plan({"layers.0.heads": 1, "layers.1.heads": 3}))
    counts = [fields_of(layer.config)["n_head"] for layer in candidate.layers]
    assert counts == [1, 3, 4] and fields_of(config)["n_head"] == 4
    assert all(layer.config is config for layer in model.layers)


def test_sizes_that_a_configuration_derives():
    model = Configured(Config(), PropertyAttention).eval()
    check(model, TOKENS)
    assert any(group.kind == "head" for group in prunefront.discover(model, TOKENS).groups)


def test_a_vocabulary_is_no_configuration():
    model = mlp(lambda self, x: self.c(self.b(self.a(x))), words={str(i): i for i in range(1000)})
    assert fields_of(model.words) == {}
    check(model, X)


class Rotary(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.rand(32))
        self.register_buffer("shift", torch.rand(32))

    def forward(self, x):
        return x * self.scale + self.shift


class Rotated(nn.Module):
    def __init__(self, rotary):
        super().__init__()
        self.rotary, self.up, self.down = rotary, nn.Linear(32, 16), nn.Linear(16, 32)

    def forward(self, x):
        return x + self.down(torch.relu(self.up(self.rotary(x))))


def test_blocks_that_share_a_module_can_be_taken_out():
    torch.manual_seed(0)
    rotary = Rotary()
    model = nn.Sequential(nn.Linear(4, 32), *(Rotated(rotary) for _ in range(3)), nn.Linear(32, 5)).eval()
    check(model, X, uniform=False)
    space = prunefront.discover(model, X)
    (stack,) = (group for group in space.groups if group.kind == "block")
    first_gone = space.plan({stack.name: 2})
    assert space.cost(first_gone).params == sum(p.numel() for p in space.slice(first_gone).parameters())


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("norm_first", [True, False])
def test_layers_of_an_encoder_that_is_itself_a_residual_block(norm_first, batch_first):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=batch_first, norm_first=norm_first)
    encoder = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)
    model = nn.Sequential(nn.Embedding(7, 32), encoder, nn.Linear(32, 5)).eval()
    check(model, TOKENS)
    stacks = {group.name: group.exact for group in prunefront.discover(model, TOKENS).groups if group.kind == "block"}
    assert stacks == {"1.layers": norm_first, "1.layers.*.self_attn": True}


class ShapedAttention(nn.Module):
    """Takes its width from its input, as timm's first vision transformers did."""

    def __init__(self, split):
        super().__init__()
        self.heads, self.scale, self.split = 4, 8**-0.5, split
        self.norm, self.qkv, self.out = nn.LayerNorm(32), nn.Linear(32, 96), nn.Linear(32, 32)

    def forward(self, x):
        batch, length, width = x.shape
        qkv = self.qkv(self.norm(x))
        if self.split:
            parts = qkv.split(width, dim=2)
            q, k, v = (t.view(batch, length, self.heads, width // self.heads).transpose(1, 2) for t in parts)
        else:
            q, k, v = qkv.reshape(batch, length, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        mixed = (q * self.scale @ k.transpose(-2, -1)).softmax(-1) @ v
        return x + self.out(mixed.transpose(1, 2).reshape(batch, length, width))


@pytest.mark.parametrize("split", [False, True])
def test_widths_taken_from_the_shape_of_an_input_are_pruned_together(split):
    torch.manual_seed(0)
    layers = [nn.Embedding(7, 32), ShapedAttention(split), ShapedAttention(split), nn.Linear(32, 5)]
    space = prunefront.discover(nn.Sequential(*layers).eval(), TOKENS)
    assert sorted(group.kind for group in space.groups if group.kind != "block") == ["head", "head_dim"]
    heads, width = (next(g.name for g in space.groups if g.kind == kind) for kind in ("head", "head_dim"))
    candidate = space.slice(space.plan({heads: 3, width: 6}))
    assert candidate[0].embedding_dim == 18 and candidate[1].qkv.out_features == 54
    candidate(TOKENS)
    # Without normalisation nothing in it is inexact.
    for layer in (layers[1], layers[2]):
        layer.norm = nn.Identity()
    check(nn.Sequential(*layers).eval(), TOKENS, [TOKENS[:, :3]])


def test_tensors_made_as_wide_as_others_are_pruned_with_them():
    class Passing(nn.Module):
        def __init__(self):
            super().__init__()
            self.message, self.update, self.out = nn.Linear(4, 12), nn.Linear(4, 12), nn.Linear(12, 3)

        def forward(self, x, edges):
            message = torch.relu(self.message(x))
            total = torch.zeros(len(x), message.shape[1]).to(x).index_add(0, edges, message)
            rest = message.new_zeros(x.size(0), self.update.weight.shape[0]) + self.update(x)
            return self.out(total + rest)

    inputs = (torch.randn(5, 4), torch.tensor([0, 1, 1, 2, 4]))
    space = prunefront.discover(Passing().eval(), inputs)
    assert [group.size for group in space.groups] == [12]


class Distances(nn.Module):
    """``most`` equals a width, and has nothing to do with it."""

    def __init__(self):
        super().__init__()
        self.heads, self.width, self.most, self.steps = 2, 8, 16, 16
        self.embedding, self.bias, self.out = nn.Embedding(7, 16), nn.Embedding(16, 2), nn.Linear(16, 5)
        self.q, self.k, self.v, self.o = (nn.Linear(16, 16) for _ in range(4))

    def forward(self, tokens):
        x = self.embedding(tokens)
        batch, length, _ = x.shape
        parts = (layer(x).view(batch, length, self.heads, self.width) for layer in (self.q, self.k, self.v))
        q, k, v = (part.transpose(1, 2) for part in parts)
        places = torch.arange(length)
        near = (places[:, None] - places).abs().clamp(max=self.most - 1)
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=self.bias(near).permute(2, 0, 1).to(q.dtype))
        return self.out(x + self.o(mixed.transpose(1, 2).flatten(2)) * (length / self.steps))


def test_attributes_that_only_equal_a_width_stay():
    long = torch.arange(60).reshape(2, 30) % 7
    groups = check(Distances().double().eval(), TOKENS, [long])
    assert "heads" in groups
    space = prunefront.discover(Distances().eval(), TOKENS)
    candidate = space.slice(space.plan({"heads": 1}))
    assert (candidate.heads, candidate.most, candidate.steps) == (1, 16, 16)


def test_widths_that_are_only_compared_follow():
    class Around(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.embedding, self.inner, self.out = nn.Embedding(7, 16), inner, nn.Linear(16, 5)

        def forward(self, tokens):
            x = self.embedding(tokens)
            y = self.inner(x, x) if isinstance(self.inner, nn.Transformer) else self.inner(x)[0]
            return self.out(x + y)

    torch.manual_seed(0)
    transformer = Around(nn.Transformer(16, 2, 1, 1, 32, batch_first=True))
    kinds = [group.kind for group in prunefront.discover(transformer.eval(), TOKENS).groups]
    assert "hidden" in kinds
    space = prunefront.discover(Around(nn.GRU(16, 16, batch_first=True)).eval(), TOKENS)
    (group,) = space.groups
    candidate = space.slice(space.plan({group.name: 5}))
    assert candidate.inner.input_size == 5
    check(Around(nn.GRU(16, 16, batch_first=True)).eval(), TOKENS, [TOKENS[:, :2]])


def test_sizes_that_a_model_keeps_are_plain_afterwards():
    class Keeping(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 3)

        def forward(self, x):
            h = self.a(x)
            self.shape, self.width, self.halves = h.shape, h.shape[-1], [h.shape[-1] // 2]
            return self.b(h)

    model = Keeping().eval()
    prunefront.discover(model, X)
    found = [model.width, *model.halves, *getattr(model, "shape", ())]
    assert all(type(value) is int for value in found)


def test_shuffled_channels_are_free_in_their_order():
    class Shuffling(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = nn.Conv2d(3, 12, 1), nn.Conv2d(12, 2, 1)

        def forward(self, x):
            x = self.one(x)
            batch, channels, height, width = x.shape
            x = x.view(batch, 2, channels // 2, height, width).transpose(1, 2)
            return self.two(x.reshape(batch, channels, height, width))

    torch.manual_seed(0)
    groups = check(Shuffling().eval(), torch.randn(2, 3, 4, 4))
    assert set(groups.values()) == {6} or set(groups.values()) == {12}


SCALES = {
    "root of a size": lambda self, q, k, v: ((q @ k.mT) * (1 / math.sqrt(k.size(-1)))).softmax(-1) @ v,
    "power of an attribute": lambda self, q, k, v: ((q @ k.mT) * self.width**-0.5).softmax(-1) @ v,
    "before the product": lambda self, q, k, v: ((q * self.width**-0.5) @ k.mT).softmax(-1) @ v,
    "division": lambda self, q, k, v: ((q @ k.mT) / q.shape[-1] ** 0.5).softmax(-1) @ v,
    "given to the kernel": lambda self, q, k, v: F.scaled_dot_product_attention(q, k, v, scale=self.width**-0.5),
    "constant": lambda self, q, k, v: ((q @ k.mT) / 3).softmax(-1) @ v,
}


class Scaling(nn.Module):
    def __init__(self, attend):
        super().__init__()
        torch.manual_seed(0)
        self.heads, self.width, self.attend = 4, 8, attend
        self.embedding, self.out = nn.Embedding(7, 16), nn.Linear(32, 5)
        self.q, self.k, self.v = (nn.Linear(16, 32) for _ in range(3))

    def forward(self, tokens):
        x = self.embedding(tokens)
        parts = (layer(x).unflatten(-1, (self.heads, self.width)) for layer in (self.q, self.k, self.v))
        q, k, v = (part.transpose(1, 2) for part in parts)
        return self.out(self.attend(self, q, k, v).transpose(1, 2).flatten(2))


@pytest.mark.parametrize("attend", SCALES.values(), ids=SCALES)
def test_scales_that_the_forward_computes_are_kept(attend):
    groups = check(Scaling(attend).double().eval(), TOKENS, [TOKENS[:, :3]])
    assert {"heads", "head_dim"} <= set(groups)


def turned(x, angles):
    first, second = x.chunk(2, -1)
    return x * torch.cat([angles, angles], -1).cos() + torch.cat([-second, first], -1) * angles.sin().repeat(1, 2)


def turned_as_complex(x, angles):
    pairs = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2)) * torch.polar(torch.ones_like(angles), angles)
    return torch.view_as_real(pairs).flatten(-2)


@pytest.mark.parametrize("turn", [turned, turned_as_complex])
@pytest.mark.parametrize("packed", [False, True])
def test_scales_behind_a_rotary_embedding_are_kept(turn, packed):
    class Turning(Scaling):
        def __init__(self):
            super().__init__(F.scaled_dot_product_attention)
            self.qkv = nn.Linear(16, 96)
            self.register_buffer("rates", 0.1 ** torch.arange(4.0))

        def forward(self, tokens):
            x = self.embedding(tokens)
            whole = self.qkv(x).chunk(3, -1) if packed else [layer(x) for layer in (self.q, self.k, self.v)]
            q, k, v = (part.unflatten(-1, (self.heads, self.width)).transpose(1, 2) for part in whole)
            angles = torch.arange(tokens.shape[1])[:, None] * self.rates
            mixed = self.attend(turn(q, angles), turn(k, angles), v)
            return self.out(mixed.transpose(1, 2).flatten(2))

    groups = check(Turning().double().eval(), TOKENS, [TOKENS[:, :3]])
    assert groups["head_dim"] == 4  # pairs


def test_another_scale_is_no_scale():
    groups = check(Scaling(lambda self, q, k, v: ((q @ k.mT) / self.width).softmax(-1) @ v).double().eval(), TOKENS)
    assert "heads" in groups and "head_dim" not in groups


def test_a_width_that_is_checked_and_given_is_one():
    class Checking(ConfiguredAttention):
        def forward(self, x):
            batch, length, width = x.shape
            assert width == self.config.n_embd
            shape = (batch, length, self.config.n_head, -1)
            q, k, v = (part.view(shape).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
            mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
            return x + self.out(mixed.reshape(batch, length, self.config.n_embd))

    model = Configured(Config(), Checking).double().eval()
    check(model, TOKENS)
    kinds = sorted(group.kind for group in prunefront.discover(model, TOKENS).groups)
    assert kinds == ["block", "head", "head_dim"]
