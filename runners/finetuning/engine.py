"""Fine-tuning as a whole: checks, training, and the saved model."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ...search.candidates import Score
from ...search.engine import weights_digest
from ...search.files import METRICS, PLAN, WEIGHTS, read_json, write_json
from ...search.saved import load, save_model
from ...spaces import Plan
from ...spaces.calibration import Calibration, inputs_of
from ...spaces.copying import copy_model
from ...spaces.devices import device_of
from ...spaces.errors import ConfigError, FinetuneError, PrunefrontError, StorageError
from ...spaces.inputs import Inputs, argument_names
from ...spaces.trace import evaluating
from ..counting import counted
from . import randomness
from .distillation import Loss, Objective
from .domains import make_loading
from .loop import (
    NORM_SAMPLES,
    Data,
    Loop,
    Progress,
    Training,
    batch_on,
    check_identity,
    memory_format,
    scored,
    trained_norms,
)
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
    arguments = 1 if example_inputs is None else max(1, len(Inputs.of(example_inputs).args))
    names = argument_names(model)
    with randomness.undisturbed(device), _explained():
        first = _first_sample(epochs, recipe.seed, arguments).only(names)
        inputs = first if example_inputs is None else Inputs.of(example_inputs)
        known = {**_costs(model, inputs, metrics or {}), **(metrics or {})}
        identity = _identity(model, recipe, _batches(epochs, recipe), teacher)
        if directory is not None and not restart and (directory / METRICS).exists():
            return _finished(directory, identity, model, {"score": score, "test": test}, autocast)
        calibration = None
        if trained_norms(model):
            batches = _some_batches(epochs, recipe.seed, arguments)
            placed = [batch_on(batch, device, memory_format(model)) for batch in batches]
            calibration = Calibration(placed, arguments, autocast=autocast, names=names)
        loading = make_loading(training, recipe.domains, loss, teacher, recipe.autocast, recipe.seed)
        data = Data(epochs, identity["batches"], calibration, score, autocast, loading, arguments, names)
        trained = copy_model(model).to(memory_format=memory_format(model))
        penalty = None
        if recipe.sparsity:
            penalty = make_penalty(trained, recipe.sparsity_kind, recipe.sparsity, first)
        if directory is not None:
            _make_room(directory, restart)
        checkpoint = None if directory is None else checkpoint_of(directory)
        objective = Objective(trained, loss, recipe, teacher if recipe.distill else None)
        loop = Loop(trained, recipe, data, objective, checkpoint, identity, callbacks, penalty)
        loop.resume()
        with objective:
            result = loop.run()
    found = _metrics(loop, known)
    if test is not None:
        found |= _tested(result, test, autocast)
    if directory is not None:
        save_model(directory, result, plan, {**found, "identity": identity}, inputs)
        checkpoint_of(directory).unlink(missing_ok=True)
    return Finetuned(result, found, directory)


def checkpoint_of(directory: Path) -> Path:
    """Beside the folder, which is written as a whole in the end."""
    return directory.with_name(f"{directory.name}.checkpoint.safetensors")


def _make_room(directory: Path, restart: bool) -> None:
    """So that a folder that cannot be written is told before hours of training. What is not ours stays in it.

    Raises:
        StorageError: it cannot be written.
    """
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        if directory.is_file():
            raise NotADirectoryError(f"{directory} is a file")
        if restart:
            for path in (directory / METRICS, directory / PLAN, directory / WEIGHTS, checkpoint_of(directory)):
                path.unlink(missing_ok=True)
    except OSError as error:
        raise StorageError(f"cannot write {directory}: {error}") from error


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


def _identity(model: nn.Module, recipe: Recipe, batches: int, teacher: nn.Module | None) -> dict[str, Any]:
    """What must be the same for training to go on."""
    values = {key: value for key, value in recipe.to_json().items() if key not in FREE}
    for part in ("distill", "domains"):
        values |= {f"{part}.{key}": value for key, value in values.pop(part).items()}
    named = {f"finetune.{key}": value for key, value in values.items()}
    taught = None if teacher is None else weights_digest(teacher)
    return {"model": weights_digest(model), "batches": batches, "teacher": taught, **named}


def _batches(epochs: Training, recipe: Recipe) -> int:
    """Of an epoch; those of a loader that does not know are counted, no further than training goes."""
    epoch = epochs(randomness.seed_of(recipe.seed, 0))
    try:
        count = len(epoch)  # type: ignore[arg-type]
    except TypeError:
        count = sum(1 for _ in itertools.islice(epoch, recipe.steps))
    if not count:
        raise FinetuneError("the training data gives no batches; expected a loader that can be read once an epoch")
    return count


def _first_sample(epochs: Training, seed: int, arguments: int) -> Inputs:
    randomness.seed_all(seed, 0)
    batch = next(iter(epochs(randomness.seed_of(seed, 0))), None)
    if batch is None:
        raise FinetuneError("the training data gives no batches; expected a loader that can be read once an epoch")
    inputs = inputs_of(batch, arguments)
    samples = _samples(inputs)

    def first(leaf: Any) -> Any:
        is_by_sample = isinstance(leaf, torch.Tensor) and leaf.dim() and len(leaf) == samples
        return leaf[:1] if is_by_sample else leaf

    return inputs.map(first)


def _samples(inputs: Inputs) -> int:
    """Rows of the first tensor that has rows."""
    return next((len(tensor) for tensor in inputs.tensors() if tensor.dim()), 1)


def _some_batches(epochs: Training, seed: int, arguments: int) -> list[Any]:
    """Enough for BatchNorm's statistics, as far as they are no more than ``MAX_BYTES``."""
    randomness.seed_all(seed, 0)
    found: list[Any] = []
    samples, size = 0, 0
    for batch in epochs(randomness.seed_of(seed, 0)):
        found.append(batch)
        inputs = inputs_of(batch, arguments)
        samples += _samples(inputs)
        size += sum(tensor.nbytes for tensor in inputs.tensors())
        if samples >= NORM_SAMPLES or size >= MAX_BYTES:
            break
    return found


