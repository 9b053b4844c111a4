"""Calibration data, what one pass of it over the dense model tells about consumers' inputs, and BatchNorm's statistics.

The statistics of the dense model are wrong for a candidate (Li et al. 2020, EagleEye).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from . import norms
from .consumers import Call, Watcher, batch_norm_arguments, embedding_weight, sampled
from .devices import batches_on, device_of
from .errors import CalibrationError
from .groups import Structure, groups_in, is_squared
from .inputs import Inputs
from .surgery import tensors_of
from .trace import evaluating

logger = logging.getLogger(__name__)

#: Fewer samples than this give BatchNorm statistics that are mostly noise.
MIN_SAMPLES = 128
#: More samples than this make them no better (docs/candidates.md).
NORM_SAMPLES = 512
#: A consumer with more columns than this is described by its channels alone.
MAX_COLUMNS = 1152
#: All second moments together take at most this.
MAX_BYTES = 4 * 2**30
#: Why a consumer is not fitted in full.
NO_MEMORY = f"no room for second moments within {MAX_BYTES / 2**30:.0f} GiB: only means are repaired"
BY_CHANNEL = f"more than {MAX_COLUMNS} columns: fitted by channel"
TIED = "tied to an embedding, which a fit would change: left as it is"
#: Vectors drawn a consumer, in all and at least a column.
ROWS, ROWS_A_COLUMN = 8192, 8


@dataclass(frozen=True)
class Calibration:
    """Batches of training data, readable again and again.

    A batch is a tensor, a mapping of keyword arguments, or a tuple or list whose first ``arguments`` items are the
    model's arguments. ``loss(output, batch)`` returns the scalar that gradients are taken of; without one, see
    :func:`.criteria.sensitivity.sensitivity`. ``autocast``: run in this type.
    """

    batches: Iterable[Any]
    arguments: int = 1
    loss: Callable[[Any, Any], torch.Tensor] | None = None
    autocast: torch.dtype | None = None
    #: The arguments of the model, of those that a mapping has; None for all.
    names: frozenset[str] | None = None

    def __post_init__(self) -> None:
        if isinstance(self.batches, torch.Tensor):
            raise CalibrationError("calibration is one tensor; pass a list of batches: list(tensor.split(256))")
        if isinstance(self.batches, tuple) and all(isinstance(batch, torch.Tensor) for batch in self.batches):
            raise CalibrationError("calibration is a tuple of tensors; pass a list of batches: [(images, labels)]")
        if not isinstance(self.batches, Iterable):
            raise CalibrationError(
                f"calibration must be a DataLoader or a list of batches, not {type(self.batches).__name__}"
                + ("; call it, and pass what it returns" if callable(self.batches) else "")
            )
        if isinstance(self.batches, Iterator):
            raise CalibrationError(
                "calibration is a generator, which is empty after one reading, and it is read again and again; "
                "pass a DataLoader or a list of batches"
            )
        if next(iter(self.batches), None) is None:
            raise CalibrationError("calibration has no batches; pass at least one")

    def on(self, device: torch.device) -> Calibration:
        batches = batches_on(self.batches, device)
        return self if batches is self.batches else replace(self, batches=batches)

    def inputs(self, batch: Any) -> Inputs:
        return inputs_of(batch, self.arguments).only(self.names)

    def __iter__(self) -> Iterator[Inputs]:
        return (self.inputs(batch) for batch in self.batches)

    def samples(self) -> int:
        """Number of samples: the first dimension of the first tensor of every batch."""
        return sum(len(_first_tensor(batch)) for batch in self.batches)

    def precision(self, model: nn.Module) -> AbstractContextManager[Any]:
        return precision(model, self.autocast)


def inputs_of(batch: Any, arguments: int = 1) -> Inputs:
    """What a batch gives the model: all of a tensor or mapping, the first ``arguments`` items of a tuple or list."""
    return Inputs.of(tuple(batch[:arguments]) if isinstance(batch, tuple | list) else batch)


def precision(model: nn.Module, autocast: torch.dtype | None) -> AbstractContextManager[Any]:
    """Autocast to ``autocast`` on the device of ``model``; nothing where that is None."""
    if autocast is None:
        return nullcontext()
    return torch.autocast(device_of(model).type, dtype=autocast)


def exactly(tensor: torch.Tensor) -> AbstractContextManager[Any]:
    """No autocast, which would round sums of squares too."""
    return torch.autocast(tensor.device.type, enabled=False)


@contextmanager
def as_rounded(tensor: torch.Tensor) -> Iterator[None]:
    """No autocast; matrix products of float32 values that were computed from ``tensor`` take them as rounded as it is.

    Their sums are float32. Where the processor multiplies bfloat16, that is twice as quick.
    """
    # Older releases of torch have no such setting.
    products: Any = getattr(torch.backends.mkldnn, "matmul", None)
    if products is None or tensor.dtype != torch.bfloat16 or tensor.device.type != "cpu":
        with exactly(tensor):
            yield
        return
    before, products.fp32_precision = products.fp32_precision, "bf16"
    try:
        with exactly(tensor):
            yield
    finally:
        products.fp32_precision = before


class Moments:
    """First and second moments of what a consumer multiplies.

    A column is an element of the consumer's window, or ``by_channel`` an input channel. Without ``whole`` means and
    mean squares alone are kept. Sums are taken about the mean of the first vectors: far from zero, the spread of nearly
    constant columns would be lost in the rounding of their squares.
    """

    def __init__(
        self, in_dim: int, out_dim: int, columns: int, by_channel: bool, whole: bool, shift: tuple[str, int] | None
    ) -> None:
        self.in_dim, self.out_dim, self.columns, self.by_channel = in_dim, out_dim, columns, by_channel
        #: The parameter or buffer that takes up a constant: a bias (added), a BatchNorm's running mean (subtracted).
        self.shift = shift
        self.is_whole = whole
        self.samples = 0
        self._origin: torch.Tensor | None = None

    def add(self, rows: torch.Tensor) -> None:
        """Take in vectors ``(n, columns)``."""
        rows = rows.detach().float()
        if self._origin is None:
            self._origin = rows.mean(0)
            shape = (self.columns, self.columns) if self.is_whole else (self.columns,)
            self._squares = rows.new_zeros(shape, dtype=torch.float64)
            self._sums = rows.new_zeros(self.columns, dtype=torch.float64)
        rows = rows - self._origin
        self.samples += len(rows)
        self._sums += rows.sum(0, dtype=torch.float64)
        with exactly(rows):
            self._squares += ((rows.T @ rows) if self.is_whole else rows.square().sum(0)).double()

    def drop(self) -> None:
        """Keep means and mean squares only, and no place for a constant."""
        if self.is_whole:
            self._squares, self.is_whole = self._squares.diagonal().clone(), False
        self.shift = None

    @property
    def bytes(self) -> int:
        return 8 * self.columns**2 if self.is_whole else 0

    @property
    def means(self) -> torch.Tensor:
        """``(columns,)``, float64."""
        assert self._origin is not None
        return self._origin.double() + self._sums / self.samples

    @property
    def mean_squares(self) -> torch.Tensor:
        """``(columns,)``, float64."""
        squares = self._squares.diagonal() if self.is_whole else self._squares
        return squares / self.samples - (self._sums / self.samples).square() + self.means.square()

    @property
    def covariance(self) -> torch.Tensor:
        """``(columns, columns)``, float64. Raises ValueError where only means are kept."""
        if not self.is_whole:
            raise ValueError("only means and mean squares were kept")
        offsets = self._sums / self.samples
        return self._squares / self.samples - torch.outer(offsets, offsets)


@dataclass
class Statistics:
    """The moments of every consumer that a group reaches, and what was too large for them."""

    moments: dict[str, Moments] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)

    @property
    def bytes(self) -> int:
        return sum(moments.bytes for moments in self.moments.values())


def collect(model: nn.Module, structure: Structure, calibration: Calibration, seed: int = 0) -> Statistics:
    """One pass of ``calibration`` over ``model``."""
    statistics = Statistics()
    batches = sum(1 for _ in calibration.batches)
    watcher = _Collector(model, structure, statistics, max(batches, 1), seed)
    inputs = None
    try:
        with evaluating(model), torch.no_grad(), calibration.precision(model), watcher:
            for inputs in calibration:
                inputs.call(model)
    except Exception:
        if inputs is not None:
            with evaluating(model), torch.no_grad(), calibration.precision(model):
                call_with(model, inputs)  # says so where the model alone rejects it too
        raise
    for name in watcher.embedded & statistics.moments.keys():
        statistics.moments[name].drop()
        statistics.notes[name] = TIED
    _report(statistics)
    return statistics


def _report(statistics: Statistics) -> None:
    """Tell the memory, and what was left out of it: one line a reason."""
    logger.info("moments of %d consumers take %.0f MB", len(statistics.moments), statistics.bytes / 1e6)
    for reason in dict.fromkeys(statistics.notes.values()):
        names = [name for name, note in statistics.notes.items() if note == reason]
        more = f" and {len(names) - 2} more" if len(names) > 2 else ""
        level = logging.WARNING if reason == NO_MEMORY else logging.INFO
        logger.log(level, "%s%s: %s", ", ".join(names[:2]), more, reason)


class _Collector(Watcher):
    def __init__(self, model: nn.Module, structure: Structure, statistics: Statistics, batches: int, seed: int) -> None:
        super().__init__(model)
        self.structure, self.statistics, self.batches = structure, statistics, batches
        self.state_names = {id(tensor): name for name, tensor in tensors_of(model).items()}
        self.last: tuple[str, Any] = ("", None)
        self.embedded: set[str] = set()
        self.generator = torch.Generator().manual_seed(seed)

    def consumer(self, call: Call) -> Any:
        layout = self.structure.tensors[call.parameter][call.in_dim]
        if not groups_in(layout) or is_squared(layout):
            return call.run()
        moments = self.statistics.moments.get(call.parameter) or self._new(call)
        count = max(ROWS, ROWS_A_COLUMN * moments.columns) // self.batches + 1
        if moments.by_channel:
            places = sampled(call.x.numel() // call.x.shape[1], count, self.generator)
            moments.add(call.channel_rows(places.to(call.x.device)))
        else:
            moments.add(call.rows(sampled(call.count(), count, self.generator).to(call.x.device)))
        output = call.run()
        self.last = call.parameter, output
        return output

    def other(self, func: Any, args: Any, kwargs: Mapping[str, Any]) -> Any:
        parameter, output = self.last
        if (table := embedding_weight(func, args, kwargs)) is not None and id(table) in self.state_names:
            self.embedded.add(self.state_names[id(table)])
        norm = batch_norm_arguments(func, args, kwargs)
        if norm is not None and norm["input"] is output and self.statistics.moments[parameter].shift is None:
            mean = self.state_names.get(id(norm["running_mean"]))  # none where the forward passes a copy
            self.statistics.moments[parameter].shift = None if mean is None else (mean, -1)
        return norms.run(func, args, kwargs)

    def _new(self, call: Call) -> Moments:
        channels = call.weight.shape[call.in_dim]
        columns = call.weight.numel() // call.weight.shape[call.out_dim]
        by_channel = call.window is not None and columns > MAX_COLUMNS
        size = channels if by_channel else columns
        whole = self.statistics.bytes + 8 * size**2 <= MAX_BYTES
        if not whole:
            by_channel = call.window is not None
            size = channels
            self.statistics.notes[call.parameter] = NO_MEMORY
        elif by_channel:
            self.statistics.notes[call.parameter] = BY_CHANNEL
        bias = None if call.bias is None else self.state_names.get(id(call.bias))
        shift = None if bias is None else (bias, 1)
        moments = Moments(call.in_dim, call.out_dim, size, by_channel, whole, shift)
        self.statistics.moments[call.parameter] = moments
        return moments


def _first_tensor(batch: Any) -> torch.Tensor:
    if isinstance(batch, Mapping):
        batch = list(batch.values())
    first = batch[0] if isinstance(batch, tuple | list) and batch else batch
    if not isinstance(first, torch.Tensor):
        raise CalibrationError(f"a calibration batch must be a tensor or start with one, not {type(batch).__name__}")
    return first


def batch_norms(model: nn.Module) -> list[nn.modules.batchnorm._BatchNorm]:
    """The layers that keep running statistics."""
    kinds = nn.modules.batchnorm._BatchNorm
    return [m for m in model.modules() if isinstance(m, kinds) and m.track_running_stats]


def check_calibration(model: nn.Module, calibration: Calibration | None) -> None:
    """Raises CalibrationError if there is none for BatchNorm layers, or fewer than ``MIN_SAMPLES`` samples."""
    layers = len(batch_norms(model))
    if not layers:
        return
    if calibration is None:
        raise CalibrationError(f"the model has {layers} BatchNorm layers: pass calibration=, batches of training data")
    samples = calibration.samples()
    if samples < MIN_SAMPLES:
        raise CalibrationError(
            f"calibration gives {samples} samples, and BatchNorm statistics need at least {MIN_SAMPLES}; "
            "pass more training data"
        )


def call_with(model: nn.Module, inputs: Inputs) -> Any:
    """The output for a batch of calibration data. Raises CalibrationError where the model rejects it."""
    advice = "Batches are the arguments of the model as example_inputs are, labels may follow"
    return inputs.call_or_raise(model, CalibrationError, "a batch of calibration data", advice)


def recalibrate(
    model: nn.Module,
    calibration: Calibration,
    limit: int = NORM_SAMPLES,
    layers: Sequence[nn.modules.batchnorm._BatchNorm] | None = None,
) -> None:
    """Replace the running statistics of every BatchNorm layer, or of ``layers``, by their average over ``calibration``,
    or over its first batches up to ``limit`` samples."""
    layers = batch_norms(model) if layers is None else layers
    if not layers:
        return
    momenta = [layer.momentum for layer in layers]
    try:
        with evaluating(model), torch.no_grad(), calibration.precision(model), norms.QuickNorms(), ExitStack() as hooks:
            for layer in layers:
                if layer.train().training:  # classes may refuse, and keep their statistics
                    layer.reset_running_stats()
                    handle = layer.register_forward_pre_hook(_averaging(), with_kwargs=True)
                    hooks.callback(handle.remove)
            samples = 0
            for inputs in calibration:
                call_with(model, inputs)
                samples += len(inputs.tensors()[0])
                if samples >= limit:
                    break
    finally:
        for layer, momentum in zip(layers, momenta, strict=True):
            layer.momentum = momentum


def _averaging() -> Callable[[Any, Any, Any], None]:
    """A hook for one layer: its statistics become the mean over all samples, of small last batches and of layers that
    are called more than once too."""
    seen = 0

    def weigh(layer: Any, args: Any, kwargs: Any) -> None:
        nonlocal seen
        count = len([*args, *kwargs.values()][0])
        seen += count
        layer.momentum = count / max(seen, 1)

    return weigh
