"""Scores that are means over samples: they can be taken on a part of the data, and compared sample by sample.

A search is guided by such a score where there is one; the models that it keeps are scored as the user says.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves, tree_map

from ..spaces.calibration import inputs_of
from ..spaces.devices import device_of, moved
from ..spaces.errors import ConfigError
from ..spaces.inputs import output_tensors
from ..spaces.norms import QuickNorms
from ..spaces.trace import evaluating

#: What a dense model's outputs may take while they are kept for comparison.
MAX_BYTES = 256 * 2**20
#: Samples of one part at most, and the share of all in the first one.
PART, FIRST_SHARE = 500, 0.1
MEASURES = ("auto", "kl", "mse")


class SampleScore:
    """The mean of ``value(output, batch)``, a tensor ``(samples,)`` for every batch; higher is better.

    A batch is a tensor, a mapping of keyword arguments, or a tuple or list whose first ``arguments`` items are the
    model's arguments. Called with a model, it is a score like any other function. ``of_mean``: an increasing function
    that makes the score of the mean, such as a perplexity of a log-likelihood.
    """

    def __init__(
        self,
        batches: Iterable[Any],
        value: Callable[[Any, Any], torch.Tensor],
        arguments: int = 1,
        of_mean: Callable[[float], float] = float,
    ) -> None:
        self.batches, self._value, self.arguments, self.of_mean = list(batches), value, arguments, of_mean
        if not self.batches:
            raise ConfigError("a score needs data, and there are no batches")

    def __call__(self, model: nn.Module) -> float:
        values = np.concatenate([self.values(model, part) for part in range(len(self.batches))])
        return self.of_mean(float(values.mean()))

    def values(self, model: nn.Module, part: int) -> NDArray[np.float64]:
        """Of the samples of one batch, ``(samples,)``."""
        batch = moved(self.batches[part], device_of(model))
        inputs = inputs_of(batch, self.arguments).accepted_by(model)
        with evaluating(model), torch.inference_mode(), QuickNorms(), same_draws(model, part):
            values = self.of_output(inputs.call(model), batch, part)
        found = np.asarray(values.double().cpu().numpy())
        if found.ndim != 1 or len(found) != _samples(batch):
            raise ValueError(
                f"a score by sample must give one number a sample, ({_samples(batch)},), not the shape "
                f"{tuple(found.shape)}; for a mean over all samples pass a plain function of the model"
            )
        return found

    def of_output(self, output: Any, batch: Any, part: int) -> torch.Tensor:
        """``batch``: that of ``part``, where the model lies."""
        return self._value(output, batch)

    def in_parts(self, samples: int | None = None, seed: int = 0) -> SampleScore:
        """The same on ``samples`` drawn at random, in parts of which the first is a tenth."""
        return SampleScore(parts_of(self.batches, samples, seed), self._value, self.arguments, self.of_mean)


def accuracy(images: torch.Tensor, labels: torch.Tensor, batch_size: int = 500) -> SampleScore:
    """Share of right answers: ``images (n, ...)``, ``labels (n,)``; the model's output is ``(n, classes)``."""
    batches = zip(images.split(batch_size), labels.split(batch_size), strict=True)
    return SampleScore(batches, lambda output, batch: output_tensors(output)[0].argmax(dim=1) == batch[1])


