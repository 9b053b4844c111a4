"""BatchNorm with positions side by side, against torch's own."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from prunefront.spaces import norms
from prunefront.spaces.norms import QuickNorms, batch_norm

SHAPES = [(8, 10, 16, 16), (4, 16, 7, 7), (3, 21, 5, 5), (2, 63, 8, 8), (1, 5, 4, 4), (2, 5, 1, 1)]


def arguments(shape: tuple[int, ...], dtype: torch.dtype, affine: bool = True) -> dict[str, torch.Tensor | None]:
    torch.manual_seed(0)
    x = (3 * torch.randn(shape) + torch.arange(shape[1]).view(-1, 1, 1)).to(dtype)
    vectors = {name: torch.rand(shape[1]) + 0.5 for name in ("running_mean", "running_var", "weight", "bias")}
    if not affine:
        vectors |= {"weight": None, "bias": None}
    return {"input": x.contiguous(memory_format=torch.channels_last), **vectors}


def copied(norm: dict[str, torch.Tensor | None]) -> dict[str, torch.Tensor | None]:
    return {name: None if tensor is None else tensor.clone() for name, tensor in norm.items()}


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_evaluation_gives_the_same_numbers(shape: tuple[int, ...], affine: bool) -> None:
    norm = arguments(shape, torch.bfloat16, affine)
    with torch.no_grad():
        expected = F.batch_norm(**norm, training=False, momentum=0.1, eps=1e-3)
        found = batch_norm(**norm, training=False, momentum=0.1, eps=1e-3)
    assert torch.equal(found, expected)
    assert found.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_training_gives_the_same_statistics(shape: tuple[int, ...], dtype: torch.dtype, tolerance: float) -> None:
    norm = arguments(shape, dtype)
    theirs = copied(norm)
    with torch.no_grad():
        expected = F.batch_norm(**theirs, training=True, momentum=0.25, eps=1e-5)
        found = batch_norm(**norm, training=True, momentum=0.25, eps=1e-5)
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
    for name in ("running_mean", "running_var"):
        torch.testing.assert_close(norm[name], theirs[name], rtol=1e-5, atol=1e-5)


def test_what_is_rearranged() -> None:
    """Else the tests above would compare torch with itself."""
    with torch.no_grad():
        counts = [norms._positions_side_by_side(arguments(shape, torch.bfloat16)["input"], False) for shape in SHAPES]
    assert counts == [64, 4, 1, 16, 8, 1]
    x = arguments(SHAPES[0], torch.bfloat16)["input"]
    assert norms._positions_side_by_side(x, False) == 1, "gradients are asked for"
    with torch.no_grad():
        assert norms._positions_side_by_side(x.contiguous(), False) == 1
        assert norms._positions_side_by_side(x.float(), False) == 1
        assert norms._positions_side_by_side(x.float(), True) == 64


def test_layers_run_quickly_in_the_mode() -> None:
    layer = torch.nn.BatchNorm2d(10).eval()
    x = arguments(SHAPES[0], torch.bfloat16)["input"]
    with torch.no_grad():
        expected = layer(x)
        with QuickNorms():
            assert torch.equal(layer(x), expected)
            layer.train()
            layer(x)
    assert layer.num_batches_tracked == 1
    assert not torch.equal(layer.running_mean, torch.zeros(10))


def test_layers_without_statistics_are_torch_s() -> None:
    layer = torch.nn.BatchNorm2d(10, track_running_stats=False)
    x = arguments(SHAPES[0], torch.float32)["input"]
    with torch.no_grad(), QuickNorms():
        torch.testing.assert_close(layer(x).mean((0, 2, 3)), torch.zeros(10), atol=1e-5, rtol=0)


def test_an_overflow_stays_what_it_is() -> None:
    """As in a training that has gone astray: infinite variances give zeros, and not NaN."""
    norm = arguments(SHAPES[0], torch.float32)
    norm["input"] = norm["input"] * 1e30
    theirs = copied(norm)
    with torch.no_grad():
        for _ in range(2):
            expected = F.batch_norm(**theirs, training=True, momentum=0.5, eps=1e-5)
            found = batch_norm(**norm, training=True, momentum=0.5, eps=1e-5)
    assert torch.isfinite(expected).all() == torch.isfinite(found).all()
    assert torch.equal(norm["running_var"], theirs["running_var"])
