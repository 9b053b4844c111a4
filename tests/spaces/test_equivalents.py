"""Equivalents compute what the originals compute, hold the same tensors, and run when their parameters are sliced."""

import copy
import itertools
import json
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from prunefront.spaces import equivalents
from prunefront.spaces.equivalents import equivalent_of, replace
from prunefront.spaces.rebuild import describe, rebuild
from prunefront.spaces.surgery import tensors_of

BATCH, LONG, SHORT = 3, 5, 7
HEADS, HEAD_DIM = 4, 6
WIDTH = HEADS * HEAD_DIM
KEPT = [1, 2]


@pytest.fixture(autouse=True)
def double() -> Iterable[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(before)


def same(left: Any, right: Any) -> None:
    torch.testing.assert_close(left, right, rtol=0, atol=1e-10)


def randomise(model: nn.Module) -> nn.Module:
    """No parameter is zero: a bias that is left out shows."""
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model


def attention(**options: Any) -> nn.MultiheadAttention:
    return randomise(nn.MultiheadAttention(WIDTH, HEADS, **options))  # type: ignore[return-value]


def equivalent(module: nn.Module) -> Any:
    found = equivalent_of(module)
    assert found is not None
    return found


def inputs(module: nn.MultiheadAttention, cross: bool, batched: bool = True) -> tuple[Tensor, Tensor, Tensor]:
    def sequence(length: int, width: int) -> Tensor:
        if not batched:
            return torch.randn(length, width)
        return torch.randn(BATCH, length, width) if module.batch_first else torch.randn(length, BATCH, width)

    if cross:
        return sequence(LONG, WIDTH), sequence(SHORT, module.kdim), sequence(SHORT, module.vdim)
    x = sequence(LONG, WIDTH)
    return x, x, x


def agree(module: nn.Module, other: nn.Module, *arguments: Any, **options: Any) -> None:
    """Both give the same in training mode, in evaluation mode, and where the original takes its fused path."""
    for training, grad in ((True, True), (False, True), (False, False)):
        module.train(training)
        other.train(training)
        with torch.set_grad_enabled(grad):
            torch.manual_seed(1)
            expected = module(*arguments, **options)
            torch.manual_seed(1)
            same(other(*arguments, **options), expected)


CONSTRUCTED = {
    "plain": {},
    "no bias": {"bias": False},
    "bias_kv": {"add_bias_kv": True},
    "zero attention": {"add_zero_attn": True},
    "bias_kv and zero attention": {"add_bias_kv": True, "add_zero_attn": True},
    "kdim and vdim": {"kdim": 10, "vdim": 11},
    "kdim without bias": {"kdim": 10, "bias": False, "add_bias_kv": True},
}


@pytest.mark.parametrize("options", CONSTRUCTED.values(), ids=CONSTRUCTED)
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize("need_weights", [True, False])
def test_multihead_attention(options: dict[str, Any], batch_first: bool, batched: bool, need_weights: bool) -> None:
    module = attention(batch_first=batch_first, **options)
    other = equivalent(module)
    for cross in (True, False) if "kdim" not in options else (True,):
        arguments = inputs(module, cross, batched)
        agree(module, other, *arguments, need_weights=need_weights)
        agree(module, other, *arguments, need_weights=need_weights, average_attn_weights=False)


def test_same_width_but_other_tensors() -> None:
    module = attention(batch_first=True)
    q, k, v = (torch.randn(BATCH, LONG, WIDTH) for _ in range(3))
    for arguments in ((q, k, v), (q, k, k), (q, q, v), (q, k, q)):
        agree(module, equivalent(module), *arguments)


def masks(batch: int, boolean: bool, length: int) -> dict[str, Tensor]:
    """Masks of all kinds in which every query sees the first key."""
    found = {
        "attn_mask 2-D": torch.rand(LONG, length) < 0.4,
        "attn_mask 3-D": torch.rand(batch * HEADS, LONG, length) < 0.4,
        "key_padding_mask": torch.rand(batch, length) < 0.4,
    }
    for name, mask in found.items():
        mask[..., 0] = False
        found[name] = mask if boolean else torch.randn(mask.shape).masked_fill(mask, -torch.inf)
    return found


@pytest.mark.parametrize("chosen", [(0,), (1,), (2,), (0, 2), (1, 2)])
@pytest.mark.parametrize("boolean", [True, False])
@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize("extended", [True, False])
@pytest.mark.parametrize("need_weights", [True, False])
def test_masks(chosen: tuple[int, ...], boolean: bool, batched: bool, extended: bool, need_weights: bool) -> None:
    module = attention(batch_first=True, add_bias_kv=extended, add_zero_attn=extended)
    for cross in (True, False):
        found = list(masks(BATCH if batched else 1, boolean, SHORT if cross else LONG).items())
        given = {found[i][0].partition(" ")[0]: found[i][1] for i in chosen}
        if not batched and "key_padding_mask" in given:
            given["key_padding_mask"] = given["key_padding_mask"][0]
        agree(module, equivalent(module), *inputs(module, cross, batched), need_weights=need_weights, **given)


@pytest.mark.parametrize("boolean", [True, False])
@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("batch_first", [True, False])
def test_causal(boolean: bool, padded: bool, need_weights: bool, batch_first: bool) -> None:
    module = attention(batch_first=batch_first)
    mask = torch.ones(LONG, LONG).triu(1).bool()
    padding = masks(BATCH, boolean, LONG)["key_padding_mask"] if padded else None
    if not boolean:
        mask = torch.zeros(LONG, LONG).masked_fill(mask, -torch.inf)
    options = {"attn_mask": mask, "key_padding_mask": padding, "need_weights": need_weights, "is_causal": True}
    agree(module, equivalent(module), *inputs(module, cross=False), **options)


def test_causal_needs_the_mask() -> None:
    module = attention().train()
    for attends in (module, equivalent(module)):
        with pytest.raises(RuntimeError, match="attn_mask"):
            attends(*inputs(module, cross=False), is_causal=True)


@pytest.mark.parametrize("need_weights", [True, False])
def test_dropout(need_weights: bool) -> None:
    module = attention(dropout=0.4, batch_first=True)
    arguments = inputs(module, cross=False)
    agree(module, equivalent(module), *arguments, need_weights=need_weights)
    other = equivalent(module.train())
    assert not torch.equal(other(*arguments)[0], other(*arguments)[0])


def gradients_agree(module: nn.Module, other: nn.Module, *arguments: Any) -> None:
    parameters = list(module.parameters())
    expected, got = (torch.autograd.grad(total(m(*arguments)), parameters) for m in (module, other))
    same(got, expected)


def total(output: Any) -> Tensor:
    tensors = output if isinstance(output, tuple) else (output,)
    return sum((tensor.sin().sum() for tensor in tensors), torch.zeros(()))


def test_gradients() -> None:
    module = attention(add_bias_kv=True, add_zero_attn=True)
    gradients_agree(module, equivalent(module), *inputs(module, cross=True))


# --- torchvision's shifted windows


def shifted(version: int, **options: Any) -> nn.Module:
    swin = pytest.importorskip("torchvision.models.swin_transformer")
    cls = swin.ShiftedWindowAttention if version == 1 else swin.ShiftedWindowAttentionV2
    module: nn.Module = cls(WIDTH, num_heads=HEADS, **{"window_size": [4, 3], "shift_size": [2, 1], **options})
    randomise(module.double())
    if version == 2:
        module.get_parameter("logit_scale").detach()[0] = 6.0  # above the limit
    return module


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("shift", [[0, 0], [2, 1], [2, 0], [0, 1]])
@pytest.mark.parametrize("side", [(8, 6), (9, 7), (4, 6), (8, 3), (2, 2), (3, 8)])
def test_shifted_windows(version: int, shift: list[int], side: tuple[int, int]) -> None:
    module = shifted(version, shift_size=shift)
    agree(module, equivalent(module), torch.randn(2, *side, WIDTH))
    assert (module.window_size, module.shift_size) == ([4, 3], shift)


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("options", [{"proj_bias": False}, {"attention_dropout": 0.3, "dropout": 0.2}])
def test_shifted_windows_options(version: int, options: dict[str, Any]) -> None:
    module = shifted(version, **options)
    agree(module, equivalent(module), torch.randn(2, 9, 7, WIDTH))


@pytest.mark.parametrize("version", [1, 2])
def test_shifted_windows_without_bias(version: int) -> None:
    module = shifted(version, qkv_bias=False)
    agree(module, equivalent(module), torch.randn(2, 9, 7, WIDTH))


def test_shifted_windows_gradients() -> None:
    module = shifted(1)
    gradients_agree(module, equivalent(module), torch.randn(2, 9, 7, WIDTH))


# --- slices


def own(module: nn.Module, name: str, tensor: Tensor) -> None:
    path, _, attribute = name.rpartition(".")
    setattr(module.get_submodule(path), attribute, nn.Parameter(tensor))


def sliced(module: nn.Module, along: dict[str, dict[int, list[int]]], **sizes: int) -> Any:
    """A copy that owns only the named elements along each dimension of the named parameters."""
    copied = copy.deepcopy(module)
    for name, dims in along.items():
        tensor = copied.get_parameter(name).detach()
        for dim, elements in dims.items():
            tensor = tensor.index_select(dim, torch.tensor(elements))
        own(copied, name, tensor)
    for attribute, value in sizes.items():
        setattr(copied, attribute, value)
    return copied


def zeroed(module: nn.Module, along: dict[str, dict[int, list[int]]]) -> Any:
    """A copy in which only the named elements along each dimension of the named parameters are not zero."""
    copied = copy.deepcopy(module)
    for name, dims in along.items():
        tensor = copied.get_parameter(name).detach()
        for dim, elements in dims.items():
            gone = [i for i in range(tensor.shape[dim]) if i not in elements]
            tensor.index_fill_(dim, torch.tensor(gone), 0)
    return copied


def units(heads: Iterable[int], channels: Iterable[int], parts: Iterable[int] = (0,)) -> list[int]:
    return [p * WIDTH + h * HEAD_DIM + c for p, h, c in itertools.product(parts, heads, channels)]


HEADS_OF = (KEPT, range(HEAD_DIM), {"num_heads": len(KEPT)})
CHANNELS_OF = (range(HEADS), [0, 3, 4], {"head_dim": 3})


@pytest.mark.parametrize("cut", [HEADS_OF, CHANNELS_OF], ids=["heads", "head_dim"])
@pytest.mark.parametrize("separate", [True, False])
@pytest.mark.parametrize("need_weights", [True, False])
def test_sliced_multihead_attention(cut: tuple[Any, Any, dict[str, int]], separate: bool, need_weights: bool) -> None:
    heads, channels, sizes = cut
    module = attention(add_bias_kv=True, add_zero_attn=True, **({"kdim": 10, "vdim": 11} if separate else {})).eval()
    rows, every = units(heads, channels), units(heads, channels, range(3))
    along = {"in_proj_bias": {0: every}, "out_proj.weight": {1: rows}, "bias_k": {2: rows}, "bias_v": {2: rows}}
    packed = {"in_proj_weight": {0: every}}
    along |= {f"{part}_proj_weight": {0: rows} for part in "qkv"} if separate else packed
    small = sliced(equivalent(module), along, **sizes)
    arguments = inputs(module, cross=separate)
    expected, weights = zeroed(module, along)(*arguments, average_attn_weights=False)
    got, small_weights = small(*arguments, need_weights=need_weights, average_attn_weights=False)
    same(got, expected)
    if need_weights:
        same(small_weights, weights[:, list(heads)])


def test_sliced_widths_of_multihead_attention() -> None:
    module = attention(batch_first=True).eval()
    outputs, entering = list(range(9)), [0, 2, 5]
    along = {
        "in_proj_weight": {1: entering},
        "out_proj.weight": {0: outputs},
        "out_proj.bias": {0: outputs},
    }
    x = torch.randn(BATCH, LONG, WIDTH)
    expected = zeroed(module, along)(x, x, x)[0]
    narrow = x[..., entering]
    same(sliced(equivalent(module), along)(narrow, narrow, narrow)[0], expected[..., outputs])


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("cut", [HEADS_OF, CHANNELS_OF], ids=["heads", "head_dim"])
def test_sliced_shifted_windows(version: int, cut: tuple[Any, Any, dict[str, int]]) -> None:
    heads, channels, sizes = cut
    module = shifted(version).eval()
    every, outputs, entering = units(heads, channels, range(3)), list(range(9)), [0, 2, 5]
    along = {
        "qkv.weight": {0: every, 1: entering},
        "qkv.bias": {0: every},
        "proj.weight": {0: outputs, 1: units(heads, channels)},
        "proj.bias": {0: outputs},
    }
    tables = {"relative_position_bias_table": {1: list(heads)}}
    if version == 2:
        tables = {"logit_scale": {0: list(heads)}, "cpb_mlp.2.weight": {0: list(heads)}}
    x = torch.randn(2, 9, 7, WIDTH)
    small = sliced(equivalent(module), along | tables, **sizes)
    same(small(x[..., entering]), zeroed(module, along)(x)[..., outputs])


# --- whole models


def encoder(**options: Any) -> nn.TransformerEncoder:
    layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 16, dropout=0.0, batch_first=True, **options)
    return randomise(nn.TransformerEncoder(layer, 2))  # type: ignore[return-value]