class Fidelity(SampleScore):
    """How near a candidate's outputs are to those of ``dense``, without labels: zero is best.

    ``measure="kl"``: minus the Kullback-Leibler divergence of the class probabilities along the last dimension, or the
    second of four (dense predictions), in nats (Hinton et al. 2015 train on it); the mean over positions. ``"mse"``:
    minus the squared error relative to the spread of the dense outputs. ``"auto"``: kl for outputs ``(n, classes)`` and
    those named ``logits``, else mse; a single logit is no class among others. Of several outputs it is the sum over all
    that have floating-point numbers for every sample. Set ``autocast`` around both this and the candidate.

    Raises:
        ConfigError: no data, outputs that cannot be compared, an unknown measure, or kl of a single class.
    """

    def __init__(self, dense: nn.Module, batches: Iterable[Any], arguments: int = 1, measure: str = "auto") -> None:
        if measure not in MEASURES:
            raise ConfigError(f"unknown measure of fidelity {measure!r}; expected one of {', '.join(MEASURES)}")
        super().__init__(batches, lambda output, _: output, arguments)
        parts: list[list[torch.Tensor]] = []
        with evaluating(dense), torch.inference_mode(), QuickNorms():
            for part, batch in enumerate(self.batches):
                with same_draws(dense, part):
                    output = _called(dense, moved(batch, device_of(dense)), arguments)
                tensors = _compared(output)
                if not tensors:
                    raise ConfigError("the model's outputs have no floating-point numbers to compare: pass score=")
                if not parts:
                    self.measures = [_measure_of(measure, place, t, output) for place, t in enumerate(tensors)]
                parts.append([self._rows(tensor, kind) for tensor, kind in zip(tensors, self.measures, strict=True)])
        spreads = [np.mean([float(rows.var(unbiased=False)) for rows in held]) for held in zip(*parts, strict=True)]
        self._scales = [1 / max(float(spread), 1e-12) for spread in spreads]
        self._dense = [
            [rows.log_softmax(-1) if kind == "kl" else rows for rows, kind in zip(held, self.measures, strict=True)]
            for held in parts
        ]

    def of_output(self, output: Any, batch: Any, part: int) -> torch.Tensor:
        tensors, total = _compared(output), torch.zeros(())
        for tensor, held, kind, scale in zip(tensors, self._dense[part], self.measures, self._scales, strict=True):
            rows = self._rows(tensor, kind)
            dense = held.to(rows.device)
            if rows.shape != dense.shape:
                raise ValueError(f"the output has the shape {tuple(rows.shape)}, the dense one {tuple(dense.shape)}")
            if kind == "mse":
                lost = scale * (rows - dense).square().mean(dim=(1, 2))
            else:
                divergence = F.kl_div(rows.log_softmax(-1), dense, reduction="none", log_target=True)
                lost = divergence.sum(-1).mean(1).clamp(min=0)  # rounding makes equal outputs better than equal
            total = total.to(lost.device) - lost
        return total

    def _rows(self, tensor: torch.Tensor, kind: str) -> torch.Tensor:
        """``(samples, positions, size)`` in float32; of many positions as many as there is memory for."""
        tensor = (_classes_last(tensor) if kind == "kl" else tensor).float()
        rows = tensor.reshape(len(tensor), -1, tensor.shape[-1] if tensor.dim() > 1 else 1)
        room = max(1, int(MAX_BYTES / len(self.batches) / (4 * rows.shape[0] * rows.shape[2])))
        return rows[:, :: -(-rows.shape[1] // room)]


def _measure_of(wanted: str, place: int, tensor: torch.Tensor, output: Any) -> str:
    """What compares the output at ``place``; the logits, where some are named so, come first."""
    classes = _classes_last(tensor).shape[-1] if tensor.dim() > 1 else 1
    if wanted == "auto":
        are_named = place == 0 and isinstance(output, Mapping) and "logits" in output
        return "kl" if classes > 1 and (are_named or tensor.dim() == 2) else "mse"
    if wanted == "kl" and classes == 1:
        raise ConfigError("measure=kl compares the probabilities of classes, and there is one output: take mse")
    return wanted


def _compared(output: Any) -> list[torch.Tensor]:
    """Outputs with floating-point numbers for every sample, of which the first has as many as there are."""
    tensors = [tensor for tensor in output_tensors(output) if tensor.is_floating_point() and tensor.dim()]
    return [tensor for tensor in tensors if len(tensor) == len(tensors[0])]


def _classes_last(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.movedim(1, -1) if tensor.dim() == 4 else tensor


def _called(model: nn.Module, batch: Any, arguments: int) -> Any:
    """The output for a batch. Raises ConfigError where the model rejects it."""
    advice = f"Of a batch that is a tuple the first {arguments} are its arguments: SampleScore(arguments=...)"
    what = "a batch of the data that score it"
    inputs = inputs_of(batch, arguments).accepted_by(model)
    return inputs.call_or_raise(model, ConfigError, what, advice)


@contextmanager
def same_draws(model: nn.Module, part: int) -> Iterator[None]:
    """Forwards that draw random numbers draw the same ones for every model; the caller's generators are left alone."""
    device = device_of(model)
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(part)
        yield


def parts_of(batches: Sequence[Any], samples: int | None, seed: int = 0) -> list[Any]:
    """``samples`` of the batches (all of them by default), drawn at random, in parts of which the first is a tenth.

    No part is larger than the largest batch, which is what there is memory for. Batches whose samples differ in shape
    stay as they are, the first ones up to ``samples``.
    """
    sizes = [_samples(batch) for batch in batches]
    if len({_shapes(batch, size) for batch, size in zip(batches, sizes, strict=True)}) > 1:
        reached = np.cumsum(sizes) - sizes < (samples or sum(sizes))
        return [batch for batch, wanted in zip(batches, reached, strict=True) if wanted]
    count = min(samples or sum(sizes), sum(sizes))
    chosen = np.random.default_rng(seed).permutation(sum(sizes))[:count]
    held = _taken(batches, sizes, np.sort(chosen))
    order = torch.from_numpy(np.argsort(np.argsort(chosen)))
    part = min(PART, max(sizes))
    first = max(1, min(part, round(FIRST_SHARE * count)))
    return [_indexed(held, count, indices) for indices in (order[:first], *order[first:].split(part)) if len(indices)]


def _taken(batches: Sequence[Any], sizes: Sequence[int], chosen: NDArray[np.int64]) -> Any:
    """The samples ``chosen`` (ascending, counted over all batches) as one batch; no more than these is copied."""
    taken = []
    for batch, size, start in zip(batches, sizes, np.cumsum([0, *sizes]), strict=False):
        inside = chosen[(chosen >= start) & (chosen < start + size)] - start
        taken.append(_indexed(batch, size, torch.from_numpy(inside)))
    size = sizes[0]
    holds = [_holds(leaf, size) for leaf in tree_leaves(batches[0])]
    leaves = zip(*(tree_leaves(batch) for batch in taken), strict=True)
    joined = iter([torch.cat(held) if whole else held[0] for held, whole in zip(leaves, holds, strict=True)])
    return tree_map(lambda _: next(joined), batches[0])


def _indexed(batch: Any, size: int, indices: torch.Tensor) -> Any:
    return tree_map(lambda leaf: leaf[indices] if _holds(leaf, size) else leaf, batch)


def _holds(leaf: Any, size: int) -> bool:
    """Whether ``leaf`` has a row a sample; what has none is the same for all batches."""
    return isinstance(leaf, torch.Tensor) and leaf.dim() > 0 and len(leaf) == size


def _samples(batch: Any) -> int:
    first = next((leaf for leaf in tree_leaves(batch) if isinstance(leaf, torch.Tensor) and leaf.dim()), None)
    if first is None:
        raise ConfigError(f"a batch of a score must hold a tensor of samples, not {type(batch).__name__}")
    return len(first)


def _shapes(batch: Any, size: int) -> tuple[Any, ...]:
    leaves = [leaf for leaf in tree_leaves(batch) if isinstance(leaf, torch.Tensor)]
    return tuple((tuple(leaf.shape[1:]), _holds(leaf, size)) for leaf in leaves)
