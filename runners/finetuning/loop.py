"""The training loop: steps, evaluations, checkpoints, and the way back into the middle of an epoch."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map

from ...search.candidates import Score, checked_score
from ...spaces.calibration import Calibration, batch_norms, inputs_of, precision, recalibrate
from ...spaces.copying import copy_model
from ...spaces.devices import device_of, moved
from ...spaces.errors import FinetuneError
from ...spaces.surgery import tensors_of
from ...spaces.trace import evaluating
from . import randomness
from .checkpoints import load_checkpoint, save_checkpoint
from .distillation import Objective
from .domains import DynamicLoading, domain_losses
from .interrupts import deferred_interrupt
from .optimizers import Masters, copy_buffers, make_optimizer, move_average, optimizer_tensors, restore_optimizer
from .recipe import Recipe

Training = Callable[[int], Iterable[Any]]
#: The loss is a curve of about so many points.
POINTS = 200
#: What a checkpoint has of the loop beside tensors.
NUMBERS = ("step", "evaluated_step", "counted", "curve", "evaluations", "seconds")
#: BatchNorm is recalibrated on so many samples: fewer cost tenths of a point of accuracy after training.
NORM_SAMPLES = 2048


@dataclass(frozen=True)
class Progress:
    """What callbacks are told: at every point of the loss curve, and with a score after evaluations."""

    step: int
    steps: int
    epoch: float
    #: Mean since the last point.
    loss: float
    lr: float
    #: Those since the last point; None together with a score.
    steps_per_s: float | None = None
    score: float | None = None


@dataclass(frozen=True)
class Data:
    """What the model is trained and scored on."""

    training: Training
    #: Of an epoch.
    batches: int
    #: Augmented training batches: on images as they are, which it has seen, a model's statistics are other ones.
    calibration: Calibration | None
    score: Score | None
    #: Precision of recalibration and scores.
    autocast: torch.dtype | None
    #: Draws batches by domain instead of reading epochs.
    loading: DynamicLoading | None = None
    #: So many first items of a tuple or list are the model's.
    arguments: int = 1
    #: Of those in a mapping, the model's.
    names: frozenset[str] | None = None


class Loop:
    """One model on its way through a recipe."""

    def __init__(
        self,
        model: nn.Module,
        recipe: Recipe,
        data: Data,
        objective: Objective,
        checkpoint: Path | None,
        identity: dict[str, Any],
        callbacks: Sequence[Callable[[Progress], None]],
        penalty: Callable[[], None] | None = None,
    ) -> None:
        self.penalty = penalty
        self.model, self.recipe, self.data, self.objective = model, recipe, data, objective
        self.checkpoint, self.identity, self.callbacks = checkpoint, identity, callbacks
        self.device = device_of(model)
        self.memory_format = memory_format(model)
        self.masters = Masters(model)
        self.average = copy_model(model) if recipe.ema else None
        self.average_masters = None if self.average is None else Masters(self.average)
        self.optimizer = make_optimizer(self.masters.parameters, recipe)
        self.steps = recipe.total_steps(data.batches)
        self.interval = max(1, self.steps // POINTS)
        self.step = 0
        self.total_loss = torch.zeros((), device=self.device)
        self.counted = 0
        self.curve: list[dict[str, float]] = []
        self.evaluations: list[dict[str, float]] = []
        self.best: dict[str, torch.Tensor] = {}
        self.seconds = 0.0
        #: The last step after which :meth:`evaluate` has run, and after which a checkpoint was written.
        self.evaluated_step = 0
        self.saved_step: int | None = None
        self.random: tuple[dict[str, torch.Tensor], dict[str, Any]] | None = None

    @property
    def scored(self) -> nn.Module:
        """The weights that count: their average where there is one."""
        return self.model if self.average is None else self.average

    def run(self) -> nn.Module:
        """Train to the end, or until the score no longer rises. Returns the model, recalibrated.

        Raises:
            FinetuneError: the loss is no longer finite.
        """
        started = time.perf_counter() - self.seconds
        saved_at = point_at = time.perf_counter()
        point_step = self.step
        if self.is_due:  # the process was killed while it evaluated
            self.evaluate_again()
        batches = self.stream()
        with deferred_interrupt() as is_interrupted:
            while self.step < self.steps and not self.has_stalled:
                self.train(next(batches))
                self.mix()
                last = self.step == self.steps
                if last or self.step % self.interval == 0:
                    now = time.perf_counter()
                    self.point((self.step - point_step) / max(now - point_at, 1e-9))
                    point_at, point_step = now, self.step
                if self.is_due:
                    if last or not self.evaluations:
                        self.save()  # the score is the user's function, which may fail or take long
                    self.evaluate()
                self.seconds = time.perf_counter() - started
                if is_interrupted() or time.perf_counter() - saved_at >= 60 * self.recipe.checkpoint_min:
                    self.save()
                    saved_at = time.perf_counter()
                if is_interrupted():
                    raise KeyboardInterrupt
        if self.saved_step != self.step or self.has_stalled:
            self.save()
        if self.best:
            _fill(self.scored, self.best)
        return self.scored.eval()

    @property
    def is_due(self) -> bool:
        """Whether it is time to evaluate, and was not done yet."""
        every = self.recipe.evaluate_steps or self.data.batches
        return self.evaluated_step < self.step and (self.step == self.steps or self.step % every == 0)

    def evaluate_again(self) -> None:
        """With the random numbers of then."""
        assert self.random is not None
        randomness.restore(self.device, *self.random)
        self.evaluate()
        self.random = randomness.state(self.device)

    def stream(self) -> Iterator[Any]:
        """The batches that are still to come, epoch after epoch."""
        if self.data.loading is not None:
            randomness.seed_all(self.recipe.seed, 0)
            if self.random is not None:
                randomness.restore(self.device, *self.random)
            while True:
                yield self.data.loading.batch(self.step)
        first, done = divmod(self.step, self.data.batches)
        for epoch in itertools.count(first):
            randomness.seed_all(self.recipe.seed, epoch)
            given = iter(self.data.training(randomness.seed_of(self.recipe.seed, epoch)))
            skipped = done if epoch == first else 0
            for place in range(self.data.batches):
                try:
                    batch = next(given)
                except StopIteration:
                    raise FinetuneError(
                        f"epoch {epoch} of the training data has {place} batches, and the first one had "
                        f"{self.data.batches}; give as many in every epoch"
                    ) from None
                if place >= skipped:
                    yield batch
                elif place == skipped - 1 and self.random is not None:
                    randomness.restore(self.device, *self.random)

    def train(self, batch: Any) -> None:
        """One step. Autocast is left before weights change, since it keeps what it has rounded of them."""
        rate = self.recipe.rate(self.step, self.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.model.train()
        batch = batch_on(batch, self.device, self.memory_format)
        inputs = inputs_of(batch, self.data.arguments).only(self.data.names)
        self.model.zero_grad()
        with precision(self.model, self.recipe.autocast):
            loss = self.objective(inputs, batch)
        if not isinstance(loss, torch.Tensor) or loss.dim() or not loss.requires_grad:
            raise FinetuneError("the loss must be a tensor with one number that depends on the model's parameters")
        loss.backward()
        if self.penalty is not None:
            self.penalty()
        self.masters.take_gradients()
        if self.recipe.clip_norm is not None:
            nn.utils.clip_grad_norm_(self.masters.parameters, self.recipe.clip_norm)
        self.optimizer.step()
        self.masters.give_weights()
        self.step += 1
        self.total_loss += loss.detach()
        self.counted += 1
        if self.average_masters is not None:
            move_average(self.average_masters, self.masters, self.recipe.ema, self.step)

    def mix(self) -> None:
        """Give domains new weights, where batches are loaded so and it is time to."""
        loading = self.data.loading
        if loading is not None and self.step % loading.every == 0:
            assert self.objective.loss is not None
            losses = domain_losses(self.model, loading.data.probes, self.objective.loss, self.recipe.autocast)
            loading.update(self.step, losses)

    def point(self, steps_per_s: float) -> None:
        """One more point of the loss curve."""
        loss = self.checked_loss()
        self.total_loss.zero_()
        self.counted = 0
        rate = self.recipe.rate(self.step - 1, self.steps)
        self.curve.append({"step": self.step, "loss": loss, "lr": rate})
        self.tell(Progress(self.step, self.steps, self.step / self.data.batches, loss, rate, steps_per_s))

    def checked_loss(self) -> float:
        """Mean loss since the last point. Raises FinetuneError if it, or a weight, is not finite."""
        loss = float(self.total_loss) / max(self.counted, 1)
        if math.isfinite(loss) and all(bool(torch.isfinite(p).all()) for p in self.model.parameters()):
            return loss
        what = "weights are no longer finite" if math.isfinite(loss) else f"the loss is {loss}"
        kept = "no checkpoint was written yet"
        if self.saved_step is not None:
            kept = f"the checkpoint of step {self.saved_step} is kept in {self.checkpoint}"
        raise FinetuneError(
            f"{what} at step {self.step} of {self.steps}; {kept}. Try a lower finetune.lr, "
            "finetune.clip_norm=1 or finetune.precision=float32, with restart=true"
        )

    def tell(self, progress: Progress) -> None:
        for callback in self.callbacks:
            callback(progress)

    def evaluate(self) -> None:
        """Recalibrate and score; nothing but BatchNorm's running statistics changes."""
        self.checked_loss()
        if self.average is not None:
            copy_buffers(self.average, self.model)
        if self.data.calibration is not None:
            recalibrate(self.scored, self.data.calibration, NORM_SAMPLES, trained_norms(self.scored))
        if self.data.score is None:
            self.evaluated_step = self.step
            return
        score = scored(self.scored, self.data.score, "score", self.data.autocast)
        rises = not self.evaluations or score > max(found["score"] for found in self.evaluations)
        self.evaluations.append({"step": self.step, "epoch": self.step / self.data.batches, "score": score})
        self.evaluated_step = self.step
        if rises and self.recipe.patience is not None:
            self.best = {name: tensor.detach().clone() for name, tensor in tensors_of(self.scored).items()}
        point = self.curve[-1] if self.curve else {"loss": math.nan, "lr": self.recipe.lr}
        told = self.step, self.steps, self.step / self.data.batches, point["loss"], point["lr"]
        self.tell(Progress(*told, score=score))

    @property
    def has_stalled(self) -> bool:
        """Whether the last ``patience`` evaluations were no better than one before them."""
        patience = self.recipe.patience
        scores = [found["score"] for found in self.evaluations]
        if patience is None or len(scores) <= patience:
            return False
        return max(scores[-patience:]) <= max(scores[:-patience])

    def save(self) -> None:
        """Write a checkpoint, unless something in it is not finite."""
        if self.checkpoint is None:
            return
        self.checked_loss()
        states, generators = randomness.state(self.device)
        parts = {"model": tensors_of(self.model), "optimizer": optimizer_tensors(self.optimizer), "random": states}
        parts |= {"masters": self.masters.tensors(), "best": self.best}
        if self.average is not None and self.average_masters is not None:
            parts |= {"average": tensors_of(self.average), "average_masters": self.average_masters.tensors()}
        tensors = {f"{part}:{name}": tensor for part, held in parts.items() for name, tensor in held.items()}
        numbers = {name: getattr(self, name) for name in NUMBERS}
        save_checkpoint(
            self.checkpoint,
            {**tensors, "total_loss": self.total_loss},
            {
                **numbers,
                "random": generators,
                "identity": self.identity,
                "domains": None if self.data.loading is None else self.data.loading.state(),
            },
        )
        self.saved_step = self.step

    def resume(self) -> None:
        """Go on from the checkpoint, if there is one.

        Raises:
            StorageError: it is damaged.
            FinetuneError: it is that of another model or recipe.
        """
        if self.checkpoint is None or not self.checkpoint.exists():
            return
        tensors, numbers = load_checkpoint(self.checkpoint)
        check_identity(self.checkpoint, numbers["identity"], self.identity)
        parts: dict[str, dict[str, torch.Tensor]] = {}
        self.total_loss = tensors.pop("total_loss").to(self.device)
        for key, tensor in tensors.items():
            part, _, name = key.partition(":")
            parts.setdefault(part, {})[name] = tensor
        _fill(self.model, parts["model"])
        self.masters.restore(parts.get("masters", {}))
        if self.average is not None and self.average_masters is not None:
            _fill(self.average, parts["average"])
            self.average_masters.restore(parts.get("average_masters", {}))
        restore_optimizer(self.optimizer, parts.get("optimizer", {}))
        self.best = parts.get("best", {})
        for name in NUMBERS:
            setattr(self, name, numbers[name])
        if self.data.loading is not None:
            self.data.loading.restore(numbers["domains"])
        self.saved_step, self.random = self.step, (parts["random"], numbers["random"])