def _costs(model: nn.Module, inputs: Inputs, known: Mapping[str, Any]) -> dict[str, Any]:
    """What is not known of them. Raises FinetuneError where the model rejects ``inputs``."""
    placed = inputs.to(device_of(model))
    with evaluating(model), torch.no_grad():
        placed.call_or_raise(model, FinetuneError, "its example inputs", "Pass example_inputs=, as for discover()")
        return {} if {"params", "macs"} <= known.keys() else counted(model, placed)[1]


def _metrics(loop: Loop, known: Mapping[str, Any]) -> dict[str, Any]:
    before = {f"{key}_before": known[key] for key in ("score", "test") if key in known}
    found = {**{key: value for key, value in known.items() if key not in ("score", "test")}, **before}
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


def _finished(
    directory: Path,
    identity: Mapping[str, Any],
    model: nn.Module,
    scores: Mapping[str, Score | None],
    autocast: torch.dtype | None,
) -> Finetuned:
    """What is saved there; ``scores`` that were not known when it was are added."""
    metrics = read_json(directory / METRICS)
    check_identity(directory, metrics.get("identity", {}), dict(identity))
    logger.warning("%s is finished already; nothing is trained", directory)
    found = load(directory, model).to(device_of(model))
    missing = {name: score for name, score in scores.items() if score is not None and name not in metrics}
    if missing:
        metrics |= {name: scored(found, score, name, autocast) for name, score in missing.items()}
        write_json(directory / METRICS, metrics)
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
        advice = "; give the loader drop_last=True" if "more than 1 value per channel" in str(error) else ""
        raise FinetuneError(f"training fails with {type(error).__name__}: {error}{advice}") from error


def _is_memory(error: Exception) -> bool:
    """torch has an error of its own on GPUs; its CPU allocator raises RuntimeError."""
    told = ("can't allocate memory", "not enough memory", "out of memory")
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and any(text in str(error).lower() for text in told)
    )
