"""Batches whose domains are drawn as they need it: dynamic batch loading (Xia et al. 2023, Sheared LLaMA)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import lru_cache
from operator import mul
from typing import Any, Protocol, runtime_checkable

import torch
from torch import nn

from ...spaces.calibration import inputs_of, precision
from ...spaces.devices import device_of, moved
from ...spaces.errors import ConfigError, FinetuneError
from ...spaces.trace import evaluating
from .distillation import Loss
from .randomness import seed_of
from .recipe import Domains


@runtime_checkable
class DomainData(Protocol):
    """A training that knows its domains."""

    batch_size: int

    @property
    def sizes(self) -> Mapping[str, int]:
        """Rows of every domain; domains follow each other in the numbering of rows."""

    @property
    def probes(self) -> Mapping[str, Sequence[Any]]:
        """Batches of every domain that are not trained on."""

    def batch(self, chosen: Sequence[int]) -> Any:
        """These rows."""


class DynamicLoading:
    """Every row's domain is drawn by weights; ``update`` multiplies each by the exponential of the excess loss.

    Within a domain every row comes once before any comes again. A batch depends on the seed, the step, and the state.
    """

    def __init__(self, data: DomainData, options: Domains, reference: Mapping[str, float], seed: int) -> None:
        self.data, self.every, self.seed = data, options.every, seed
        self.reference = dict(reference)
        whole = sum(data.sizes.values())
        #: At first the natural shares.
        self.weights = {name: size / whole for name, size in data.sizes.items()}
        self.drawn = dict.fromkeys(data.sizes, 0)
        self.history: list[dict[str, Any]] = []

    def batch(self, step: int) -> Any:
        names = list(self.weights)
        generator = torch.Generator().manual_seed(seed_of(self.seed, step, 1))
        weights = torch.tensor(list(self.weights.values()), dtype=torch.float64)
        drawn = torch.multinomial(weights, self.data.batch_size, replacement=True, generator=generator)
        return self.data.batch([self._next(names[index]) for index in drawn.tolist()])

    def _next(self, name: str) -> int:
        """The number of the domain's next row."""
        names, size = list(self.data.sizes), self.data.sizes[name]
        turn, place = divmod(self.drawn[name], size)
        self.drawn[name] += 1
        start = sum(self.data.sizes[before] for before in names[: names.index(name)])
        return start + _order(size, seed_of(self.seed, names.index(name), turn, 2))[place]

    def update(self, step: int, losses: Mapping[str, float]) -> None:
        """Raises FinetuneError if a loss is not finite."""
        if not all(map(math.isfinite, losses.values())):
            raise FinetuneError(f"the losses of the domains are {dict(losses)} at step {step}; lower finetune.lr")
        raised = {n: w * math.exp(max(losses[n] - self.reference[n], 0.0)) for n, w in self.weights.items()}
        self.weights = {name: weight / sum(raised.values()) for name, weight in raised.items()}
        self.history.append({"step": step, "losses": dict(losses), "weights": dict(self.weights)})

    def state(self) -> dict[str, Any]:
        """Everything that changes, as JSON values."""
        return {name: getattr(self, name) for name in ("reference", "weights", "drawn", "history")}

    def restore(self, state: Mapping[str, Any]) -> None:
        for name in ("reference", "weights", "drawn", "history"):
            setattr(self, name, state[name])


@lru_cache(maxsize=16)
def _order(size: int, seed: int) -> list[int]:
    order: list[int] = torch.randperm(size, generator=torch.Generator().manual_seed(seed)).tolist()
    return order


def domain_losses(
    model: nn.Module, probes: Mapping[str, Sequence[Any]], loss: Loss, autocast: torch.dtype | None
) -> dict[str, float]:
    """Mean loss of every domain, in evaluation mode."""
    device = device_of(model)
    found = {}
    with evaluating(model), torch.no_grad(), precision(model, autocast):
        for name, batches in probes.items():
            placed = [moved(batch, device) for batch in batches]
            inputs = [inputs_of(batch) for batch in placed]
            losses = [float(loss(given.call(model), batch)) for given, batch in zip(inputs, placed, strict=True)]
            counts = [len(given.tensors()[0]) for given in inputs]
            found[name] = sum(map(mul, losses, counts)) / sum(counts)
    return found


def make_loading(
    training: Any, options: Domains, loss: Loss | None, dense: nn.Module | None, autocast: torch.dtype | None, seed: int
) -> DynamicLoading | None:
    """None where ``options`` ask for none. The losses to reach are given, or those of ``dense``.

    Raises:
        ConfigError: there are no domains, or no losses to reach.
    """
    if not options:
        return None
    if not isinstance(training, DomainData) or len(training.sizes) < 2:
        raise ConfigError(
            "finetune.domains.every mixes domains of text, and the task has only one; name them: "
            "task.train.web=web.txt task.train.books=books.txt"
        )
    if loss is None:
        raise ConfigError("finetune.domains.every needs loss=, a function of an output and a batch")
    if missing := training.sizes.keys() - training.probes.keys():
        raise ConfigError(
            f"finetune.domains.every needs text of every domain that is not trained on; task.search has no "
            f"{', '.join(sorted(missing))}"
        )
    reference = options.reference
    if reference is None:
        if dense is None:
            raise ConfigError("finetune.domains needs the dense model as teacher=, or the losses to reach as reference")
        reference = domain_losses(dense, training.probes, loss, autocast)
    if set(reference) != set(training.sizes):
        raise ConfigError(
            f"finetune.domains.reference has losses of {', '.join(reference)}; the domains are "
            f"{', '.join(training.sizes)}"
        )
    return DynamicLoading(training, options, reference, seed)
