"""Models of Hugging Face: from a checkpoint without pickles or code of its own, or from a configuration."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from ...spaces.errors import ConfigError
from ..finetuning import Recipe, finetune
from ..finetuning.distillation import Loss
from .batches import Batches
from .vocabulary import transformers

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
AUTOCAST = {"bfloat16": torch.bfloat16, "float16": torch.float16}


def check_source(model: str | None, config: Mapping[str, Any] | None) -> None:
    """Raises ConfigError unless one of both is given."""
    if (model is None) == (not config):
        raise ConfigError(
            "set either task.model, the folder of a checkpoint, or task.config.model_type=llama and what else the "
            "configuration needs (task.config.hidden_size=256 ...) to train a model on the spot"
        )


def config_for(model: str | None, config: Mapping[str, Any] | None, **implied: Any) -> Any:
    """The configuration of the checkpoint ``model``, or a new one of ``config["model_type"]`` with other values.

    ``implied`` are set too where the user has given none of them, under no name; only for new models.

    Raises:
        ConfigError: a model type or key does not exist.
    """
    config = dict(config or {})
    library = transformers()
    if model is not None:
        try:
            return library.AutoConfig.from_pretrained(model, trust_remote_code=False)
        except (OSError, ValueError) as error:
            raise ConfigError(f"task.model={model} is no checkpoint that can be read: {error}") from error
    kind = str(config.pop("model_type", ""))
    if kind not in library.CONFIG_MAPPING:
        raise ConfigError(f"task.config.model_type={kind!r} is unknown to transformers; examples are llama, gpt2, bert")
    plain = library.AutoConfig.for_model(kind)
    if unknown := [key for key in config if not hasattr(plain, key)]:
        raise ConfigError(f"the configuration of {kind} has no {', '.join(unknown)}; it has {_keys(plain)}")
    names = plain.attribute_map
    given = {names.get(key, key) for key in config}
    added = {k: v for k, v in implied.items() if hasattr(plain, k) and names.get(k, k) not in given}
    return library.AutoConfig.for_model(kind, **added | config)


def sized_config(
    auto: str, model: str | None, config: Mapping[str, Any] | None, vocab_size: int, length: int, **implied: Any
) -> Any:
    """As :func:`config_for`; a new model gets room for ``vocab_size`` tokens and texts of ``length``; others must have
    it.

    Raises:
        ConfigError: the model knows fewer tokens or has fewer positions, or a model type or key does not exist.
    """
    implied["vocab_size"] = vocab_size
    before = positions_before_text(auto, config_for(model, config, **implied))
    found = config_for(model, config, **implied, max_position_embeddings=length + before)
    check_vocabulary(found, vocab_size)
    check_length(found, length, before)
    return found


def positions_before_text(auto: str, config: Any) -> int:
    """Positions that no token takes: RoBERTa and its kin count from behind the padding id on."""
    try:
        with torch.device("meta"):
            model = getattr(transformers(), auto).from_config(copy.deepcopy(config), trust_remote_code=False)
    except Exception:  # what a model's class refuses is told when it is made
        return 0
    tables = (table for name, table in model.named_modules() if name.endswith("position_embeddings"))
    return max(
        (table.padding_idx + 1 for table in tables if getattr(table, "padding_idx", None) is not None), default=0
    )


def set_padding(config: Any, padding: int) -> int:
    """The id that fills up short texts: that of the configuration, else ``padding``, which is written into it.

    Models that read whole texts look there for the last token of a text.
    """
    inner = config.get_text_config()
    own = getattr(inner, "pad_token_id", None)
    if type(own) is int and 0 <= own < inner.vocab_size:
        return own
    config.pad_token_id = inner.pad_token_id = padding
    return padding


def make(auto: str, model: str | None, config: Any, dtype: str, seed: int) -> nn.Module:
    """A model of transformers' class ``auto``, in evaluation mode; a new one has weights drawn from ``seed``.

    Raises:
        ConfigError: the checkpoint has no safetensors, or no weights for such a model.
    """
    cls = getattr(transformers(), auto)
    try:
        if model is None:
            with torch.random.fork_rng():
                torch.manual_seed(seed)
                return cls.from_config(config, dtype=DTYPES[dtype], trust_remote_code=False).eval()
        loaded: nn.Module
        loaded, report = cls.from_pretrained(
            model,
            config=config,
            dtype=DTYPES[dtype],
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except (AssertionError, OSError, ValueError) as error:
        raise ConfigError(
            f"{model or config.model_type} cannot be loaded by {auto} (weights must be safetensors, and need no code "
            f"of their own): {error}"
        ) from error
    if missing := sorted(report["missing_keys"]):
        raise ConfigError(f"the checkpoint {model} has no weights for {', '.join(missing[:3])} of a {auto[4:]} model")
    return loaded.eval()


def make_trained(
    make: Callable[[], nn.Module], training: Batches | None, loss: Loss, epochs: float, lr: float, seed: int
) -> nn.Module:
    """What ``make`` makes, trained for ``epochs``: AdamW, a warm-up, a cosine, and clipped gradients."""
    made = make()
    if training is None or not epochs:
        return made
    recipe = Recipe("adamw", lr, weight_decay=0.1, epochs=epochs, final_lr=0.1, clip_norm=1.0, seed=seed)
    return finetune(made, training=training, loss=loss, recipe=recipe).model


def checked(name: str, value: Any, choices: Mapping[str, Any]) -> Any:
    """What ``value`` stands for. Raises ConfigError."""
    if value not in choices:
        raise ConfigError(f"task.{name} must be one of {', '.join(map(str, choices))}, not {value!r}")
    return choices[value]


def check_precision(dtype: str, autocast: str | None) -> None:
    """Raises ConfigError."""
    checked("dtype", dtype, DTYPES)
    if autocast is not None:
        checked("autocast", autocast, AUTOCAST)


def at_least(least: int, **values: int | None) -> None:
    """Raises ConfigError for a value that is smaller."""
    for name, value in values.items():
        if value is not None and value < least:
            raise ConfigError(f"task.{name} must be at least {least}, not {value}")


def takes(auto: str, config: Any, argument: str) -> bool:
    """Whether the forward of the model that ``auto`` makes of ``config`` has ``argument``."""
    cls = getattr(transformers(), auto)._model_mapping[type(config)]
    cls = cls[0] if isinstance(cls, tuple) else cls
    return argument in inspect.signature(cls.forward).parameters


def check_vocabulary(config: Any, size: int) -> None:
    """Raises ConfigError if there are more tokens than the model knows."""
    known = config.get_text_config().vocab_size
    if size > known:
        raise ConfigError(
            f"the tokenizer has {size} tokens and the model's vocabulary {known}: they do not belong together; "
            "set task.tokenizer to the model's own, or task.config.vocab_size"
        )


def check_length(config: Any, length: int, before: int = 0) -> None:
    """Raises ConfigError if the model has fewer positions than ``length``, and the ``before`` that no token takes."""
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    if type(positions) is int and length > positions - before:
        raise ConfigError(f"task.sequence_length={length} is longer than the model's {positions - before} positions")


def _keys(config: Any) -> str:
    return ", ".join(sorted(key for key in config.to_dict() if not key.startswith("_")))
