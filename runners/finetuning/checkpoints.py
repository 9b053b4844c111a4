"""Checkpoints: one safetensors file each, with numbers as JSON in its header; no pickle.

One file is replaced at once: a process that is killed while it writes leaves the checkpoint of before.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ...spaces.errors import StorageError

FORMAT = 1


def save_checkpoint(path: Path, tensors: Mapping[str, torch.Tensor], numbers: Mapping[str, Any]) -> None:
    """Raises StorageError if it cannot be written; the checkpoint of before is then still there."""
    temporary = path.with_name(f".{path.name}.tmp")
    # Clones: parameters of a candidate may lie in one allocation, and safetensors refuses that.
    stored = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(stored, temporary, {"numbers": json.dumps({"format": FORMAT, **numbers})})
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    except (OSError, SafetensorError) as error:
        temporary.unlink(missing_ok=True)
        raise StorageError(f"cannot write the checkpoint {path}: {error}") from error


def load_checkpoint(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Raises StorageError if the file is damaged."""
    try:
        with safe_open(path, "pt") as file:
            numbers = json.loads((file.metadata() or {})["numbers"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (no dictionary)
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise StorageError(f"the checkpoint {path} is damaged: {error}; restart=true starts anew") from error
    if not isinstance(numbers, dict) or numbers.get("format") != FORMAT:
        raise StorageError(f"the checkpoint {path} has another format than {FORMAT}; restart=true starts anew")
    return tensors, numbers
