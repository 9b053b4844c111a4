"""Inputs like those that a saved model was made for."""

from __future__ import annotations

import ast
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ...search.files import read_plan
from ...spaces.errors import StorageError
from ...spaces.inputs import Inputs

#: Inputs that say which positions are there; all are.
MASK, ATTENTION_MASK = "mask", "attention_mask"


def stored_inputs(folder: Path, batch_size: int | None = None) -> Inputs:
    """Random inputs of the shapes that stand in ``plan.json``, the same every time; ``batch_size`` takes the place of
    the first dimension of all tensors that share that of the first one.

    Whole numbers vary up to the largest one that the example had: with one token everywhere no attention is seen.
    Masks, and what has no number above one, are filled with the largest.

    Raises:
        StorageError: an input is described that cannot be made.
    """
    content = read_plan(folder)
    positional, named = content["inputs"], content.get("keyword_inputs", {})
    shapes = [
        entry["shape"] for entry in (*positional, *named.values()) if isinstance(entry, dict) and entry.get("shape")
    ]
    batch = shapes[0][0] if shapes else None
    generator = torch.Generator().manual_seed(0)

    def made(entry: Any, name: str = "") -> Any:
        if not isinstance(entry, dict):
            return _value(entry, folder)
        shape = list(entry["shape"])
        if batch_size is not None and shape and shape[0] == batch:
            shape[0] = batch_size
        return _tensor(entry, shape, name, generator, folder)

    return Inputs(
        tuple(made(entry) for entry in positional), {name: made(entry, name) for name, entry in named.items()}
    )


def _value(described: str, folder: Path) -> Any:
    try:
        return ast.literal_eval(described)
    except (ValueError, SyntaxError) as error:
        raise StorageError(f"the model in {folder} was made for an input that is no tensor ({described})") from error


def _tensor(
    described: Mapping[str, Any], shape: Sequence[int], name: str, generator: torch.Generator, folder: Path
) -> torch.Tensor:
    dtype = getattr(torch, str(described.get("dtype")), None)
    if not isinstance(dtype, torch.dtype):
        raise StorageError(f"the inputs in {folder} are damaged: {described}")
    if dtype.is_floating_point or dtype.is_complex:
        return torch.randn(shape, dtype=dtype, generator=generator)
    largest = max(0, described.get("largest", 0))  # of folders of before it is not known; zero is valid in any model
    if largest > 1 and MASK not in name:
        return torch.randint(largest + 1, shape, generator=generator).to(dtype)
    # True hides a position in torch's own layers, and shows it in those of transformers.
    hides = dtype == torch.bool and not name.endswith(ATTENTION_MASK)
    return torch.full(shape, 0 if hides else largest, dtype=dtype)
