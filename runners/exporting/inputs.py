"""Inputs like those that a saved model was made for."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import torch

from ...search.files import read_plan
from ...spaces.errors import StorageError
from ...spaces.inputs import Inputs


def stored_inputs(folder: Path, batch_size: int | None = None) -> Inputs:
    """Random inputs of the shapes that stand in ``plan.json``; ``batch_size`` takes the place of the first dimension of
    all tensors that share that of the first one.

    Raises:
        StorageError: an input is described that cannot be made.
    """
    content = read_plan(folder)
    described = [*content["inputs"], *content.get("keyword_inputs", {}).values()]
    shapes = [entry["shape"] for entry in described if isinstance(entry, dict) and entry.get("shape")]
    batch = shapes[0][0] if shapes else None

    def made(entry: Any) -> Any:
        return _made(entry, folder, batch if batch_size is not None else None, batch_size)

    arguments = tuple(made(entry) for entry in content["inputs"])
    return Inputs(arguments, {name: made(entry) for name, entry in content.get("keyword_inputs", {}).items()})


def _made(described: Any, folder: Path, batch: int | None, batch_size: int | None) -> Any:
    if not isinstance(described, dict):
        try:
            return ast.literal_eval(described)  # a plain value
        except (ValueError, SyntaxError) as error:
            raise StorageError(
                f"the model in {folder} was made for an input that is no tensor ({described})"
            ) from error
    dtype = getattr(torch, str(described.get("dtype")), None)
    if not isinstance(dtype, torch.dtype):
        raise StorageError(f"the inputs in {folder} are damaged: {described}")
    shape = list(described["shape"])
    if batch is not None and batch_size is not None and shape and shape[0] == batch:
        shape[0] = batch_size
    # Zero is a valid index, token or mask in any model; random numbers are not.
    return torch.randn(shape, dtype=dtype) if dtype.is_floating_point else torch.zeros(shape, dtype=dtype)
