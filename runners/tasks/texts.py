"""Text by domain, from files or the library ``datasets``, as packed sequences of token ids."""

from __future__ import annotations

import glob
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ...spaces.errors import ConfigError
from .batches import Batches
from .vocabulary import Vocabulary

#: What a text is called where the user names no domain.
ONLY_DOMAIN = "text"
#: Sequences that tell the loss of a domain.
PROBED = 64
#: Keys of a source that is a data set of Hugging Face.
DATASET_KEYS = {"dataset", "config", "split", "column"}


def read_domains(source: Any, key: str) -> dict[str, str]:
    """Texts by domain. ``source``: a file, a pattern or a list of them, a data set (``{dataset: name, config: name,
    split: train, column: text}``), or a mapping from domains to such.

    Raises:
        ConfigError: nothing is given, or cannot be read.
    """
    if not source:
        raise ConfigError(
            f"task.{key} names no text; set task.{key}=file.txt, or a file for every domain: "
            f"task.{key}.web=web.txt task.{key}.books=books.txt"
        )
    if isinstance(source, Mapping) and "dataset" not in source:
        return {str(name): read_text(part, f"{key}.{name}") for name, part in source.items()}
    return {ONLY_DOMAIN: read_text(source, key)}


def read_text(source: Any, key: str) -> str:
    """One text. Raises ConfigError if it cannot be read, or is empty."""
    if isinstance(source, Mapping):
        text = "\n".join(rows_of_dataset(source, key, [str(source.get("column") or "text")])[0])
    elif isinstance(source, str | list | tuple):
        text = "".join(path.read_text(encoding="utf-8", errors="replace") for path in paths_of(source, key))
    else:
        raise ConfigError(f"task.{key} must be a file, a list of files or a data set, not {source!r}")
    if not text.strip():
        raise ConfigError(f"task.{key} has no text in it: {source}")
    return text


def paths_of(source: str | Sequence[Any], key: str) -> list[Path]:
    """The files that ``source`` names, in order. Raises ConfigError for what does not exist."""
    patterns = [source] if isinstance(source, str) else [str(part) for part in source]
    found = []
    for pattern in patterns:
        named = sorted(glob.glob(pattern, recursive=True)) if glob.has_magic(pattern) else [pattern]
        files = [Path(name) for name in named if Path(name).is_file()]
        if not files:
            raise ConfigError(f"task.{key}: there is no file {pattern}")
        found += files
    return found


def rows_of_dataset(source: Mapping[str, Any], key: str, columns: Sequence[str]) -> list[list[Any]]:
    """Columns of a data set of Hugging Face."""
    if unknown := source.keys() - DATASET_KEYS:
        raise ConfigError(f"task.{key}: a data set has {', '.join(sorted(DATASET_KEYS))}, not {', '.join(unknown)}")
    try:
        import datasets
    except ImportError as error:
        raise ConfigError(
            f"task.{key} is a data set of Hugging Face: pip install 'prunefront[datasets]', or give text files"
        ) from error
    try:
        rows = datasets.load_dataset(source["dataset"], source.get("config"), split=source.get("split") or "train")
        return [list(rows[column]) for column in columns]
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise ConfigError(f"task.{key}: the data set cannot be read: {type(error).__name__}: {error}") from error


def same_files(sources: Mapping[str, Any]) -> None:
    """Raises ConfigError if two splits read one file, or one split of one data set."""
    seen: dict[Any, str] = {}
    for split, source in sources.items():
        for item in _items(source, split):
            if item in seen and seen[item] != split:
                raise ConfigError(
                    f"task.{seen[item]} and task.{split} both read {item}: candidates are judged on other text than "
                    "they are trained on; give another file, or leave task.search out to hold out training text"
                )
            seen[item] = split


def _items(source: Any, key: str) -> list[Any]:
    if not source:
        return []
    if isinstance(source, Mapping) and "dataset" in source:
        return [f"{source['dataset']}/{source.get('config')}/{source.get('split') or 'train'}"]
    if isinstance(source, Mapping):
        return [item for part in source.values() for item in _items(part, key)]
    return [path.resolve() for path in paths_of(source, key)]


def packed(text: str, vocabulary: Vocabulary, length: int, domain: str) -> torch.Tensor:
    """The tokens of ``text`` in sequences ``(n, length)``, int32; what is left over at the end is dropped.

    Raises:
        ConfigError: there is not one sequence.
    """
    parts = [np.asarray(tokens, dtype=np.int32) for tokens in vocabulary.tokens(text)]
    tokens = torch.from_numpy(np.concatenate(parts)) if parts else torch.empty(0, dtype=torch.int32)
    if len(tokens) < length:
        raise ConfigError(
            f"the text of {domain} has {len(tokens)} tokens, and one sequence needs {length}; "
            "give more text or lower task.sequence_length"
        )
    return tokens[: len(tokens) // length * length].view(-1, length)


def hold_out(sequences: torch.Tensor, share: float, domain: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The first sequences and the last, which are ``share`` of all. Raises ConfigError if one part is empty."""
    count = round(share * len(sequences))
    if not 0 < count < len(sequences):
        raise ConfigError(
            f"{share:g} of the {len(sequences)} sequences of {domain} cannot be held out for the search; give more "
            "text, a shorter task.sequence_length, or a text of its own in task.search"
        )
    return sequences[:-count], sequences[-count:]


@dataclass(frozen=True)
class Packed(Batches):
    """Sequences by domain ``(n, length)`` as batches of keyword arguments; domains have their natural shares."""

    domains: Mapping[str, torch.Tensor]
    batch_size: int
    #: Arguments that every batch has besides ``input_ids``.
    extra: Mapping[str, Any]
    #: Other sequences by domain, for losses of domains; their first ``PROBED``.
    others: Mapping[str, torch.Tensor] = field(default_factory=dict)

    @property
    def rows(self) -> int:
        return sum(map(len, self.domains.values()))

    @cached_property
    def all(self) -> torch.Tensor:
        """The sequences of all domains, ``(rows, length)``; without a copy where there is one domain."""
        parts = list(self.domains.values())
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    @property
    def sizes(self) -> dict[str, int]:
        """Rows by domain."""
        return {name: len(sequences) for name, sequences in self.domains.items()}

    @property
    def probes(self) -> dict[str, list[dict[str, Any]]]:
        """Batches by domain that are not trained on."""
        return {
            name: [{"input_ids": part.long(), **self.extra} for part in sequences[:PROBED].split(self.batch_size)]
            for name, sequences in self.others.items()
        }

    def batch(self, chosen: Sequence[int]) -> dict[str, Any]:
        return {"input_ids": self.all[torch.as_tensor(chosen)].long(), **self.extra}