def vit() -> nn.Module:
    models = pytest.importorskip("torchvision.models.vision_transformer")
    return randomise(models.VisionTransformer(16, 8, 2, HEADS, WIDTH, 16, num_classes=5))


def swin(name: str) -> nn.Module:
    models = pytest.importorskip("torchvision.models")
    model: nn.Module = getattr(models, name)(weights=None)
    return model.double()


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "encoder": (encoder, (BATCH, LONG, WIDTH)),
    "pre-norm encoder": (lambda: encoder(norm_first=True), (BATCH, LONG, WIDTH)),
    "vit": (vit, (1, 3, 16, 16)),
    "swin_t": (lambda: swin("swin_t"), (1, 3, 64, 64)),
    "swin_v2_t": (lambda: swin("swin_v2_t"), (1, 3, 64, 64)),
}
ORIGINALS = ("torch.nn.modules.activation", "torchvision.models.swin_transformer")


def attentions(model: nn.Module, module: str) -> list[nn.Module]:
    return [m for m in model.modules() if type(m).__module__ == module and "Attention" in type(m).__name__]


@pytest.mark.parametrize("name", MODELS)
def test_models(name: str) -> None:
    make, shape = MODELS[name]
    model = make().eval()
    x = torch.randn(shape)
    tensors, before = dict(tensors_of(model)), {k: v.clone() for k, v in model.state_dict().items()}
    kinds = {name: type(module) for name, module in model.named_modules()}
    other = replace(model)
    assert attentions(other, equivalents.__name__)
    assert not any(attentions(other, module) for module in ORIGINALS)
    assert list(other.state_dict()) == list(before)
    assert list(tensors_of(other)) == list(tensors)
    assert all(tensor is tensors[name] for name, tensor in tensors_of(other).items())
    with torch.no_grad():
        same(other(x), model(x))
    # The user's model is as it was, and shares no module with the copy.
    assert {name: type(module) for name, module in model.named_modules()} == kinds
    assert not {id(module) for module in model.modules()} & {id(module) for module in other.modules()}
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("name", MODELS)
def test_models_in_json(name: str) -> None:
    make, shape = MODELS[name]
    model = make()
    other = replace(model).eval()
    description = describe(other)
    # A VisionTransformer holds a partial() that its forward does not read.
    assert description["left_out"] == describe(model)["left_out"] == (["norm_layer"] if name == "vit" else [])
    x = torch.randn(shape)
    with torch.no_grad():
        expected = other(x)
        same(rebuild(json.loads(json.dumps(description)), tensors_of(other))(x), expected)
        same(copy.deepcopy(other)(x), expected)


