"""Hugging Face models that classify whole texts, on texts and labels of the user."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from ...search.scores import SampleScore
from ...spaces.errors import ConfigError
from .base import Task
from .batches import Batches
from .huggingface import (
    AUTOCAST,
    at_least,
    check_precision,
    check_source,
    make,
    make_trained,
    set_padding,
    sized_config,
)
from .texts import paths_of, rows_of_dataset, same_files
from .vocabulary import Vocabulary, make_vocabulary

AUTO = "AutoModelForSequenceClassification"
#: Separators of tables by the ending of a file; other files hold a JSON object a line.
SEPARATORS = {".csv": ",", ".tsv": "\t"}


def hf_text_classification(
    model: str | None = None,
    config: Mapping[str, Any] | None = None,
    train: Any = None,
    search: Any = None,
    test: Any = None,
    held_out: float = 0.1,
    text_column: str = "text",
    label_column: str = "label",
    tokenizer: str | None = None,
    vocab_size: int = 2048,
    sequence_length: int = 128,
    batch_size: int = 32,
    calibration_texts: int = 512,
    epochs: float = 0.0,
    lr: float = 1e-3,
    dtype: str = "float32",
    autocast: str | None = None,
    seed: int = 0,
) -> Task:
    """``model``: a checkpoint; or ``config``: a model type and other values of its configuration, with random weights
    that are trained for ``epochs``. ``train``, ``search`` and ``test`` are tables with a text and a label a row (CSV,
    TSV or JSON lines with names of columns, or a data set). Without ``search``, ``held_out`` of the training rows, at
    random, are it. Texts are cut to ``sequence_length`` tokens and filled up to the longest of their batch.

    Raises:
        ConfigError: parts are missing or do not go together.
    """
    at_least(1, batch_size=batch_size, calibration_texts=calibration_texts, vocab_size=vocab_size)
    at_least(2, sequence_length=sequence_length)
    check_precision(dtype, autocast)
    check_source(model, config)
    sources = {"train": train, "search": search, "test": test}
    same_files(sources)
    tables = {
        split: read_table(source, split, text_column, label_column)
        for split, source in sources.items()
        if source or split == "train"
    }
    labels = sorted(set(tables["train"].labels))
    if "search" not in tables:
        tables["train"], tables["search"] = hold_out(tables["train"], held_out, seed)
    vocabulary = make_vocabulary(tokenizer, model, vocab_size, tables["train"].texts, whole_texts=True)
    implied = {"num_labels": len(labels), "pad_token_id": vocabulary.padding}
    found = sized_config(AUTO, model, config, vocabulary.size, sequence_length, **implied)
    padding = set_padding(found, vocabulary.padding)
    known = labels_of(found, labels)
    found.problem_type = "single_label_classification"
    data = {
        split: Texts(*encoded(table, vocabulary, known, sequence_length, split), batch_size, padding)
        for split, table in tables.items()
    }
    made = partial(make, AUTO, model, found, dtype, seed)
    calibration = data["train"].drawn(calibration_texts, seed)
    return Task(
        make_model=partial(make_trained, made, None if model else data["train"], classification_loss, epochs, lr, seed),
        example_inputs={k: v[:1] for k, v in calibration[0].items() if k != "labels"},
        calibration=calibration,
        loss=classification_loss,
        training=data["train"],
        score=SampleScore(data["search"].drawn(), is_right),
        test=SampleScore(data["test"].drawn(), is_right) if "test" in data else None,
        score_name="accuracy",
        autocast=None if autocast is None else AUTOCAST[autocast],
        trains=model is None,
    )


@dataclass(frozen=True)
class Table:
    texts: list[str]
    labels: list[str]

    def rows(self, chosen: Sequence[int]) -> Table:
        return Table([self.texts[i] for i in chosen], [self.labels[i] for i in chosen])


def read_table(source: Any, key: str, text_column: str, label_column: str) -> Table:
    """Texts and labels. Raises ConfigError if there are none."""
    if not source:
        raise ConfigError(
            f"task.{key} names no data; set task.{key}=texts.csv with columns {text_column}, {label_column}"
        )
    columns = text_column, label_column
    if isinstance(source, Mapping):
        texts, labels = rows_of_dataset(source, key, columns)
    else:
        rows = [row for path in paths_of(source, key) for row in read_rows(path, columns)]
        texts, labels = [row[0] for row in rows], [row[1] for row in rows]
    if not texts:
        raise ConfigError(f"task.{key} has no rows: {source}")
    return Table([str(text) for text in texts], [str(label) for label in labels])


def read_rows(path: Path, columns: tuple[str, str]) -> Iterator[tuple[Any, Any]]:
    """Text and label of every row of a table. Raises ConfigError for what is no such table."""
    csv.field_size_limit(sys.maxsize)  # texts may be longer than the 131,072 characters of a field that it allows
    with path.open(encoding="utf-8-sig", newline="") as file:  # spreadsheets begin a file with a mark
        separator = SEPARATORS.get(path.suffix)
        rows = csv.DictReader(file, delimiter=separator) if separator else map(json.loads, filter(str.strip, file))
        try:
            for number, row in enumerate(rows, 1):
                if missing := [column for column in columns if row.get(column) is None]:
                    raise ConfigError(
                        f"row {number} of {path} has no {' and no '.join(missing)}; it has {', '.join(map(str, row))}: "
                        "set task.text_column and task.label_column"
                    )
                yield row[columns[0]], row[columns[1]]
        except (ValueError, AttributeError, csv.Error) as error:
            raise ConfigError(f"{path} is no CSV (.csv), TSV (.tsv) or JSON lines (.jsonl) file: {error}") from error


def hold_out(table: Table, share: float, seed: int) -> tuple[Table, Table]:
    """All rows but ``share`` of them, and these. Raises ConfigError if one part is empty."""
    count = round(share * len(table.texts))
    if not 0 < count < len(table.texts):
        raise ConfigError(
            f"task.held_out={share:g} of {len(table.texts)} training rows leaves nothing; give more rows or task.search"
        )
    order = np.random.default_rng(seed).permutation(len(table.texts))
    return table.rows(np.sort(order[count:]).tolist()), table.rows(np.sort(order[:count]).tolist())


def labels_of(config: Any, labels: list[str]) -> dict[str, int]:
    """Classes by label: the names that the configuration has for its classes, in any case of letters, or their numbers.
    Where it has none, the sorted labels of the training data are written into it.

    Raises:
        ConfigError: the labels do not tell which class is which.
    """
    named = {str(name): int(index) for name, index in (config.label2id or {}).items()}
    known = {name.casefold(): index for name, index in named.items()} | named
    numbers = {str(index): index for index in range(config.num_labels)}
    for classes in (known, numbers):
        if all(class_of(label, classes) is not None for label in labels):
            return classes
    if named == {f"LABEL_{index}": index for index in numbers.values()} and len(labels) == config.num_labels:
        found = {label: index for index, label in enumerate(labels)}
        config.label2id, config.id2label = found, {index: label for label, index in found.items()}
        return found
    names = _some(sorted(named, key=named.__getitem__))
    raise ConfigError(
        f"the data has {len(labels)} labels ({_some(labels)}), and the model {config.num_labels} classes "
        f"({names}): which is which? Rename the labels in the data to the model's, or to the numbers of its "
        f"classes, 0 to {config.num_labels - 1}; for a new model, leave out what task.config says about labels"
    )


def class_of(label: str, classes: Mapping[str, int]) -> int | None:
    """That of the label, else of what differs from it in the case of letters alone; or None."""
    return classes.get(label, classes.get(label.casefold()))


def _some(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:5] + ["..."] * (len(names) > 5))


def encoded(
    table: Table, vocabulary: Vocabulary, known: Mapping[str, int], length: int, split: str
) -> tuple[list[list[int]], list[int]]:
    """Token ids of every text, cut to ``length``, and classes. Raises ConfigError for a label that is not known."""
    if unknown := sorted(label for label in set(table.labels) if class_of(label, known) is None):
        raise ConfigError(f"task.{split} has labels that training does not know: {_some(unknown)}")
    classes = [known[label] if label in known else known[label.casefold()] for label in table.labels]
    if vocabulary.start is None and vocabulary.tokenizer is not None:
        ids = vocabulary.tokenizer(table.texts, truncation=True, max_length=length)["input_ids"]
        return ids, classes
    first = [] if vocabulary.start is None else [vocabulary.start]
    return [[*first, *ids][:length] for ids in vocabulary.encode(table.texts)], classes


@dataclass(frozen=True)
class Texts(Batches):
    """Texts as padded batches ``input_ids, attention_mask (n, longest), labels (n,)``."""

    ids: list[list[int]]
    labels: list[int]
    batch_size: int
    pad: int

    @property
    def rows(self) -> int:
        return len(self.ids)

    def batch(self, chosen: Sequence[int]) -> dict[str, torch.Tensor]:
        rows = [self.ids[i] for i in chosen]
        longest = max(1, *map(len, rows))
        ids = torch.tensor([[*row, *[self.pad] * (longest - len(row))] for row in rows])
        mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
        return {"input_ids": ids, "attention_mask": mask, "labels": torch.tensor([self.labels[i] for i in chosen])}


def classification_loss(output: Any, batch: Mapping[str, Any]) -> torch.Tensor:
    return F.cross_entropy(output["logits"].float(), batch["labels"])


def is_right(output: Any, batch: Mapping[str, Any]) -> torch.Tensor:
    return output["logits"].argmax(-1) == batch["labels"]
