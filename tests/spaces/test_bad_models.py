"""Models that are written, wrapped or stored unusually: pruned exactly, or refused with what to do.

And what users do with candidates: train, save, load, compile and export them.
"""

import copy
import io
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, prune

import prunefront
from prunefront.spaces import Plan, Space
from prunefront.spaces.errors import EmptySpaceError, ModelError
from prunefront.spaces.inputs import Inputs, output_tensors
from prunefront.spaces.proof import outputs_of
from tests.models import build, spread

X = torch.randn(2, 4, generator=torch.Generator().manual_seed(0))
TOKENS = torch.arange(10).reshape(2, 5)


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3))


def random_plan(space: Space, seed: int) -> Plan:
    generator = torch.Generator().manual_seed(seed)
    exact = [group for group in space.groups if group.exact]
    return space.plan({g.name: int(torch.randint(g.at_least, g.size + 1, (), generator=generator)) for g in exact})


def assert_exact(space: Space, inputs: Any, plans: int = 4) -> None:
    doubled = Inputs.of(inputs).map(lambda leaf: leaf.double() if leaf.is_floating_point() else leaf)
    for seed in range(plans):
        plan = random_plan(space, seed)
        actual = outputs_of(space.apply(plan).double(), doubled)
        expected = outputs_of(space.mask(plan).double(), doubled)
        for one, other in zip(actual, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


class Branching(nn.Module):
    """The data decide which of two branches runs."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.positive, self.negative = nn.Linear(4, 8), nn.Linear(8, 6), nn.Linear(8, 6)
        self.head = nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = F.relu(self.stem(x))
        return self.head(F.relu(self.positive(y) if x.sum() > 0 else self.negative(y)))


class Repeating(nn.Module):
    """One block as often as the data say, between two others that share a module under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.block, self.last = nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        self.again = self.block

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.first(x)
        for _ in range(2 + int(x.sum() > 0)):
            y = torch.tanh(self.block(y)) + self.again(y)
        return self.last(y)


class TiedHead(nn.Module):
    """The classifier's weight is the embedding's."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.up, self.down = nn.Embedding(11, 8), nn.Linear(8, 6), nn.Linear(6, 8)
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        y = self.embedding(tokens)
        return self.head(y + self.down(F.relu(self.up(y))))


class TiedTranspose(nn.Module):
    """An autoencoder that decodes by the encoder's weights."""

    def __init__(self) -> None:
        super().__init__()
        self.outer, self.inner, self.head = nn.Linear(4, 8), nn.Linear(8, 5), nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = F.relu(self.outer(x))
        y = F.relu(F.linear(F.relu(self.inner(y)), self.inner.weight.t()))
        return self.head(F.linear(y, self.outer.weight.t()))


class ParameterContainers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.ParameterList([torch.randn(4, 8), torch.randn(8, 3)])
        self.others = nn.ParameterDict({"bias": torch.randn(8)})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(x @ self.weights[0] + self.others["bias"]) @ self.weights[1]


class InPlace(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.other, self.head = nn.Linear(4, 8), nn.Linear(4, 8), nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y, z = self.one(x), self.other(x)
        z.add_(y).relu_().mul_(y.sigmoid())
        y.copy_(z)
        return self.head(y)


class Structured(nn.Module):
    """Returns tensors, numbers and None, nested."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 8), nn.Linear(8, 3)

    def forward(self, x: torch.Tensor, scale: float = 1.0, *, shift: torch.Tensor | None = None) -> dict[str, Any]:
        y = F.relu(self.first(x)) * scale
        last = self.last(y) if shift is None else self.last(y) + shift[:, None]
        return {"y": last, "none": None, "count": 3, "more": [self.last(y), ("sum", y.sum())]}


def hooked() -> nn.Module:
    model = mlp()
    model[0].register_forward_hook(lambda module, args, output: 2 * output)
    return model


def partly_fixed() -> nn.Module:
    model = mlp()
    model[0].weight.requires_grad = False
    return model


WORKING: dict[str, tuple[Callable[[], nn.Module], Any, set[str]]] = {
    "branching": (Branching, X.abs(), {"stem", "positive"}),
    "repeating": (Repeating, X.abs(), {"first"}),
    "tied head": (TiedHead, TOKENS, {"hidden", "up"}),
    "tied transpose": (TiedTranspose, X, {"outer", "inner"}),
    "parameter containers": (ParameterContainers, X, {"weights"}),
    "in place": (InPlace, X, {"one"}),
    "structured": (Structured, {"x": X, "scale": torch.tensor(0.5), "shift": torch.ones(2)}, {"first"}),
    "hook": (hooked, X, {"0", "2"}),
    "without gradients": (partly_fixed, X, {"0", "2"}),
}


@pytest.mark.parametrize("name", WORKING)
def test_unusual_models_are_pruned_exactly(name):
    torch.manual_seed(0)
    make, inputs, groups = WORKING[name]
    model = make()
    before = copy.deepcopy(model.state_dict())
    space = prunefront.discover(model, inputs)
    assert {group.name for group in space.groups} == groups
    assert_exact(space, inputs)
    after = model.state_dict()
    assert all(torch.equal(after[key], before[key]) for key in before)


def test_the_branch_that_is_not_seen_stays_whole():
    space = prunefront.discover(Branching(), X.abs())
    reasons = {frozen.name: frozen.reason for frozen in space.frozen}
    assert reasons["negative"] == "not used on the example inputs"
    other = prunefront.discover(Branching(), -X.abs())
    assert {group.name for group in other.groups} == {"stem", "negative"}


def test_tied_weights_stay_tied():
    candidate = (space := prunefront.discover(TiedHead(), TOKENS)).apply(space.uniform(0.5))
    assert candidate.head.weight is candidate.embedding.weight
    assert (candidate.head.in_features, candidate.head.out_features, candidate.embedding.embedding_dim) == (4, 11, 4)
    shared = (space := prunefront.discover(Repeating(), X)).apply(space.uniform(0.5))
    assert shared.again is shared.block and shared.block.weight.shape == (4, 4)


def test_what_needs_no_gradient_keeps_none():
    candidate = (space := prunefront.discover(partly_fixed(), X)).apply(space.uniform(0.5))
    assert [parameter.requires_grad for parameter in candidate.parameters()] == [False, *[True] * 5]


def _with_first(change: Callable[[nn.Module], Any]) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        model = mlp()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            change(model[0])
        return model

    return make


def quantised() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return torch.ao.quantization.quantize_dynamic(mlp(), {nn.Linear})
        except (AttributeError, RuntimeError) as error:  # gone, or without an engine for this processor
            pytest.skip(f"no dynamic quantisation: {error}")


def prepared() -> nn.Module:
    quantization = pytest.importorskip("torch.ao.quantization")
    model = mlp().eval()
    model.qconfig = quantization.default_qconfig
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return quantization.prepare(model)


def stubbed() -> nn.Sequential:
    """Marked for quantisation, with nothing done about it."""
    quantization = pytest.importorskip("torch.ao.quantization")
    return nn.Sequential(quantization.QuantStub(), mlp(), quantization.DeQuantStub()).eval()


def prepared_stubs() -> nn.Module:
    model = stubbed()
    model.qconfig = torch.ao.quantization.default_qconfig
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.ao.quantization.prepare(model)


def adapted() -> nn.Module:
    layer = type("Linear", (nn.Linear,), {"__module__": "peft.tuners.lora"})
    return nn.Sequential(layer(4, 8), nn.ReLU(), nn.Linear(8, 3))


def scripted() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.jit.script(mlp())


def jit_traced() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.jit.trace(mlp(), X)


UNWRAP = r"pass model\.module"
UNTIE = "remove_parametrizations"
UNHOOK = r"remove_weight_norm\(module\) or remove_spectral_norm"
REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "weight_norm": (_with_first(parametrizations.weight_norm), UNTIE),
    "spectral_norm": (_with_first(parametrizations.spectral_norm), UNTIE),
    "orthogonal": (_with_first(parametrizations.orthogonal), UNTIE),
    "old weight_norm": (_with_first(torch.nn.utils.weight_norm), UNHOOK),
    "old spectral_norm": (_with_first(torch.nn.utils.spectral_norm), UNHOOK),
    "torch.nn.utils.prune": (_with_first(lambda layer: prune.l1_unstructured(layer, "weight", 0.5)), r"prune\.remove"),
    "prepared for quantisation": (prepared, "prune the model before it is prepared"),
    "prepared stubs": (prepared_stubs, r"0 \(QuantStub\) observes for quantisation: prune the model before"),
    "quantised": (quantised, "prune the model first, and quantise the pruned one"),
    "DataParallel": (lambda: nn.DataParallel(mlp()), UNWRAP),
    "DataParallel inside": (lambda: nn.Sequential(nn.DataParallel(mlp()), nn.Linear(3, 3)), UNWRAP),
    "torch.compile": (lambda: torch.compile(mlp(), backend="eager"), "compile the pruned one afterwards"),
    "adapter": (adapted, "merge_and_unload"),
    "torch.jit.script": (scripted, "pass the Python model"),
    "script inside": (lambda: nn.Sequential(scripted(), nn.Linear(3, 3)), "pass the Python model"),
    "torch.jit.trace": (jit_traced, "pass the Python model"),
    "torch.fx": (lambda: torch.fx.symbolic_trace(mlp()), "pass the model that the graph was made from"),
    "torch.export": (lambda: torch.export.export(mlp(), (X,)).module(), "pass the model that the graph was made"),
    "lazy": (lambda: nn.Sequential(nn.LazyLinear(8), nn.ReLU(), nn.Linear(8, 3)), "run the model once"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_wrapped_models_are_refused_with_what_to_do(name):
    make, message = REFUSED[name]
    with pytest.raises(ModelError, match=message):
        prunefront.discover(make(), X)


class Marked(nn.Module):
    """A sum that may be quantised."""

    def __init__(self):
        super().__init__()
        self.body, self.sum = stubbed(), torch.ao.nn.quantized.FloatFunctional()

    def forward(self, x):
        return self.sum.add_relu(self.body(x), self.body(x + 1))


@pytest.mark.parametrize("make", [stubbed, lambda: torch.ao.quantization.QuantWrapper(stubbed()), Marked])
def test_marks_for_quantisation_that_do_nothing_yet_are_no_obstacle(make):
    pytest.importorskip("torch.ao.quantization")
    model = make().eval()
    space = prunefront.discover(model, X)
    plan = space.plan({group.name: 3 for group in space.groups})
    torch.testing.assert_close(space.slice(plan)(X), space.mask(plan)(X))
    assert len(space.groups) == 2


def test_what_the_messages_advise_works():
    normed = mlp()
    parametrizations.weight_norm(normed[0])
    torch.nn.utils.parametrize.remove_parametrizations(normed[0], "weight")
    lazy = nn.Sequential(nn.LazyLinear(8), nn.ReLU(), nn.Linear(8, 3))
    lazy(X)
    compiled_in_place = mlp()
    compiled_in_place.compile(backend="eager")
    for model in (normed, lazy, compiled_in_place, nn.DataParallel(mlp()).module):
        assert_exact(prunefront.discover(model, X), X)


class Summed(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.logcumsumexp(1)


def test_nothing_to_prune_is_said_with_the_reason():
    with pytest.raises(EmptySpaceError, match="no rule for this operator"):
        prunefront.discover(nn.Sequential(nn.Linear(4, 8), Summed(), nn.Linear(8, 3)), X)


class Remembering(nn.Module):
    """Keeps its last activation and counts its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 8), nn.Linear(8, 3)
        self.register_buffer("count", torch.zeros(()))
        self.calls, self.seen = 5, None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.count += 1
        self.calls += 1
        self.seen = F.relu(self.first(x))
        return self.last(self.seen)


def test_a_model_that_keeps_its_activations_can_be_used_before_and_after():
    model = Remembering()
    model(X)
    space = prunefront.discover(model, X)
    assert type(model.calls) is int
    model(X)
    assert_exact(space, X)


def test_a_model_that_counts_its_calls_is_not_changed():
    model = Remembering()
    prunefront.discover(model, X)
    assert model.count == 0


def test_a_slice_by_an_attribute_follows_its_group():
    class Cut(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last, self.count = nn.Linear(4, 8), nn.Linear(3, 3), 3

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.last(F.relu(self.first(x))[:, : self.count])

    space = prunefront.discover(Cut(), X)
    assert not [frozen for frozen in space.frozen if "proof" in frozen.reason]
    assert sorted(group.size for group in space.groups) == [3, 5]
    assert_exact(space, X)


def test_half_of_a_concatenation_is_not_cut_at_another_place():
    class HalfOfTwo(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.other = nn.Linear(4, 2), nn.Linear(4, 2)
            self.middle, self.head = nn.Linear(2, 4), nn.Linear(4, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = torch.cat([self.one(x), self.other(x)], dim=1)
            return self.head(self.middle(y[:, : y.shape[1] // 2]))

    space = prunefront.discover(HalfOfTwo(), X)
    assert_exact(space, X, plans=12)


class Rectified(nn.Module):
    """``relu(x + branch(x))``: the identity without its branch only where ``x`` is rectified already."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 5), nn.Linear(5, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(x + self.down(F.relu(self.up(x))))


class RectifiedStack(nn.Module):
    def __init__(self, rectified: bool) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 6), nn.Linear(6, 3)
        self.blocks = nn.Sequential(*(Rectified() for _ in range(3)))
        self.rectified = rectified

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.first(x)
        return self.last(self.blocks(F.relu(y) if self.rectified else y))


@pytest.mark.parametrize(("rectified", "blocks"), [(True, (0, 1, 2)), (False, (1, 2))])
def test_rectified_blocks_are_taken_out_only_behind_a_rectifier(rectified, blocks):
    torch.manual_seed(0)
    space = prunefront.discover(RectifiedStack(rectified), X)
    stacks = {group.name: (group.blocks, group.exact) for group in space.groups if group.kind == "block"}
    assert stacks == {"blocks": (tuple(f"blocks.{block}" for block in blocks), True)}
    assert_exact(space, X, plans=8)


def test_blocks_are_found_in_nested_containers():
    blocks = nn.Sequential(*(Rectified() for _ in range(3)))
    space = prunefront.discover(nn.Sequential(nn.Linear(4, 6), nn.ReLU(), blocks, nn.Linear(6, 3)), X)
    assert [group.size for group in space.groups if group.kind == "block"] == [3]


def small_cnn() -> tuple[nn.Module, Any]:
    torchvision = pytest.importorskip("torchvision")
    return torchvision.models.resnet18(weights=None), (torch.randn(2, 3, 32, 32),)


def small_vit() -> tuple[nn.Module, Any]:
    torchvision = pytest.importorskip("torchvision")
    sizes = {"image_size": 32, "patch_size": 8, "num_layers": 2, "num_heads": 4, "hidden_dim": 32, "mlp_dim": 48}
    return torchvision.models.VisionTransformer(**sizes), (torch.randn(2, 3, 32, 32),)


def small_llama() -> tuple[nn.Module, Any]:
    pytest.importorskip("transformers")
    model, inputs = build("llama")
    return model, {**inputs, "use_cache": False}


USED = {"resnet18": small_cnn, "vit": small_vit, "llama": small_llama}


@pytest.fixture(scope="module", params=USED)
def used(request) -> tuple[str, Space, Plan, Inputs]:
    """A space with a plan that removes of every kind."""
    torch.manual_seed(0)
    model, inputs = USED[request.param]()
    with torch.no_grad():
        spread(model)
    space = prunefront.discover(model.eval(), inputs)
    return request.param, space, space.uniform(0.4), Inputs.of(inputs)


def close(actual: Any, expected: Any, tolerance: float = 1e-4) -> None:
    """Within ``tolerance`` of the largest output."""
    pairs = list(zip(output_tensors(actual), output_tensors(expected), strict=True))
    assert pairs
    for one, other in pairs:
        torch.testing.assert_close(one, other, rtol=0, atol=tolerance * other.abs().max().item())


def test_candidates_train(used):
    _, space, plan, inputs = used
    before = copy.deepcopy(space.model.state_dict())
    # Without blocks: a norm before a part that was taken out has no use any more.
    widths = space.uniform(0.4, {group.kind for group in space.groups} - {"block"})
    for trained, whole in ((widths, True), (plan, False)):
        candidate = space.apply(trained).train()
        optimizer = torch.optim.SGD(candidate.parameters(), 0.01)
        start = copy.deepcopy(candidate.state_dict())
        output_tensors(inputs.call(candidate))[0].square().mean().backward()
        optimizer.step()
        same = [name for name, p in candidate.named_parameters() if torch.equal(p, start[name])]
        assert not whole or not same
        assert len(same) < len(list(candidate.parameters())) / 2
    assert all(torch.equal(value, before[name]) for name, value in space.model.state_dict().items())


def test_candidates_are_saved_and_loaded(used):
    _, space, plan, inputs = used
    first, second = space.apply(plan).eval(), space.apply(plan).eval()
    with torch.no_grad():
        for parameter in first.parameters():
            parameter.mul_(1.1)
        held = io.BytesIO()
        torch.save(first.state_dict(), held)
        held.seek(0)
        second.load_state_dict(torch.load(held, weights_only=True))
        close(inputs.call(second), inputs.call(first), 0.0)
        held = io.BytesIO()
        torch.save(first, held)
        held.seek(0)
        close(inputs.call(torch.load(held, weights_only=False)), inputs.call(first), 0.0)


def test_other_attention_kernels_run(used):
    name, space, plan, inputs = used
    if name != "llama":
        pytest.skip("a choice that Hugging Face offers")
    candidate = space.apply(plan).eval()
    with torch.no_grad():
        expected = inputs.call(candidate)
        candidate.set_attn_implementation("eager")
        close(inputs.call(candidate), expected)


def test_candidates_compile(used):
    _, space, plan, inputs = used
    candidate = space.apply(plan).eval()
    with torch.no_grad():
        close(inputs.call(torch.compile(candidate, backend="eager")), inputs.call(candidate))


def test_candidates_export(used):
    _, space, plan, inputs = used
    candidate = space.apply(plan).eval()
    with torch.no_grad():
        exported = torch.export.export(candidate, inputs.args, dict(inputs.kwargs or {}))
        close(inputs.call(exported.module()), inputs.call(candidate))


def test_candidates_run_in_onnxruntime(used, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    _, space, plan, inputs = used
    candidate = space.apply(plan).eval()
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        path = tmp_path / "candidate.onnx"
        torch.onnx.export(candidate, inputs.args, path, kwargs=dict(inputs.kwargs or {}), dynamo=True, verbose=False)
        expected = output_tensors(inputs.call(candidate))
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_inputs()]
    feeds = {name: tensor.numpy() for name, tensor in zip(names, inputs.tensors(), strict=True)}
    actual = [torch.from_numpy(array) for array in session.run(None, feeds)]
    close(actual, expected)