@pytest.mark.parametrize("batch_first", [True, False])
def test_transformer(batch_first: bool) -> None:
    model = nn.Transformer(WIDTH, HEADS, 1, 2, 16, dropout=0.0, batch_first=batch_first)
    shape = (BATCH, LONG) if batch_first else (LONG, BATCH)
    source, target = torch.randn(*shape, WIDTH), torch.randn(*shape, WIDTH)
    causal = nn.Transformer.generate_square_subsequent_mask(LONG)
    other = replace(randomise(model))
    agree(model, other, source, target)
    agree(model, other, source, target, tgt_mask=causal, tgt_is_causal=True)


def test_padded_encoder() -> None:
    """The fused path of the original fills padded positions with zeros; all others are equal."""
    model = encoder()
    other = replace(model)
    padding = torch.arange(LONG).expand(BATCH, -1) >= torch.tensor([[5], [3], [2]])
    x = torch.randn(BATCH, LONG, WIDTH)
    agree(model.train(), other, x, mask=torch.zeros(LONG, LONG).bool(), src_key_padding_mask=padding)
    with torch.no_grad():
        expected, got = (m.eval()(x, src_key_padding_mask=padding) for m in (model, other))
    same(got[~padding], expected[~padding])


def test_export() -> None:
    x = torch.randn(BATCH, LONG, WIDTH)
    other = replace(encoder()).eval()
    same(torch.export.export(other, (x,)).module()(x), other(x))


