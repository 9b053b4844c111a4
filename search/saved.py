"""Models on disk: ``plan.json``, ``weights.safetensors`` and ``metrics.json`` in one folder; no pickle."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from ..spaces import Plan
from ..spaces.copying import copy_model
from ..spaces.devices import CPU, device_of, moved
from ..spaces.errors import StorageError
from ..spaces.inputs import Inputs
from ..spaces.proof import outputs_of
from ..spaces.rebuild import describe, rebuild, refill
from ..spaces.surgery import tensors_of
from .files import FORMAT, METRICS, PLAN, WEIGHTS, digest, read_plan, resolve, write_json


def save_model(
    directory: Path, model: nn.Module, plan: Plan | None, metrics: Mapping[str, Any], example_inputs: Any
) -> None:
    """Write ``model`` to ``directory``, all of it or nothing. Files of before are replaced one by one, so that a kill
    leaves what :func:`load` refuses and the next session writes again; folders in it stay where they are.

    The model is rebuilt from its description and run on ``example_inputs``: if that does not give the same output, the
    reason is written down and :func:`load` asks for a dense model.

    Raises:
        StorageError: the folder cannot be written.
    """
    tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors_of(model).items()}
    structure = describe(model)
    inputs = Inputs.of(example_inputs)
    content: dict[str, Any] = {
        "format": FORMAT,
        "plan": None if plan is None else plan.to_json(),
        "widths": None if plan is None else plan.widths,
        "inputs": [_input(leaf) for leaf in inputs.args],
        "keyword_inputs": {name: _input(leaf) for name, leaf in (inputs.kwargs or {}).items()},
        "needs_dense_model": _why_not_alone(model, structure, tensors, inputs),
        "structure": structure,
    }
    temporary = directory.with_name(f".{directory.name}.{os.getpid()}.tmp")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        save_file(tensors, temporary / WEIGHTS)
        (temporary / WEIGHTS).chmod(temporary.stat().st_mode & 0o666)  # safetensors keeps it from all others
        content["weights_bytes"] = (temporary / WEIGHTS).stat().st_size
        content["weights_sha256"] = _file_digest(temporary / WEIGHTS)
        content["sha256"] = digest(content)
        write_json(temporary / PLAN, content)
        write_json(temporary / METRICS, dict(metrics))
        if directory.exists():
            for file in (WEIGHTS, PLAN, METRICS):
                (temporary / file).replace(directory / file)
            temporary.rmdir()
        else:
            temporary.replace(directory)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise StorageError(f"cannot write {directory}: {error}") from error


def load(path: str | Path, model: nn.Module | None = None) -> nn.Module:
    """The saved model in evaluation mode; of a run's folder, the picked one, or what was fine-tuned of it if that has
    the higher score.

    Nothing is unpickled, and nothing outside of torch, torchvision, timm and transformers is imported: import
    the module that defines your own class first. ``model``, the dense model (any weights), is needed only for models
    whose structure JSON cannot express; the error says so.

    Raises:
        StorageError: a file is missing or damaged, or the class is not available.
    """
    directory = resolve(Path(path))
    content, tensors = read_saved(directory)
    if model is not None:
        return refill(model, content["structure"], tensors)
    if content["needs_dense_model"]:
        raise StorageError(
            f"{directory} cannot be loaded alone ({content['needs_dense_model']}); pass load(path, model=dense_model)"
        )
    return rebuild(content["structure"], tensors)


def load_with(path: str | Path, dense: Callable[[], nn.Module]) -> nn.Module:
    """As :func:`load`; ``dense`` makes the dense model, asked only where JSON could not express the structure."""
    return load(path, dense() if read_plan(resolve(Path(path)))["needs_dense_model"] else None)


def read_saved(directory: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """The content of ``plan.json`` and the weights, checked. Raises StorageError."""
    content = read_plan(directory)
    return content, _read_weights(directory / WEIGHTS, content["weights_sha256"], content.get("weights_bytes"))


def _file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read_weights(path: Path, expected: str, size: int | None) -> dict[str, torch.Tensor]:
    """``size``: in bytes; files of before this was written down have none."""
    try:
        if size is not None and path.stat().st_size != size:  # before anything of it is read
            raise StorageError(
                f"{path} has {path.stat().st_size:,} bytes, not {size:,}: it is truncated or another file"
            )
        if _file_digest(path) != expected:
            raise StorageError(f"{path} is truncated or was changed after it was written: its checksum differs")
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise StorageError(f"cannot read {path}: {error}") from error


def _input(leaf: Any) -> Any:
    """Of whole numbers also the largest: what may stand there, such as token ids, follows from no shape."""
    if not isinstance(leaf, torch.Tensor):
        return repr(leaf)
    described = {"shape": list(leaf.shape), "dtype": str(leaf.dtype).removeprefix("torch.")}
    is_whole = not (leaf.is_floating_point() or leaf.is_complex())
    return described | ({"largest": int(leaf.long().max())} if is_whole and leaf.numel() and not leaf.is_meta else {})


def _why_not_alone(
    model: nn.Module, structure: dict[str, Any], tensors: dict[str, torch.Tensor], inputs: Inputs
) -> str:
    """Empty if the description alone gives the same function."""
    parts = f"without {', '.join(structure['left_out'][:3])}" if structure["left_out"] else "from its description"
    try:
        here, inputs = model, inputs.to(CPU)
        if device_of(model).type != CPU:  # where different kernels would round differently
            here, tensors = copy_model(model).to(CPU), moved(tensors, CPU)
        expected, actual = outputs_of(here, inputs), outputs_of(rebuild(structure, tensors), inputs)
    except Exception as error:  # whatever the user's forward raises when an attribute is missing
        return f"{parts}, it fails with {type(error).__name__}: {error}"
    same = len(expected) == len(actual) and all(
        a.shape == b.shape and torch.allclose(a, b, rtol=1e-3, atol=1e-5) for a, b in zip(expected, actual, strict=True)
    )
    return "" if same else f"{parts}, its output differs"
