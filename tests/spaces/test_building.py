"""Candidates: what they are made of does not depend on how, in which thread or from what memory they are built."""

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from torch import nn

import prunefront
from prunefront.spaces import Plan, Space
from prunefront.spaces.copying import copy_model, is_plain
from prunefront.spaces.surgery import elements, kept_elements, tensors_of
from tests.models import build

#: Convolutions, product and sum layouts, tied embeddings, experts, substitutes and shuffled channels.
MODELS = ["resnet18", "densenet121", "shufflenet_v2_x1_0", "vit", "llama", "gpt2", "mixtral", "t5"]


@pytest.fixture(scope="module", params=MODELS)
def space(request) -> Space:
    for package in ("torchvision", "timm", "transformers"):
        pytest.importorskip(package)
    return prunefront.discover(*build(request.param))


def random_plan(space: Space, seed: int) -> Plan:
    generator = np.random.default_rng(seed)
    widths = {}
    for group in space.groups:
        width = int(generator.integers(group.at_least, group.size + 1))
        least = max(group.at_least, min(group.size, group.multiple_of))
        widths[group.name] = max(least, width // group.multiple_of * group.multiple_of)
    return space.plan(widths)


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    return dict([*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)])


def assert_same(left: nn.Module, right: nn.Module) -> None:
    first, second = state(left), state(right)
    assert list(first) == list(second)
    for name, tensor in first.items():
        other = second[name]
        assert tensor.dtype == other.dtype and tensor.shape == other.shape, name
        assert tensor.requires_grad == other.requires_grad and type(tensor) is type(other), name
        assert torch.equal(tensor, other), name


def test_a_candidate_holds_the_kept_elements_of_every_tensor(space):
    without_blocks = {g.name: g.size for g in space.groups if g.blocks}
    widths = random_plan(space, 0).widths | without_blocks
    plan = space.plan(widths)
    candidate, dense, structure = space.apply(plan), tensors_of(space._prepared), space._structure
    kept, scaled = space._kept(plan), {name for scale in structure.scales for name, _ in scale.parameters}
    found = tensors_of(candidate)
    assert list(found) == list(dense)
    for name, tensor in dense.items():
        expected = tensor.detach()
        for dim, layout in enumerate(structure.tensors[name]):
            chosen = kept_elements(structure, kept, name, dim)
            assert chosen.dtype == np.int64 and np.array_equal(chosen, np.flatnonzero(elements(layout, kept)))
            expected = expected.index_select(dim, torch.from_numpy(chosen))
        assert found[name].shape == expected.shape
        assert name in scaled or torch.equal(found[name], expected), name


def test_a_candidate_owns_memory_of_its_own_size_and_shares_none(space):
    plan = random_plan(space, 1)
    candidate = space.apply(plan)
    tensors = list(tensors_of(candidate).values())
    for tensor in tensors:
        storage = tensor.untyped_storage()
        assert storage.nbytes() == tensor.numel() * tensor.element_size()
        assert tensor.is_contiguous() and tensor._base is None and tensor.is_leaf
    pointers = [t.data_ptr() for t in tensors if t.numel()]
    dense = {t.data_ptr() for t in tensors_of(space._prepared).values()}
    assert len(set(pointers)) == len(pointers) and not dense & set(pointers)
    before = {name: tensor.detach().clone() for name, tensor in tensors_of(space._prepared).items()}
    with torch.no_grad():
        for tensor in tensors:
            tensor.zero_()
    assert all(torch.equal(tensor, before[name]) for name, tensor in tensors_of(space._prepared).items())


def test_threads_build_what_one_thread_builds(space):
    plans = [random_plan(space, seed) for seed in range(6)]
    alone = [space.apply(plan) for plan in plans]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(space.apply, plans * 2))
    for expected, found in zip(alone * 2, together, strict=True):
        assert_same(expected, found)


def test_a_plan_from_json_builds_the_same(space):
    plan = random_plan(space, 2)
    again = Plan.from_json(plan.to_json())
    assert again == plan and space.cost(again) == space.cost(plan)
    assert_same(space.apply(plan), space.apply(again))
    assert pickle.loads(pickle.dumps(plan)) == plan


