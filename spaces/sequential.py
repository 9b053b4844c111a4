"""Least squares layer after layer, on the activations of the candidate itself, in one forward pass of it.

Every consumer is fitted when the pass reaches it, to give the dense model's output from the candidate's inputs, in
which what came before is pruned and fitted already (He et al. 2017; ThiNet, Luo et al. 2017). Where its output is added
to another tensor, such as a residual stream, it is fitted to the dense *sum*, so that errors of the stream are taken
back at every block instead of adding up. BatchNorm layers take their statistics from the same pass.
"""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.weak import WeakTensorKeyDictionary

from . import norms
from .calibration import Calibration, as_rounded, recalibrate
from .consumers import Call, Watcher, batch_norm_arguments, embedding_weight, matrix, sampled, tensor_like
from .groups import Kept, Structure
from .inputs import Inputs
from .least_squares import ridge
from .surgery import kept_elements, row_factors
from .trace import evaluating

logger = logging.getLogger(__name__)

#: All targets together take at most this, and so do the activations of the pass.
MAX_BYTES = 2 * 2**30
#: A consumer whose outputs differ by less than this share of their energy from the dense ones is left as it is.
NEGLIGIBLE = 1e-5
_SUMS = ("add", "add_", "__add__", "__radd__", "__iadd__")
_PRODUCTS = ("mul", "mul_", "__mul__", "__rmul__", "__imul__")
_PASSING = ("dropout", "dropout_", "contiguous", "dropout1d", "dropout2d", "dropout3d")


