"""Fine-tuning as a whole: checks, training, and the saved model."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ...search.candidates import Score
from ...search.engine import weights_digest
from ...search.files import METRICS, read_json
from ...search.saved import load, save_model
from ...spaces import Plan
from ...spaces.calibration import Calibration, batch_norms, inputs_of
from ...spaces.copying import copy_model
from ...spaces.devices import device_of
from ...spaces.errors import ConfigError, FinetuneError, PrunefrontError
from ...spaces.inputs import Inputs
from ..counting import counted
from . import randomness
from .distillation import Loss, Objective
from .domains import make_loading
from .loop import NORM_SAMPLES, Data, Loop, Progress, Training, batch_on, check_identity, memory_format, scored
from .recipe import Recipe
from .sparsity import make_penalty

logger = logging.getLogger(__name__)

#: Changing these of a recipe changes nothing in the result.
FREE = ("checkpoint_min",)
#: Batches for BatchNorm's statistics are kept in memory.
MAX_BYTES = 2**29


@dataclass(frozen=True)
class Finetuned:
    """``model``: in evaluation mode. ``metrics``: score, test, costs, the loss curve, evaluations, seconds, recipe."""

    model: nn.Module
    metrics: Mapping[str, Any]
    #: Folder of the saved model, for :func:`prunefront.load`.
    path: Path | None


def finetune(
    model: nn.Module,
    *,
    training: Iterable[Any] | Training,
    loss: Loss | None = None,
    score: Score | None = None,
    test: Score | None = None,
    recipe: Recipe | None = None,
    teacher: nn.Module | None = None,
    autocast: torch.dtype | None = None,
    example_inputs: Any = None,
    plan: Plan | None = None,
    metrics: Mapping[str, Any] | None = None,
    run_dir: str | Path | None = None,
    restart: bool = False,
    callbacks: Sequence[Callable[[Progress], None]] = (),
) -> Finetuned:
    """Train a copy of ``model`` on, with or without a teacher, and save it in ``run_dir``.

    ``training``: a loader, which is read once an epoch, or a function of a seed that gives the batches of one epoch. A
    batch is a tensor, a mapping of keyword arguments, or a tuple or list that starts with the model's input.
    ``loss``: a function of an output and a batch; Hugging Face models bring their own. ``score`` is called during
    training, on data that is neither training nor test data, ``test`` once in the end; both get the model in
    evaluation mode, in precision ``autocast``. ``teacher``: the dense model, for ``recipe.distill`` and
    ``recipe.domains``.
    ``example_inputs`` of the saved model are by default the first sample of ``training``; ``plan`` and ``metrics``
    (costs, what is known already) are written down with it. ``callbacks`` are called with a :class:`Progress`.

    BatchNorm is recalibrated on training batches before every score.

    The same call with the same ``run_dir`` goes on where a killed one has written its last checkpoint, and returns
    what a finished one has saved; with ``restart`` it trains anew.

    Raises:
        ConfigError: arguments do not go together.
        FinetuneError: the loss is no longer finite, memory is not enough, ``run_dir`` belongs to another model or
            recipe.
        StorageError: ``run_dir`` cannot be written or is damaged.
    """
    recipe = recipe or Recipe()
    _check(training, model, recipe, score, teacher)
    epochs = training if callable(training) else lambda seed: training
    directory = None if run_dir is None else Path(run_dir)
    device = device_of(model)
    if directory is not None and restart:
        checkpoint_of(directory).unlink(missing_ok=True)
        shutil.rmtree(directory, ignore_errors=True)
    with randomness.undisturbed(device), _explained():
        first = _first_sample(epochs, recipe.seed)
        identity = _identity(model, recipe, _batches(epochs, recipe.seed))
        if directory is not None and (directory / METRICS).exists():
            return _finished(directory, identity, model)
        calibration = None
        if batch_norms(model):
            batches = [batch_on(batch, device, memory_format(model)) for batch in _some_batches(epochs, recipe.seed)]
            calibration = Calibration(batches, autocast=autocast)
        loading = make_loading(training, recipe.domains, loss, teacher, recipe.autocast, recipe.seed)
        data = Data(epochs, identity["batches"], calibration, score, autocast, loading)
        trained = copy_model(model).to(memory_format=memory_format(model))
        penalty = None
        if recipe.sparsity:
            penalty = make_penalty(trained, recipe.sparsity_kind, recipe.sparsity, first)
        with Objective(trained, loss, recipe, teacher if recipe.distill else None) as objective:
            checkpoint = None if directory is None else checkpoint_of(directory)
            loop = Loop(trained, recipe, data, objective, checkpoint, identity, callbacks, penalty)
            loop.resume()
            result = loop.run()
    inputs = first if example_inputs is None else Inputs.of(example_inputs)
    found = _metrics(result, loop, inputs, metrics or {})
    if test is not None:
        found |= _tested(result, test, autocast)
    if directory is not None:
        save_model(directory, result, plan, {**found, "identity": identity}, inputs)
        checkpoint_of(directory).unlink(missing_ok=True)
    return Finetuned(result, found, directory)


def checkpoint_of(directory: Path) -> Path:
    """Beside the folder, which is written as a whole in the end."""
    return directory.with_name(f"{directory.name}.checkpoint.safetensors")


def _check(training: Any, model: nn.Module, recipe: Recipe, score: Score | None, teacher: nn.Module | None) -> None:
    if isinstance(training, Iterator):
        raise ConfigError(
            "training is a generator, which is empty after one epoch; pass a loader or a function of a seed"
        )
    parameters = list(model.parameters())
    if not any(parameter.requires_grad for parameter in parameters):
        raise ConfigError("the model has no parameter that requires gradients; there is nothing to train")
    if recipe.patience is not None and score is None:
        raise ConfigError("finetune.patience stops by the score, and there is no score=")
    if recipe.distill and teacher is None:
        raise ConfigError("finetune.distill learns from a teacher; pass teacher=, the dense model")
    if teacher is not None and not recipe.needs_dense:
        raise ConfigError("there is a teacher and nothing to learn from it; set finetune.distill.weight=0.5")
    if teacher is model:
        raise ConfigError("the teacher is the model itself; pass the dense model")
    if torch.is_autocast_enabled(parameters[0].device.type):
        raise ConfigError(
            "fine-tuning inside an autocast context would run on old weights, which the context keeps; leave it, "
            "recipe.precision sets the precision"
        )


def _identity(model: nn.Module, recipe: Recipe, batches: int) -> dict[str, Any]:
    """What must be the same for training to go on."""
    values = {key: value for key, value in recipe.to_json().items() if key not in FREE}
    for part in ("distill", "domains"):
        values |= {f"{part}.{key}": value for key, value in values.pop(part).items()}
    named = {f"finetune.{key}": value for key, value in values.items()}
    return {"model": weights_digest(model), "batches": batches, **named}


def _batches(epochs: Training, seed: int) -> int:
    """Of an epoch; those of a loader that does not know are counted."""
    epoch = epochs(randomness.seed_of(seed, 0))
    try:
        count = len(epoch)  # type: ignore[arg-type]
    except TypeError:
        count = sum(1 for _ in epoch)
    if not count:
        raise FinetuneError("the training data gives no batches; expected a loader that can be read once an epoch")
    return count


def _first_sample(epochs: Training, seed: int) -> Inputs:
    randomness.seed_all(seed, 0)
    batch = next(iter(epochs(randomness.seed_of(seed, 0))), None)
    if batch is None:
        raise FinetuneError("the training data gives no batches; expected a loader that can be read once an epoch")
    return inputs_of(batch).map(lambda leaf: leaf[:1] if isinstance(leaf, torch.Tensor) and leaf.dim() else leaf)


def _some_batches(epochs: Training, seed: int) -> list[Any]:
    """Enough for BatchNorm's statistics, as far as they are no more than ``MAX_BYTES``."""
    randomness.seed_all(seed, 0)
    found: list[Any] = []
    samples, size = 0, 0
    for batch in epochs(randomness.seed_of(seed, 0)):
        found.append(batch)
        tensors = inputs_of(batch).tensors()
        samples += len(tensors[0])
        size += sum(tensor.nbytes for tensor in tensors)
        if samples >= NORM_SAMPLES or size >= MAX_BYTES:
            break
    return found