@pytest.mark.parametrize("version", [1, 2])
def test_export_shifted_windows(version: int) -> None:
    models = pytest.importorskip("torchvision.models.swin_transformer")
    block = models.SwinTransformerBlock if version == 1 else models.SwinTransformerBlockV2
    sizes: dict[str, Any] = {"patch_size": [4, 4], "embed_dim": 8, "depths": [2, 2], "num_heads": [2, 4]}
    other = replace(models.SwinTransformer(window_size=[3, 3], num_classes=5, block=block, **sizes)).double().eval()
    x = torch.randn(1, 3, 64, 64)
    same(torch.export.export(other, (x,)).module()(x), other(x))


# --- what replace() keeps


class Shares(nn.Module):
    """One attention in two places and in a list that torch does not see; one more with hooks; a tied parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.first = attention()
        self.nested = nn.ModuleDict({"again": nn.Sequential(self.first)})
        self.hidden = [self.first]
        self.second = attention()
        self.second.in_proj_weight = self.first.in_proj_weight
        self.second.out_proj.weight.requires_grad = False
        self.second.eval()


def test_shared_modules_and_flags() -> None:
    model = Shares()
    model.second.register_forward_hook(lambda *_: None)
    other = replace(model)
    assert isinstance(other, Shares)
    assert other.first is other.get_submodule("nested.again.0") is other.hidden[0]
    assert type(other.hidden[0]) is equivalents.MultiheadAttention
    assert type(model.hidden[0]) is nn.MultiheadAttention
    assert other.second.in_proj_weight is other.first.in_proj_weight is model.first.in_proj_weight
    assert [m.training for m in (other, other.first, other.second)] == [True, True, False]
    assert not other.second.out_proj.weight.requires_grad
    assert type(other.second.out_proj) is nn.Linear
    assert (len(other.second._forward_hooks), len(other.first._forward_hooks)) == (1, 0)
    other.second._forward_hooks.clear()
    assert len(model.second._forward_hooks) == 1


def test_root() -> None:
    module = attention(batch_first=True).eval()
    other = replace(module)
    assert type(other) is equivalents.MultiheadAttention
    assert type(module) is nn.MultiheadAttention
    assert not other.training
    agree(module, other, *inputs(module, cross=False))
    assert replace(other) is other


def test_nothing_to_replace() -> None:
    class Own(nn.MultiheadAttention):
        """A subclass may compute something else."""

    for model in (nn.Linear(2, 2), nn.Sequential(nn.ReLU()), Own(4, 2)):
        assert replace(model) is model
        assert equivalent_of(model) is None


def test_equivalents_share_parameters_of_the_original() -> None:
    module = attention(add_bias_kv=True)
    other = equivalent(module)
    assert list(other.state_dict()) == list(module.state_dict())
    assert all(p is dict(module.named_parameters())[name] for name, p in other.named_parameters())
    assert type(module.out_proj) is not nn.Linear  # the original keeps its own child