@dataclass(frozen=True)
class Effort:
    """``samples`` of the pass, ``rows``: vectors that a consumer is fitted on, and ``bytes`` of the pass's activations:
    where those of all samples are more, half of the samples will do."""

    samples: int
    rows: int
    bytes: int = MAX_BYTES

    def samples_of(self, sample_bytes: float) -> int:
        """How many, where one has so many bytes of activations at a time."""
        per_sample = max(sample_bytes, 1.0)
        wanted = max(self.samples // 2, min(self.samples, int(self.bytes / per_sample)))
        return max(1, min(wanted, int(MAX_BYTES / per_sample)))


#: ``quick`` ranks candidates as ``thorough`` does at a tenth of its time; that repairs the ones to keep
#: (docs/candidates.md).
EFFORTS = {"quick": Effort(512, 4096, 2**26), "thorough": Effort(2048, 32768)}


@dataclass
class Target:
    """``outputs (n, out)`` of a consumer in the dense model at ``positions (n,)``.

    ``others (n, out)``: what is added to it later, after it was multiplied with ``gain (out,)``; None without a sum.
    """

    positions: torch.Tensor
    outputs: torch.Tensor
    is_normalised: bool = False
    gain: torch.Tensor | None = None
    others: torch.Tensor | None = None


@dataclass
class _Made:
    """A tensor that is a consumer's output, multiplied by ``gain`` and shifted, by the functions ``after``."""

    number: int
    call: Call
    gain: torch.Tensor | None
    after: list[Callable[[torch.Tensor], torch.Tensor]]
    fit: _Fit | None = None


class _Follower(Watcher):
    """Follows outputs of consumers up to the tensor that they are added to."""

    def __init__(self, model: nn.Module, renamed: Callable[[str], str] = str) -> None:
        super().__init__(model, renamed)
        self.made = WeakTensorKeyDictionary()
        self.calls = 0

    def follow(self, output: torch.Tensor, call: Call, fit: _Fit | None = None) -> None:
        self.calls += 1
        self.made[output] = _Made(self.calls, call, None, [], fit)

    def other(self, func: Any, args: Any, kwargs: Mapping[str, Any]) -> Any:
        name = getattr(func, "__name__", "")
        if name in _SUMS and len(args) == 2 and all(isinstance(a, torch.Tensor) for a in args):
            return self.sum(func, args[0], args[1], kwargs)
        position = next((i for i, a in enumerate(args[:2]) if isinstance(a, torch.Tensor) and a in self.made), None)
        if position is None:
            return self.apply(func, args, kwargs)
        made: _Made = self.made[args[position]]
        gain, follows = _gain(func, name, args, kwargs, position, made.call)

        def after(tensor: torch.Tensor) -> torch.Tensor:
            replaced = [tensor if i == position else a for i, a in enumerate(args)]
            result: torch.Tensor = self.apply(func, replaced, kwargs)
            return result

        result = self.apply(func, args, kwargs)
        if follows:
            gains = [each for each in (made.gain, gain) if each is not None]
            total = math.prod(gains[1:], start=gains[0]) if gains else None
            self.made[result] = _Made(made.number, made.call, total, [*made.after, after], made.fit)
            self.passed(made.call.parameter, func)
        return result

    def apply(self, func: Any, args: Any, kwargs: Mapping[str, Any]) -> Any:
        return norms.run(func, args, kwargs)

    def passed(self, parameter: str, func: Any) -> None:
        """``func`` has followed the consumer."""

    def sum(self, func: Any, left: torch.Tensor, right: torch.Tensor, kwargs: Mapping[str, Any]) -> Any:
        pairs = [(a, b) for a, b in ((left, right), (right, left)) if a in self.made and a.shape == b.shape]
        if not pairs or kwargs:
            return func(left, right, **kwargs)
        # Of two consumers the later one can still be fitted when the other's output is known.
        last, other = max(pairs, key=lambda pair: self.made[pair[0]].number)
        return self.summed(func, left, right, self.made[last], other, last is left)

    def summed(
        self, func: Any, left: torch.Tensor, right: torch.Tensor, made: _Made, other: torch.Tensor, is_left: bool
    ) -> Any:
        return func(left, right)


def _gain(
    func: Any, name: str, args: Any, kwargs: Mapping[str, Any], position: int, call: Call
) -> tuple[torch.Tensor | None, bool]:
    """What ``func`` multiplies every output element with, and whether it does no more than that and a shift."""
    if (norm := batch_norm_arguments(func, args, kwargs)) is not None:
        gain = torch.rsqrt(norm["running_var"].float() + norm["eps"])
        return (gain if norm["weight"] is None else gain * norm["weight"].float()), True
    if name in _PRODUCTS and len(args) == 2 and isinstance(args[1 - position], nn.Parameter):
        scale = args[1 - position]
        width = call.weight.shape[call.out_dim]
        expected = (width,) if call.window is None else (width, *[1] * len(call.window.kernel))
        return scale.reshape(-1).float(), tuple(scale.shape) == expected
    return None, name in _PASSING and position == 0


class _Recorder(_Follower):
    """Records the targets of the dense model."""

    def __init__(self, model: nn.Module, structure: Structure, rows: int, seed: int) -> None:
        super().__init__(model)
        self.structure = structure
        self.rows = rows
        self.targets: dict[str, Target] = {}
        self.seen: set[str] = set()
        self.generator = torch.Generator().manual_seed(seed)
        self.buffers = {id(buffer): name for name, buffer in model.named_buffers()}
        #: How often each BatchNorm layer was called, by the name of its running mean.
        self.normalised: Counter[str] = Counter()

    def consumer(self, call: Call) -> Any:
        output = call.run()
        if call.parameter in self.seen:
            self.targets.pop(call.parameter, None)  # used twice: no one fit serves both
        elif call.parameter in self.structure.tensors:
            positions = sampled(call.count(), self.rows, self.generator).to(output.device)
            self.targets[call.parameter] = Target(positions, call.outputs(output, positions))
            self.follow(output, call)
        self.seen.add(call.parameter)
        return output

    def apply(self, func: Any, args: Any, kwargs: Mapping[str, Any]) -> Any:
        norm = batch_norm_arguments(func, args, kwargs)
        if norm is not None:
            self.normalised[self.buffers.get(id(norm["running_mean"]), "")] += 1
        table = embedding_weight(func, args, kwargs)
        if table is not None and id(table) in self.names:
            self.targets.pop(self.names[id(table)], None)
            self.seen.add(self.names[id(table)])
        return super().apply(func, args, kwargs)

    def passed(self, parameter: str, func: Any) -> None:
        if func is F.batch_norm and parameter in self.targets:
            self.targets[parameter].is_normalised = True

    def summed(
        self, func: Any, left: torch.Tensor, right: torch.Tensor, made: _Made, other: torch.Tensor, is_left: bool
    ) -> Any:
        target = self.targets.get(made.call.parameter)
        if target is not None and target.others is None:
            target.gain, target.others = made.gain, made.call.outputs(other, target.positions)
        return func(left, right)


class _Fit:
    """The normal equations of one consumer in the candidate.

    ``rows (n, columns)`` are what it multiplies, ``chosen`` the dense outputs that it still has, ``factors`` what its
    outputs are scaled by. ``missing (n, out)``: what its outputs lack of the dense ones before it is fitted.
    """

    def __init__(
        self, call: Call, target: Target, rows: torch.Tensor, chosen: torch.Tensor, factors: torch.Tensor | None
    ) -> None:
        self.call, self.target, self.rows, self.chosen, self.factors = call, target, rows, chosen, factors
        self.is_centred = call.bias is not None or target.is_normalised
        self.means = rows.mean(0) if self.is_centred else rows.new_zeros(rows.shape[1])
        self.weight = matrix(call.weight.detach(), call.in_dim, call.out_dim).float().clone()
        self.bias = None if call.bias is None else call.bias.detach().float().clone()

    @cached_property
    def spread(self) -> torch.Tensor:
        return self.rows - self.means

    @cached_property
    def gram(self) -> tuple[torch.Tensor, float]:
        """The Cholesky factor of the second moments with a ridge, in double precision, and the ridge."""
        gram = (self.spread.T @ self.spread).double()
        added = ridge(len(gram), len(self.spread)) * float(gram.diagonal().mean()) + torch.finfo(torch.float32).tiny
        gram.diagonal().add_(added)
        return torch.linalg.cholesky(gram), added

    def solve(self) -> None:
        """Set the weight and the bias for which the outputs are nearest to the dense ones."""
        with as_rounded(self.call.x):
            wanted = self.scaled(self.target.outputs[:, self.chosen].float())
            self.missing = wanted - self.rows @ self.weight.T
            if self.bias is not None:
                self.missing -= self.bias
            if self.missing.square().sum() > NEGLIGIBLE * wanted.square().sum():
                self._fit()

    def correct(self, missing: torch.Tensor) -> None:
        """Make the outputs come nearer to the dense ones plus ``missing (n, out)``."""
        with as_rounded(self.call.x):
            self.missing = self.missing + self.scaled(missing)
            self._fit()

    def scaled(self, outputs: torch.Tensor) -> torch.Tensor:
        return outputs if self.factors is None else outputs * self.factors

    def _fit(self) -> None:
        call, (cholesky, added) = self.call, self.gram
        mean = self.missing.mean(0)
        # Centred rows need no centred residual but for rounding, which a large constant would multiply.
        residual = self.missing - mean if self.is_centred else self.missing
        moment = (self.spread.T @ residual).double()
        change = torch.cholesky_solve(moment, cholesky)
        explained = float((change * (moment + added * change)).sum())
        share = reliable_share(float(residual.square().sum()), explained, *self.rows.shape)
        difference = share * change.float().T
        call.weight.data.copy_(tensor_like(self.weight + difference, call.weight, call.in_dim, call.out_dim))
        if call.bias is not None and self.bias is not None:
            call.bias.data.copy_((self.bias + mean - difference @ self.means).to(call.bias.dtype))
        torch.clear_autocast_cache()  # it holds the weight as it was


def reliable_share(energy: float, explained: float, rows: int, columns: int) -> float:
    """The part of a least-squares fit that is not noise of its targets: with ``columns`` inputs and few ``rows`` it has
    ``explained`` some of their ``energy`` by chance. The positive part estimator of James and Stein (1961).
    """
    freedom = min(columns / rows, 0.5)
    noise = max(energy - explained, 0.0) * freedom / (1 - freedom)
    return max(0.0, 1 - noise / explained) if explained > 0 else 0.0


class _Refitter(_Follower):
    """Fits a candidate to the targets while it runs."""

    def __init__(
        self,
        candidate: nn.Module,
        structure: Structure,
        kept: Kept,
        targets: Mapping[str, Target],
        repeated: frozenset[str],
        renamed: Callable[[str], str],
    ) -> None:
        super().__init__(candidate, renamed)
        self.structure, self.kept, self.targets = structure, kept, targets
        self.factors = row_factors(structure, kept)
        self.repeated = repeated
        self.buffers = {id(buffer): renamed(name) for name, buffer in candidate.named_buffers()}

    def consumer(self, call: Call) -> Any:
        target = self.targets.get(call.parameter)
        if target is None:
            return call.run()
        device = call.x.device
        chosen = torch.from_numpy(kept_elements(self.structure, self.kept, call.parameter, call.out_dim)).to(device)
        held = self.factors.get((call.parameter, call.out_dim))
        factors = None if held is None else torch.from_numpy(held).to(device).float()[chosen]
        fit = _Fit(call, target, call.rows(target.positions).float(), chosen, factors)
        fit.solve()
        output = call.run()
        if target.others is not None:
            self.follow(output, call, fit)
        return output

    def apply(self, func: Any, args: Any, kwargs: Mapping[str, Any]) -> Any:
        norm = batch_norm_arguments(func, args, kwargs)
        if norm is None:
            return func(*args, **kwargs)
        if self.buffers.get(id(norm["running_mean"])) in self.repeated:
            return norms.run(func, args, kwargs)  # its statistics are those of several calls
        return norms.batch_norm(**norm | {"training": True, "momentum": 1.0})

    def summed(
        self, func: Any, left: torch.Tensor, right: torch.Tensor, made: _Made, other: torch.Tensor, is_left: bool
    ) -> Any:
        fit = made.fit
        if fit is None or fit.target.others is None:
            return func(left, right)
        dense = fit.target.others[:, fit.chosen].float()
        missing = dense - made.call.outputs(other, fit.target.positions).float()
        if not missing.square().sum() <= dense.square().sum():
            return func(left, right)  # the stream has nothing left of the dense one: this layer cannot bring it back
        if fit.target.gain is not None:
            gain = fit.target.gain[fit.chosen]
            alive = gain.abs() > 1e-3 * gain.abs().max()
            missing = torch.where(alive, missing / torch.where(alive, gain, torch.ones_like(gain)), 0)
        fit.correct(missing)
        output = made.call.run()
        for function in made.after:
            output = function(output)
        return func(output, other) if is_left else func(other, output)


@dataclass
class Targets:
    """What every consumer of the dense model gives on ``inputs``, by parameter.

    ``repeated``: names of the running means of BatchNorm layers that are called several times.
    """

    model: nn.Module
    inputs: Inputs
    by_parameter: dict[str, Target]
    repeated: frozenset[str] = frozenset()


def record_targets(
    model: nn.Module,
    structure: Structure,
    calibration: Calibration,
    effort: Effort = EFFORTS["thorough"],
    sample_bytes: float = 0.0,
    seed: int = 0,
) -> Targets:
    """One pass of the first samples of ``calibration`` over the dense ``model``.

    ``sample_bytes``: peak of the activations of one sample; fewer samples are taken where they need more memory.
    """
    inputs = first_samples(calibration, effort.samples_of(sample_bytes))
    recorder = _Recorder(model, structure, _rows_within_memory(model, effort.rows), seed)
    with evaluating(model), torch.no_grad(), calibration.precision(model), recorder:
        inputs.call(model)
    repeated = frozenset(name for name, calls in recorder.normalised.items() if calls > 1)
    return Targets(model, inputs, recorder.targets, repeated)


def refit(candidate: nn.Module, structure: Structure, kept: Kept, targets: Targets, calibration: Calibration) -> None:
    """Fit all consumers of ``candidate``, and the statistics of its BatchNorm layers, in one pass."""
    renamed = dense_names(targets.model, structure, kept)
    refitter = _Refitter(candidate, structure, kept, targets.by_parameter, targets.repeated, renamed)
    with evaluating(candidate), torch.no_grad(), calibration.precision(candidate), refitter:
        targets.inputs.call(candidate)
    if targets.repeated:
        layers = [
            layer
            for name, layer in candidate.named_modules()
            if isinstance(layer, nn.modules.batchnorm._BatchNorm)
            and renamed(f"{name}.running_mean") in targets.repeated
        ]
        recalibrate(candidate, calibration, layers=layers)


def first_samples(calibration: Calibration, samples: int) -> Inputs:
    """The first batches as one, of ``samples`` samples at most; the first alone where batches differ in shape."""
    chosen: list[Inputs] = []
    count = 0
    for inputs in calibration:
        if chosen and _shapes(inputs) != _shapes(chosen[0]):
            break
        chosen.append(inputs)
        count += len(inputs.tensors()[0])
        if count >= samples:
            break
    size = len(chosen[0].tensors()[0])
    leaves = zip(*(inputs.leaves() for inputs in chosen), strict=True)
    joined = iter([_joined(parts, size, samples) for parts in leaves])
    return chosen[0].map(lambda _: next(joined))


def _shapes(inputs: Inputs) -> list[Any]:
    return [tuple(leaf.shape[1:]) if isinstance(leaf, torch.Tensor) else leaf for leaf in inputs.leaves()]


def _joined(parts: tuple[Any, ...], size: int, samples: int) -> Any:
    """Leaves that hold a sample each, of every batch; others are the first one's."""
    first = parts[0]
    if not isinstance(first, torch.Tensor) or first.dim() == 0 or len(first) != size:
        return first
    return torch.cat(parts)[:samples].contiguous(memory_format=_format(first))


def _format(tensor: torch.Tensor) -> torch.memory_format:
    is_last = tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if is_last else torch.contiguous_format


def _rows_within_memory(model: nn.Module, wanted: int) -> int:
    """``wanted``, or as many as the targets of all parameters have memory for."""
    outputs = sum(max(parameter.shape[:2]) for parameter in model.parameters() if parameter.dim() > 1)
    rows = min(wanted, MAX_BYTES // (2 * 4 * max(outputs, 1)))
    if rows < wanted:
        logger.info("sequential least squares: %d vectors a layer instead of %d, for memory", rows, wanted)
    return int(rows)


def dense_names(model: nn.Module, structure: Structure, kept: Kept) -> Callable[[str], str]:
    """From names of parameters of the candidate to those of the dense ``model``: layers after a removed one move up."""
    moved: dict[str, str] = {}
    for group, mask in zip(structure.groups, kept, strict=True):
        if group.blocks and group.substitutes is None and not mask.all():
            container = group.blocks[0].rpartition(".")[0]
            gone = {block for block, stays in zip(group.blocks, mask, strict=True) if not stays}
            prefix = f"{container}." if container else ""
            names = [prefix + key for key, _ in model.get_submodule(container).named_children()]
            if all(name.rpartition(".")[2].isdigit() for name in names):
                remaining = [name for name in names if name not in gone]
                moved |= {f"{prefix}{place}": name for place, name in enumerate(remaining)}

    def dense_name(name: str) -> str:
        parts = name.split(".")
        starts = ((".".join(parts[:end]), parts[end:]) for end in range(len(parts) - 1, 0, -1))
        return next((".".join([moved[start], *rest]) for start, rest in starts if start in moved), name)

    return dense_name
