"""Random networks from the operators that have rules: every group holds, every candidate equals its mask.

A recipe is a list of (operator, integer, integer); :class:`ImageNetwork` and :class:`TokenNetwork` make of any recipe a
network that runs, so that Hypothesis can shrink what fails to a few operators.
"""

import copy
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import prunefront
from prunefront.spaces import Plan, Space
from prunefront.spaces.errors import EmptySpaceError
from prunefront.spaces.proof import Comparable, outputs_of
from tests.models import spread

Step = tuple[str, int, int]
WIDTHS = (4, 6, 8, 12, 5)
#: Largest difference in double precision, relative to the largest output.
TOLERANCE = 1e-9


class Residual(nn.Module):
    """The input plus two convolutions of it."""

    def __init__(self, channels: int, width: int, rectified: bool) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(channels, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, channels, 1, bias=False), nn.BatchNorm2d(channels)
        self.rectified = rectified

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x + self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(y) if self.rectified else y


class Gate(nn.Module):
    """Squeeze and excite."""

    def __init__(self, channels: int, width: int, convolution: bool) -> None:
        super().__init__()
        self.convolution = convolution
        make: Any = (lambda i, o: nn.Conv2d(i, o, 1)) if convolution else nn.Linear
        self.down, self.up = make(channels, width), make(width, channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.convolution:
            return x * self.up(F.silu(self.down(F.adaptive_avg_pool2d(x, 1)))).sigmoid()
        return x * self.up(F.relu(self.down(x.mean((2, 3))))).sigmoid()[:, :, None, None]


class Shuffle(nn.Module):
    """Channel shuffle by view and transpose."""

    def __init__(self, groups: int) -> None:
        super().__init__()
        self.groups = groups

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, channels, height, width = x.shape
        x = x.view(batch, self.groups, channels // self.groups, height, width)
        return x.transpose(1, 2).reshape(batch, -1, height, width)


class Take(nn.Module):
    """The first or last ``count`` channels."""

    def __init__(self, count: int, last: bool) -> None:
        super().__init__()
        self.count, self.last = count, last

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x[:, self.count :] if self.last else x[:, : self.count]


class Half(nn.Module):
    """The first or last half of the channels, by ``chunk`` or by a slice, which can cut a concatenation anywhere."""

    def __init__(self, last: bool, by_chunk: bool) -> None:
        super().__init__()
        self.last, self.by_chunk = last, by_chunk

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.by_chunk:
            return x.chunk(2, dim=1)[int(self.last)]
        half = x.shape[1] // 2
        return x[:, half:] if self.last else x[:, :half]


class GatedChunk(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        value, gate = x.chunk(2, dim=1)
        return value * F.silu(gate)


class Partial(nn.Module):
    """Convolve the first ``count`` channels and leave the others."""

    def __init__(self, channels: int, count: int) -> None:
        super().__init__()
        self.count, self.rest = count, channels - count
        self.conv = nn.Conv2d(count, count, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first, second = x.split([self.count, self.rest], dim=1)
        return torch.cat([self.conv(first), second], dim=1)


class Pad(nn.Module):
    """Zero channels before and after."""

    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        self.amounts = (0, 0, 0, 0, before, after)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.pad(x, self.amounts)


class Twice(nn.Module):
    """One convolution, called two times."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(F.relu(self.conv(x)))


class Join(nn.Module):
    """Two tensors: their sum, their product, or one after the other."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how

    def forward(self, x: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        if self.how == "cat":
            return torch.cat([x, other], dim=1)
        return x + other if self.how == "add" else x * torch.tanh(other)


IMAGE_STEPS = (
    *("conv", "stride", "grouped", "depthwise", "multiplier", "transposed", "grouped_transposed"),
    *("batch_norm", "group_norm", "relu", "silu", "prelu", "max_pool", "avg_pool", "upsample"),
    *("residual", "stage", "add", "multiply", "cat", "halves", "chunk", "partial", "pad", "gate", "shuffle"),
    *("pixel_shuffle", "twice", "bare_stage", "take"),
)
#: Written so that some of their groups are refused by their proofs.
REFUSED_STEPS = ("half",)


class ImageNetwork(nn.Module):
    """Convolutions and what stands between them; inputs are ``(2, 3, 8, 8)``, outputs ``(2, 3)``."""

    def __init__(self, recipe: list[Step], flatten: bool) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        #: Channels and height of everything that was made.
        self.shapes = [[8, 8]]
        self.sources: list[int | None] = []
        for name, one, two in recipe:
            self._append(name, one, two)
        channels, height = self.shapes[-1]
        self.flatten = flatten
        self.head = nn.Linear(channels * height**2 if flatten else channels, 3)

    def _append(self, name: str, one: int, two: int) -> None:
        channels, height = self.shapes[-1]
        made = self._join(name, one) if name in ("add", "multiply", "cat") else None
        source = None if made is None else made[1]
        step, channels, height = made[0] if made is not None else _image_step(name, channels, height, one, two)
        self.add_module(f"step{len(self.sources)}", step)
        self.sources.append(source)
        self.shapes.append([channels, height])

    def _join(self, name: str, one: int) -> tuple[tuple[nn.Module, int, int], int] | None:
        channels, height = self.shapes[-1]
        fits = [
            place
            for place, shape in enumerate(self.shapes)
            if shape[1] == height and (shape[0] == channels or (name == "cat" and shape[0] + channels <= 40))
        ]
        if not fits:
            return None
        place = fits[one % len(fits)]
        joined = channels + self.shapes[place][0] if name == "cat" else channels
        return (Join(name), joined, height), place

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        made = [self.stem(x)]
        for place, source in enumerate(self.sources):
            step = getattr(self, f"step{place}")
            made.append(step(made[-1]) if source is None else step(made[-1], made[source]))
        last = made[-1].flatten(1) if self.flatten else made[-1].mean((2, 3))
        output: torch.Tensor = self.head(last)
        return output


def _image_step(name: str, channels: int, height: int, one: int, two: int) -> tuple[nn.Module, int, int]:
    """A module that takes ``channels`` and ``height``, what it makes of them; a convolution where ``name`` cannot."""
    width = WIDTHS[one % len(WIDTHS)]
    divisors = [d for d in (2, 3, 4) if channels % d == 0 and channels > d]
    groups = divisors[two % len(divisors)] if divisors else 1
    if name == "stride" and height > 2:
        return nn.Conv2d(channels, width, 3, 2, 1, bias=False), width, height // 2
    if name == "grouped" and divisors:
        return nn.Conv2d(channels, groups * (1 + one % 4), 3, padding=1, groups=groups), groups * (1 + one % 4), height
    if name == "depthwise":
        return nn.Conv2d(channels, channels, 3, padding=1, groups=channels), channels, height
    if name == "multiplier" and channels <= 12:
        return nn.Conv2d(channels, 2 * channels, 3, padding=1, groups=channels), 2 * channels, height
    if name == "transposed" and height <= 4:
        return nn.ConvTranspose2d(channels, width, 2, 2), width, 2 * height
    if name == "grouped_transposed" and divisors:
        return nn.ConvTranspose2d(channels, groups * (1 + one % 4), 1, groups=groups), groups * (1 + one % 4), height
    if name == "batch_norm":
        return nn.BatchNorm2d(channels), channels, height
    if name == "group_norm":
        return nn.GroupNorm(groups if one % 3 else 1, channels), channels, height
    if name in ("relu", "silu", "prelu"):
        return {"relu": nn.ReLU(), "silu": nn.SiLU(), "prelu": nn.PReLU(channels)}[name], channels, height
    if name in ("max_pool", "avg_pool") and height > 1:
        return (nn.MaxPool2d(2) if name == "max_pool" else nn.AvgPool2d(2)), channels, height // 2
    if name == "upsample" and height <= 4:
        return nn.Upsample(scale_factor=2, mode="bilinear" if one % 2 else "nearest"), channels, 2 * height
    if name == "residual":
        return Residual(channels, width, bool(two % 2)), channels, height
    if name in ("stage", "bare_stage"):
        # Only behind a rectifier is a block that ends in one the identity without its branch.
        rectifies = two % 2 == 1 and name == "stage"
        first = nn.ReLU() if rectifies else nn.Identity()
        blocks = [Residual(channels, width, bool(two % 2)) for _ in range(2 + one % 2)]
        return nn.Sequential(first, *blocks), channels, height
    if name == "take" and channels > 2:
        count = 1 + one % (channels - 1)
        return Take(count, bool(two % 2)), channels - count if two % 2 else count, height
    if name in ("half", "halves") and channels % 2 == 0:
        return Half(bool(two % 2), name == "halves"), channels // 2, height
    if name == "chunk" and channels % 2 == 0:
        return GatedChunk(), channels // 2, height
    if name == "partial" and channels > 2:
        return Partial(channels, 1 + one % (channels - 1)), channels, height
    if name == "pad" and channels <= 20:
        return Pad(one % 4, two % 4), channels + one % 4 + two % 4, height
    if name == "gate":
        return Gate(channels, width, bool(two % 2)), channels, height
    if name == "shuffle" and divisors:
        return Shuffle(groups), channels, height
    if name == "pixel_shuffle" and channels % 4 == 0 and channels > 4 and height <= 4:
        return nn.PixelShuffle(2), channels // 4, 2 * height
    if name == "twice":
        return Twice(channels), channels, height
    return nn.Conv2d(channels, width, 1 + 2 * (two % 2), padding=two % 2), width, height


class RootMeanSquare(nn.Module):
    """Written out, as in Llama."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))


def rotate(x: torch.Tensor, by_halves: bool) -> torch.Tensor:
    """Rotary embedding of ``x (batch, heads, length, head_dim)``, with the second half of a head as partners."""
    half = x.shape[-1] // 2
    angles = torch.arange(x.shape[-2], dtype=x.dtype)[:, None] * 0.5
    if by_halves:
        one, other = x[..., :half], x[..., half:]
        return torch.cat([one * angles.cos() - other * angles.sin(), other * angles.cos() + one * angles.sin()], dim=-1)
    one, other = x.chunk(2, dim=-1)
    return x * angles.cos() + torch.cat((-other, one), dim=-1) * angles.sin()


ATTENTIONS = ("separate", "grouped", "expanded", "fused", "fused_chunk", "fused_split", "manual")
#: A scale computed from the shape changes with it, and the count of ``repeat_interleave`` does not follow its group.
REFUSED_ATTENTIONS = ("rooted", "repeated")


class Attention(nn.Module):
    """Self-attention in one of the ways in which models write it.

    ``rotary``: 0 none, 1 and 2 two ways. ``scaled``: the scale is a float attribute, instead of the kernel's default.
    """

    def __init__(self, kind: str, dim: int, heads: int, head_dim: int, rotary: int, scaled: bool, bias: bool) -> None:
        super().__init__()
        self.kind, self.rotary = kind, rotary
        self.num_heads, self.head_dim = heads, head_dim
        many = kind in ("grouped", "repeated", "expanded", "fused_split")
        self.num_kv_heads = heads // 2 if many and heads % 2 == 0 else heads
        self.repeats = heads // self.num_kv_heads
        self.scale = 0.3 if scaled or kind == "manual" else None
        inner, self.kv_size = heads * head_dim, self.num_kv_heads * head_dim
        self.inner = inner
        if kind.startswith("fused"):
            self.qkv = nn.Linear(dim, inner + 2 * self.kv_size, bias)
        else:
            self.q, self.k, self.v = (nn.Linear(dim, n, bias) for n in (inner, self.kv_size, self.kv_size))
        self.out = nn.Linear(inner, dim, bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, _ = x.shape
        query, key, value = self._project(x)
        if self.rotary:
            query, key = rotate(query, self.rotary == 1), rotate(key, self.rotary == 1)
        if self.kind == "repeated":
            key, value = (t.repeat_interleave(self.repeats, dim=1) for t in (key, value))
        elif self.kind == "expanded" and self.repeats > 1:
            key, value = (_expanded(t, self.repeats) for t in (key, value))
        if self.kind == "rooted":
            y = (query @ key.transpose(-2, -1) * query.shape[-1] ** -0.5).softmax(-1) @ value
        elif self.kind == "manual":
            y = (query @ key.transpose(-2, -1) * self.scale).softmax(-1) @ value
        else:
            unequal = query.shape[1] != key.shape[1]
            causal = self.kind == "grouped"
            y = F.scaled_dot_product_attention(
                query, key, value, is_causal=causal, scale=self.scale, enable_gqa=unequal
            )
        return self.out(y.transpose(1, 2).reshape(batch, length, -1))

    def _project(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Query, key and value as ``(batch, heads, length, head_dim)``."""
        batch, length, _ = x.shape
        if self.kind == "fused":
            split = self.qkv(x).reshape(batch, length, 3, self.num_heads, -1)
            return split.permute(2, 0, 3, 1, 4).unbind(0)
        if self.kind == "fused_chunk":
            parts: Any = self.qkv(x).chunk(3, dim=-1)
        elif self.kind == "fused_split":
            parts = self.qkv(x).split([self.inner, self.kv_size, self.kv_size], dim=-1)
        else:
            parts = self.q(x), self.k(x), self.v(x)
        if self.kind in ("grouped", "manual"):
            return tuple(part.view(batch, length, -1, self.head_dim).transpose(1, 2) for part in parts)
        counts = (self.num_heads, self.num_kv_heads, self.num_kv_heads)
        shapes = [(batch, length, count, self.head_dim) for count in counts]
        return tuple(part.view(*shape).transpose(1, 2) for part, shape in zip(parts, shapes, strict=True))


def _expanded(x: torch.Tensor, repeats: int) -> torch.Tensor:
    batch, heads, length, dim = x.shape
    return x[:, :, None].expand(batch, heads, repeats, length, dim).reshape(batch, heads * repeats, length, dim)


FEED_FORWARDS = ("plain", "gated", "gated_chunk")


class FeedForward(nn.Module):
    def __init__(self, kind: str, dim: int, width: int, bias: bool) -> None:
        super().__init__()
        self.kind = kind
        self.up = nn.Linear(dim, 2 * width if kind == "gated_chunk" else width, bias)
        self.gate = nn.Linear(dim, width, bias) if kind == "gated" else None
        self.down = nn.Linear(width, dim, bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.up(x)
        if self.gate is not None:
            return self.down(F.silu(self.gate(x)) * y)
        if self.kind == "gated_chunk":
            value, gate = y.chunk(2, dim=-1)
            return self.down(value * F.gelu(gate))
        return self.down(F.gelu(y))


NORMS: tuple[Any, ...] = (nn.LayerNorm, nn.RMSNorm, RootMeanSquare)


class Layer(nn.Module):
    """One or both of attention and feed-forward, each in a residual with its norm before or after it."""

    def __init__(self, attention: Attention | None, feed_forward: FeedForward | None, norms: list[Any], pre: bool):
        super().__init__()
        self.attention, self.feed_forward, self.pre = attention, feed_forward, pre
        self.norm1, self.norm2 = norms

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for norm, branch in ((self.norm1, self.attention), (self.norm2, self.feed_forward)):
            if branch is not None:
                x = x + branch(norm(x)) if self.pre else norm(x + branch(x))
        return x


LayerRecipe = dict[str, Any]


class TokenNetwork(nn.Module):
    """Embedding, layers, classifier or language model head; inputs are ``(2, 5)`` tokens or ``(2, 5, 7)`` features."""

    def __init__(self, source: str, dim: int, norm: int, pre: bool, layers: list[LayerRecipe], head: str) -> None:
        super().__init__()
        self.source, self.readout = source, head
        make = NORMS[norm]
        self.embed = nn.Linear(7, dim) if source == "features" else nn.Embedding(11, dim)
        self.position = nn.Parameter(0.3 * torch.randn(1, 5, dim)) if source == "positions" else None
        self.layers = nn.ModuleList(_layer(recipe, dim, make, pre) for recipe in layers)
        self.norm = make(dim) if pre else nn.Identity()
        self.head = nn.Linear(dim, 11 if head == "tokens" else 3)

    def inputs(self) -> torch.Tensor:
        generator = torch.Generator().manual_seed(1)
        if self.source == "features":
            return torch.randn(2, 5, 7, generator=generator, dtype=torch.float64)
        return torch.randint(11, (2, 5), generator=generator)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.embed(x)
        if self.position is not None:
            x = x + self.position
        for layer in self.layers:
            x = layer(x)
        x = self.norm(x)
        x = x.mean(1) if self.readout == "mean" else x[:, 0] if self.readout == "first" else x
        output: torch.Tensor = self.head(x)
        return output


def _layer(recipe: LayerRecipe, dim: int, norm: Any, pre: bool) -> Layer:
    attends, feeds = recipe["parts"] in ("both", "attention"), recipe["parts"] in ("both", "feed_forward")
    arguments = [recipe[name] for name in ("heads", "head_dim", "rotary", "scaled", "bias")]
    attention = Attention(recipe["attention"], dim, *arguments) if attends else None
    feed_forward = FeedForward(recipe["feed_forward"], dim, recipe["width"], recipe["bias"]) if feeds else None
    norms = [norm(dim) if attends else nn.Identity(), norm(dim) if feeds else nn.Identity()]
    return Layer(attention, feed_forward, norms, pre)


def recipes(names: tuple[str, ...], longest: int) -> st.SearchStrategy[list[Step]]:
    step = st.tuples(st.sampled_from(names), st.integers(0, 7), st.integers(0, 7))
    return st.lists(step, min_size=1, max_size=longest)


def token_networks(attentions: tuple[str, ...]) -> st.SearchStrategy[dict[str, Any]]:
    layers = st.fixed_dictionaries(
        {
            "parts": st.sampled_from(("both", "feed_forward", "attention")),
            "attention": st.sampled_from(attentions),
            "heads": st.sampled_from((2, 4, 3)),
            "head_dim": st.sampled_from((4, 6, 8)),
            "rotary": st.integers(0, 2),
            "scaled": st.booleans(),
            "feed_forward": st.sampled_from(FEED_FORWARDS),
            "width": st.sampled_from((6, 10, 16)),
            "bias": st.booleans(),
        }
    )
    return st.fixed_dictionaries(
        {
            "source": st.sampled_from(("tokens", "positions", "features")),
            "dim": st.sampled_from((8, 12, 10)),
            "norm": st.integers(0, 2),
            "pre": st.booleans(),
            "layers": st.lists(layers, min_size=1, max_size=3),
            "head": st.sampled_from(("mean", "first", "tokens")),
        }
    )


def random_plan(space: Space, generator: np.random.Generator, inexact: bool) -> Plan:
    """Random widths of the exact groups, or of all but inexact blocks, which no mask can stand for."""
    widths = {}
    for group in space.groups:
        if group.exact or (inexact and group.kind != "block"):
            choices = [w for w in range(group.at_least, group.size) if w % group.multiple_of == 0]
            widths[group.name] = int(generator.choice([*choices, group.size]))
    return space.plan(widths)


def difference(space: Space, plan: Plan, inputs: torch.Tensor, normalising: bool) -> float:
    """Largest difference between the candidate and the masked model, relative to the largest output."""
    with Comparable(normalising):
        (actual,) = outputs_of(space.apply(plan).double(), inputs)
        (expected,) = outputs_of(space.mask(plan).double(), inputs)
    assert actual.shape == expected.shape and bool(torch.isfinite(actual).all())
    return ((actual - expected).abs().max() / expected.abs().max().clamp(min=1e-30)).item()


def prove(model: nn.Module, inputs: torch.Tensor, refusals: bool = False) -> Space | None:
    """Check everything that a space promises; None if the model has nothing to prune.

    ``refusals``: groups may fail their proofs, so long as the others hold.
    """
    # In double precision, since a candidate that keeps its attention scale has rescaled weights, which are rounded.
    model = model.double().eval()
    with torch.no_grad():
        spread(model)
    before = copy.deepcopy(model.state_dict())
    try:
        space = prunefront.discover(model, inputs)
    except EmptySpaceError as error:
        assert refusals or "failed its proof" not in str(error), error
        return None
    failed = [f"{frozen.name}: {frozen.reason}" for frozen in space.frozen if "failed its proof" in frozen.reason]
    assert refusals or not failed, failed
    generator = np.random.default_rng(0)
    for inexact in (False, True):
        for _ in range(2):
            plan = random_plan(space, generator, inexact)
            assert difference(space, plan, inputs, normalising=inexact) < TOLERANCE
            check_costs(space, plan, inputs)
    kinds = {group.kind for group in space.groups}
    # A norm before an attention that was taken out has no use any more.
    check_training(space, space.uniform(0.5, kinds - {"block"}), inputs, every_parameter=True)
    check_training(space, space.uniform(0.5, kinds), inputs, every_parameter=False)
    after = model.state_dict()
    assert list(after) == list(before) and all(torch.equal(after[key], before[key]) for key in before)
    return space


def check_costs(space: Space, plan: Plan, inputs: torch.Tensor) -> None:
    candidate, cost = space.apply(plan), space.cost(plan)
    assert cost.params == sum(parameter.numel() for parameter in candidate.parameters())
    with FlopCounterMode(display=False) as counter:
        outputs_of(candidate, inputs)
    assert cost.flops == counter.get_total_flops()


def check_training(space: Space, plan: Plan, inputs: torch.Tensor, every_parameter: bool) -> None:
    candidate = space.apply(plan).train()
    optimizer = torch.optim.SGD(candidate.parameters(), 1e-3)
    candidate(inputs).square().mean().backward()
    assert not every_parameter or all(parameter.grad is not None for parameter in candidate.parameters())
    optimizer.step()


IMAGES = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
CHECKED = settings(derandomize=True, deadline=None, max_examples=50, suppress_health_check=list(HealthCheck))


@CHECKED
@given(recipes(IMAGE_STEPS, 7), st.booleans())
def test_image_networks(recipe, flatten):
    torch.manual_seed(0)
    prove(ImageNetwork(recipe, flatten), IMAGES)


@CHECKED
@given(recipes(IMAGE_STEPS + REFUSED_STEPS, 5), st.booleans())
def test_image_networks_with_refused_groups(recipe, flatten):
    torch.manual_seed(0)
    prove(ImageNetwork(recipe, flatten), IMAGES, refusals=True)


@CHECKED
@given(token_networks(ATTENTIONS + REFUSED_ATTENTIONS))
def test_token_networks_with_refused_groups(recipe):
    torch.manual_seed(0)
    model = TokenNetwork(**recipe)
    prove(model, model.inputs(), refusals=True)


@CHECKED
@given(token_networks(ATTENTIONS))
def test_token_networks(recipe):
    torch.manual_seed(0)
    model = TokenNetwork(**recipe)
    prove(model, model.inputs())