def check_identity(where: Path, found: dict[str, Any], expected: dict[str, Any]) -> None:
    """Raises FinetuneError if ``found`` there is that of another model or recipe."""
    differing = sorted(key for key in found.keys() | expected.keys() if found.get(key) != expected.get(key))
    anew = "train anew with restart=true, or save elsewhere: finetune.name=..., in Python run_dir=..."
    if "model" in differing:
        raise FinetuneError(f"{where} was trained from another plan or other weights; {anew}")
    if differing:
        changes = ", ".join(f"{key} {found.get(key)!r}, not {expected.get(key)!r}" for key in differing)
        raise FinetuneError(f"{where} was made with {changes}; give the same; {anew}")


def scored(model: nn.Module, score: Score, name: str, autocast: torch.dtype | None) -> float:
    """In evaluation mode. Raises FinetuneError for whatever keeps the model from being scored."""
    model.eval()
    try:
        with precision(model, autocast):
            return checked_score(score(model), name)
    except (TypeError, ValueError) as error:
        raise FinetuneError(f"the model cannot be scored: {error}") from error


def trained_norms(model: nn.Module) -> list[nn.modules.batchnorm._BatchNorm]:
    """BatchNorm layers whose statistics move in training: models may keep some as they are."""
    with evaluating(model):  # which puts every module back into its own mode
        model.train()
        return [layer for layer in batch_norms(model) if layer.training]


def memory_format(model: nn.Module) -> torch.memory_format:
    """Channels last for images: in bfloat16 convolutions are faster so, on CPUs and on GPUs. Volumes cannot."""
    is_image_model = any(isinstance(module, nn.Conv2d) for module in model.modules())
    has_volumes = any(parameter.dim() == 5 for parameter in model.parameters())
    return torch.channels_last if is_image_model and not has_volumes else torch.preserve_format


def batch_on(batch: Any, device: torch.device, format: torch.memory_format) -> Any:
    """The tensors of ``batch`` on ``device``, images in ``format``."""

    def formatted(leaf: Any) -> Any:
        is_image = isinstance(leaf, torch.Tensor) and leaf.dim() == 4
        return leaf.to(memory_format=format) if is_image else leaf

    return tree_map(formatted, moved(batch, device))


@torch.no_grad()
def _fill(model: nn.Module, tensors: dict[str, torch.Tensor]) -> None:
    for name, tensor in tensors_of(model).items():
        tensor.copy_(tensors[name])