def _metrics(model: nn.Module, loop: Loop, inputs: Inputs, known: Mapping[str, Any]) -> dict[str, Any]:
    costs = {} if {"params", "macs"} <= known.keys() else counted(model, inputs.to(device_of(model)))[1]
    before = {f"{key}_before": known[key] for key in ("score", "test") if key in known}
    found = {**costs, **{key: value for key, value in known.items() if key not in ("score", "test")}, **before}
    if loop.evaluations:
        scores = [evaluation["score"] for evaluation in loop.evaluations]
        found["score"] = max(scores) if loop.best else scores[-1]
    return {
        **found,
        "steps": loop.step,
        "seconds": loop.seconds,
        "curve": loop.curve,
        "evaluations": loop.evaluations,
        **({} if loop.data.loading is None else {"domains": loop.data.loading.state()}),
        "recipe": loop.recipe.to_json(),
    }


def _finished(directory: Path, identity: Mapping[str, Any], model: nn.Module) -> Finetuned:
    metrics = read_json(directory / METRICS)
    check_identity(directory, metrics.get("identity", {}), dict(identity))
    logger.warning("%s is finished already; nothing is trained", directory)
    found = load(directory, model).to(device_of(model))
    return Finetuned(found, {key: value for key, value in metrics.items() if key != "identity"}, directory)


def _tested(model: nn.Module, test: Score, autocast: torch.dtype | None) -> dict[str, float]:
    """A failing test function must not cost the user what was trained."""
    try:
        return {"test": scored(model, test, "test", autocast)}
    except Exception as error:
        logger.warning("no test score: %s: %s", type(error).__name__, error)
        return {}


@contextmanager
def _explained() -> Iterator[None]:
    """Errors of the user's model, data and machine as ones that say what to do."""
    try:
        yield
    except PrunefrontError:
        raise
    except Exception as error:
        if _is_memory(error):
            raise FinetuneError(
                f"memory is not enough to train ({str(error).splitlines()[0]}); lower the batch size (task.batch_size, "
                "or that of your loader), keep finetune.precision=bfloat16, or do without finetune.ema and distillation"
            ) from error
        raise FinetuneError(f"training fails with {type(error).__name__}: {error}") from error


def _is_memory(error: Exception) -> bool:
    """torch has an error of its own on GPUs; its CPU allocator raises RuntimeError."""
    told = ("can't allocate memory", "not enough memory", "out of memory")
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and any(text in str(error).lower() for text in told)
    )
