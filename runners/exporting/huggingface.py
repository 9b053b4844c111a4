"""Pruned models as standard checkpoints of Hugging Face, which load without prunefront."""

from __future__ import annotations

import re
import shutil
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from ...spaces.copying import copy_model
from ...spaces.errors import ConfigError, StorageError
from ...spaces.huggingface import config_of, from_config
from ...spaces.inputs import Inputs
from ...spaces.proof import on_meta, outputs_of

#: Largest difference of the outputs, relative to the largest one.
TOLERANCE = 1e-4


def export_huggingface(
    model: nn.Module,
    directory: str | Path,
    example_inputs: Any,
    *,
    widths: Mapping[str, int] | None = None,
    tokenizer: Any = None,
) -> Path:
    """Write ``config.json`` and safetensors to ``directory``, and the ``tokenizer`` beside them, where there is one.

    The configuration says the widths and the depth of ``model``, a candidate of a space with ``uniform=True`` or what
    was trained from one. What was written is loaded by the transformers' ``AutoModel...`` for this class, and must
    give the outputs of ``model`` on ``example_inputs``. ``widths``: those of its plan by group (``plan.widths``, or
    ``"widths"`` of ``plan.json``), with which errors name groups instead of tensors.

    Raises:
        ConfigError: the model is none of transformers, or layers differ, which its configuration cannot say, or
            transformers refuses to save it.
        StorageError: the folder exists already or cannot be written, or what was written is another model.
    """
    directory = Path(directory)
    if config_of(model) is None:
        raise ConfigError(
            f"{type(model).__name__} is no model of transformers, so that there is no checkpoint format for it; "
            "prunefront.load reads it as it is"
        )
    if directory.exists():
        raise StorageError(f"{directory} exists already; name another folder")
    check_uniform(model, widths or {})
    temporary = directory.with_name(f".{directory.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        copied: Any = copy_model(model).cpu().eval()  # tensors with memory of their own: safetensors refuses others
        _save(copied, temporary)
        if tokenizer is not None:
            tokenizer.save_pretrained(temporary)
        _verify(copied, temporary, Inputs.of(example_inputs).to("cpu"))
        temporary.replace(directory)
    except OSError as error:
        raise StorageError(f"cannot write {directory}: {error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return directory


def _save(model: Any, folder: Path) -> None:
    """Raises ConfigError if transformers refuses, as it does for options of generating that contradict each other."""
    try:
        model.save_pretrained(folder)
    except ValueError as error:
        reason = " ".join(str(error).split())
        raise ConfigError(
            f"transformers does not save the model: {reason}. Correct that on the loaded model, such as "
            "model.generation_config.do_sample = True, and give it to export_huggingface"
        ) from error


def check_uniform(model: nn.Module, widths: Mapping[str, int]) -> None:
    """Raises ConfigError, with names, unless a new model of the configuration of ``model`` has its shapes."""
    meta = on_meta(model)
    try:
        fresh = from_config(meta)
        differing = list(_differences(meta, fresh))
    except Exception as error:  # whatever the model's class says about such sizes
        differing = [f"{type(error).__name__}: {error}"]
    if not differing:
        return
    groups = [
        f"{pattern} keeps {', '.join(map(str, found))}" for pattern, found in _layers(widths).items() if len(found) > 1
    ]
    told = "; ".join((groups or differing)[:5])
    raise ConfigError(
        f"a Hugging Face configuration has one width for all layers, and this model has several ({told}). "
        "Search with space=uniform, which finds models that it can express"
    )


def _differences(model: nn.Module, fresh: nn.Module) -> Iterator[str]:
    shapes = [{name: tuple(t.shape) for name, t in found.state_dict().items()} for found in (model, fresh)]
    for name in sorted(shapes[0] | shapes[1]):
        have, says = shapes[0].get(name), shapes[1].get(name)
        if have != says:
            yield f"{name} has {have}, its configuration says {says}"


def _layers(widths: Mapping[str, int]) -> dict[str, list[int]]:
    """Widths of the groups that have one name but for the numbers of layers."""
    found: dict[str, set[int]] = defaultdict(set)
    for name, width in widths.items():
        found[re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name)].add(width)
    return {pattern: sorted(values) for pattern, values in found.items()}


def _verify(model: nn.Module, folder: Path, inputs: Inputs) -> None:
    """Raises StorageError unless transformers loads from ``folder`` what ``model`` is."""
    loaded, report = auto_class(model).from_pretrained(folder, dtype=model.dtype, output_loading_info=True)
    if wrong := [*report["missing_keys"], *report["unexpected_keys"], *report["mismatched_keys"]]:
        raise StorageError(f"transformers does not load what was written: {', '.join(map(str, wrong[:3]))}")
    for expected, actual in zip(outputs_of(model, inputs), outputs_of(loaded.eval(), inputs), strict=True):
        scale = expected.abs().max().item()
        if expected.shape != actual.shape or not (expected - actual).abs().max().item() <= TOLERANCE * scale:
            raise StorageError("transformers loads another function than was written; the configuration cannot say it")


def auto_class(model: nn.Module) -> Any:
    """The class of transformers that chooses the class of ``model`` by its configuration."""
    import transformers

    for name in filter(lambda name: name.startswith("AutoModel"), sorted(dir(transformers))):
        auto = getattr(transformers, name)
        kinds = getattr(auto, "_model_mapping", {}).get(type(config_of(model)), ())
        if type(model) in (kinds if isinstance(kinds, tuple) else (kinds,)):
            return auto
    return type(model)
