"""Language models of Hugging Face that predict the next token, on text of the user."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch.nn import functional as F

from ...search.scores import SampleScore
from ...spaces.errors import ConfigError
from .base import Task
from .huggingface import (
    AUTOCAST,
    at_least,
    check_precision,
    check_source,
    checked,
    make,
    make_trained,
    sized_config,
    takes,
)
from .texts import Packed, hold_out, packed, read_domains, same_files
from .vocabulary import Vocabulary, make_vocabulary

AUTO = "AutoModelForCausalLM"


def hf_causal_lm(
    model: str | None = None,
    config: Mapping[str, Any] | None = None,
    train: Any = None,
    search: Any = None,
    test: Any = None,
    held_out: float = 0.1,
    tokenizer: str | None = None,
    vocab_size: int = 2048,
    sequence_length: int = 128,
    batch_size: int = 16,
    calibration_sequences: int = 128,
    search_sequences: int | None = None,
    test_sequences: int | None = None,
    score: str = "perplexity",
    epochs: float = 0.0,
    lr: float = 1e-3,
    dtype: str = "float32",
    autocast: str | None = None,
    seed: int = 0,
) -> Task:
    """``model``: a checkpoint; or ``config``: a model type and other values of its configuration, with random weights
    that are trained for ``epochs``. Texts are cut into sequences without gaps; see :func:`.texts.read_domains` for
    ``train``, ``search`` and ``test``. Without ``search`` the last ``held_out`` of every training text is it.

    ``score``: ``perplexity`` (negated), ``log_likelihood`` (of a token, the mean in nats) or ``accuracy`` (of the next
    token).

    Raises:
        ConfigError: parts are missing or do not go together.
    """
    at_least(1, batch_size=batch_size, calibration_sequences=calibration_sequences, vocab_size=vocab_size)
    at_least(1, search_sequences=search_sequences, test_sequences=test_sequences)
    at_least(2, sequence_length=sequence_length)
    check_precision(dtype, autocast)
    check_source(model, config)
    scores = checked("score", score, SCORES)
    same_files({"train": train, "search": search, "test": test})
    texts = read_domains(train, "train")
    vocabulary = make_vocabulary(tokenizer, model, vocab_size, texts.values())
    found = sized_config(AUTO, model, config, vocabulary.size, sequence_length, bos_token_id=None, eos_token_id=None)
    extra = {"use_cache": False} if takes(AUTO, found, "use_cache") else {}
    splits = sequences(texts, search, test, vocabulary, sequence_length, held_out)
    data = {name: Packed(domains, batch_size, extra, splits["search"]) for name, domains in splits.items()}
    made = partial(make, AUTO, model, found, dtype, seed)
    return Task(
        make_model=partial(make_trained, made, None if model else data["train"], next_token_loss, epochs, lr, seed),
        example_inputs=data["train"].batch([0]),
        calibration=data["train"].drawn(calibration_sequences, seed),
        loss=next_token_loss,
        training=data["train"],
        score=scores(data["search"].drawn(search_sequences, seed)),
        test=scores(data["test"].drawn(test_sequences, seed)) if "test" in data else None,
        score_name="-perplexity" if score == "perplexity" else score.replace("_", " "),
        autocast=None if autocast is None else AUTOCAST[autocast],
        trains=model is None,
    )


def sequences(
    texts: Mapping[str, str], search: Any, test: Any, vocabulary: Vocabulary, length: int, share: float
) -> dict[str, dict[str, torch.Tensor]]:
    """Packed sequences by split and domain."""
    train = {name: packed(text, vocabulary, length, f"task.train.{name}") for name, text in texts.items()}
    splits = {"train": train}
    given = {"search": search, "test": test} if search else {"test": test} if test else {}
    if not search:
        if not 0 < share < 1:
            raise ConfigError(f"task.held_out must be between 0 and 1, not {share}; or name a text in task.search")
        parts = {name: hold_out(whole, share, f"task.train.{name}") for name, whole in train.items()}
        splits = {"train": {name: first for name, (first, _) in parts.items()}}
        splits["search"] = {name: last for name, (_, last) in parts.items()}
    for split, source in given.items():
        if source:
            domains = read_domains(source, split)
            splits[split] = {n: packed(text, vocabulary, length, f"task.{split}.{n}") for n, text in domains.items()}
    return splits


def token_losses(output: Any, batch: Mapping[str, Any]) -> torch.Tensor:
    """Cross entropies of the tokens from the second on, ``(sequences, length - 1)``, in nats."""
    logits, targets = output["logits"][:, :-1].float(), batch["input_ids"][:, 1:]
    return F.cross_entropy(logits.transpose(1, 2), targets, reduction="none")


def next_token_loss(output: Any, batch: Mapping[str, Any]) -> torch.Tensor:
    return token_losses(output, batch).mean()


def log_likelihoods(output: Any, batch: Mapping[str, Any]) -> torch.Tensor:
    """Of every sequence, the mean of a token: ``(sequences,)``."""
    return -token_losses(output, batch).mean(1)


def accuracies(output: Any, batch: Mapping[str, Any]) -> torch.Tensor:
    """Of every sequence, the share of tokens that were the most likely: ``(sequences,)``."""
    right = output["logits"][:, :-1].argmax(-1) == batch["input_ids"][:, 1:]
    return right.float().mean(1)


def minus_perplexity(mean: float) -> float:
    """From a mean log-likelihood; far from any language it ends at the largest number."""
    return -math.exp(min(-mean, 700.0))


SCORES = {
    "perplexity": partial(SampleScore, value=log_likelihoods, of_mean=minus_perplexity),
    "log_likelihood": partial(SampleScore, value=log_likelihoods),
    "accuracy": partial(SampleScore, value=accuracies),
}