def test_tied_parameters_stay_tied(space):
    def ties(model: nn.Module) -> list[tuple[str, ...]]:
        places: dict[int, list[str]] = {}
        for name, tensor in state(model).items():
            places.setdefault(id(tensor), []).append(name)
        return sorted(tuple(names) for names in places.values())

    plan = space.plan({g.name: max(g.at_least, g.multiple_of, g.size // 2) for g in space.groups if not g.blocks})
    assert ties(space.apply(plan)) == ties(space._prepared)


class Mixed(nn.Module):
    """Tensors that numpy knows, and some that it does not."""

    def __init__(self, dtype: torch.dtype, channels_last: bool = False) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.second, self.head = nn.Conv2d(16, 8, 3), nn.Linear(8, 4)
        self.to(dtype)
        if channels_last:
            self.to(memory_format=torch.channels_last)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.second(self.norm(self.first(x)).relu()).relu().mean((2, 3)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("channels_last", [False, True])
def test_types_and_memory_formats(dtype, channels_last):
    model = Mixed(dtype, channels_last).eval()
    model.first.weight.requires_grad_(False)
    space = prunefront.discover(model, torch.randn(1, 3, 8, 8, dtype=dtype))
    plan = space.plan({"first": 5, "second": 3})
    candidate, kept = space.apply(plan), dict(plan.kept)
    first, second = torch.tensor(kept["first"]), torch.tensor(kept["second"])
    assert torch.equal(candidate.second.weight, model.second.weight[second][:, first])
    assert torch.equal(candidate.norm.running_var, model.norm.running_var[first])
    assert candidate.first.weight.dtype == dtype and not candidate.first.weight.requires_grad
    assert candidate.second.in_channels == 5 and candidate.norm.num_features == 5 and candidate.head.in_features == 3
    candidate.train()(torch.randn(2, 3, 8, 8, dtype=dtype)).sum().backward()
    assert candidate.second.weight.grad is not None


def test_the_model_of_now_is_sliced():
    model = Mixed(torch.float32).eval()
    space = prunefront.discover(model, torch.randn(1, 3, 8, 8))
    plan = space.plan({"first": 4})
    space.apply(plan)
    with torch.no_grad():
        model.first.weight.data.mul_(2)
    model.head.weight.data = torch.full((4, 8), 3.0)
    model.second = copy.deepcopy(model.second)
    nn.init.zeros_(model.second.weight)
    model.train()
    candidate, kept = space.apply(plan), torch.tensor(dict(plan.kept)["first"])
    assert torch.equal(candidate.first.weight, model.first.weight[kept])
    assert bool((candidate.head.weight == 3).all()) and candidate.second.weight.shape == (8, 4, 3, 3)
    assert not candidate.second.weight.any() and candidate.training


def test_tensors_take_the_place_of_slices():
    model = Mixed(torch.float32).eval()
    space = prunefront.discover(model, torch.randn(1, 3, 8, 8))
    plan = space.plan({"first": 4})
    kept = space._kept(plan)
    given = torch.randn(8, 4, 3, 3, dtype=torch.float64)
    candidate = space._slicer(kept, {"second.weight": given})
    assert torch.equal(candidate.second.weight, given.float()) and candidate.second.weight.requires_grad
    assert candidate.second.weight.data_ptr() != given.data_ptr() and candidate.second.in_channels == 4
    with pytest.raises(ValueError, match=r"second\.weight must have shape \(8, 4, 3, 3\)"):
        space._slicer(kept, {"second.weight": torch.randn(8, 5, 3, 3)})


class Keeper(nn.Module):
    """Attributes of many kinds, some shared between modules."""

    def __init__(self, shared: list[int]) -> None:
        super().__init__()
        self.layer, self.shared, self.sizes = nn.Linear(2, 2), shared, (1, (2, "a"), torch.Size([3]))
        self.unregistered, self.options = [self.layer], {"weight": self.layer.weight, "n": [1]}
        self.method, self.free = self.forward, torch.ones(2)
        self.layer.register_forward_hook(self.hook)
        self.register_buffer("temporary", torch.zeros(2), persistent=False)

    def hook(self, *_: object) -> None:
        self.calls = getattr(self, "calls", 0) + 1

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.activation = self.layer(x)
        return self.activation


class Own(nn.Module):
    """Copies itself."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.copies = nn.Linear(2, 2), 0

    def __deepcopy__(self, memo: dict[int, object]) -> "Own":
        copied = Own()
        copied.inner, copied.copies = copy.deepcopy(self.inner, memo), self.copies + 1
        return copied


def test_a_copy_of_a_model_is_what_deepcopy_makes():
    shared = [1, 2]
    model = nn.Sequential(Keeper(shared), Keeper(shared), Own(), nn.Sequential())
    model[1].layer.weight = model[0].layer.weight
    model.append(model[0].layer)
    expected, found = copy.deepcopy(model), copy_model(model)
    assert [(n, type(m), list(vars(m))) for n, m in found.named_modules()] == [
        (n, type(m), list(vars(m))) for n, m in expected.named_modules()
    ]
    assert_same(expected, found)
    first, second = found[0], found[1]
    assert first.shared is second.shared and first.shared == shared and first.shared is not shared
    assert first.layer.weight is second.layer.weight and found[4] is first.layer
    assert first.unregistered[0] is first.layer and first.options["weight"] is first.layer.weight
    assert first.options["n"] is not model[0].options["n"] and first.free.data_ptr() != model[0].free.data_ptr()
    assert first.method.__self__ is first and found[2].copies == 1
    assert first._non_persistent_buffers_set == {"temporary"}
    assert first._non_persistent_buffers_set is not model[0]._non_persistent_buffers_set
    first(torch.ones(1, 2))
    assert first.calls == 1 and not hasattr(model[0], "calls")
    assert copy_model(first).activation.grad_fn is None
    assert not set(map(id, vars(first.layer).values())) & {
        id(value) for value in vars(model[0].layer).values() if isinstance(value, dict | set | list)
    }


def test_classes_that_copy_themselves_are_left_to_python():
    class Restores(nn.Linear):
        def __setstate__(self, state: dict[str, object]) -> None:
            super().__setstate__(state)

    class Slotted(nn.Linear):
        __slots__ = ("extra",)

    assert is_plain(nn.Linear) and is_plain(nn.Conv2d) and is_plain(nn.MultiheadAttention) and is_plain(Keeper)
    assert not is_plain(Own) and not is_plain(Restores) and not is_plain(Slotted)
