"""The configuration of a Hugging Face model: it must say what the pruned model is, where it can."""

from __future__ import annotations

import contextlib
import copy
from typing import Any

import numpy as np
import torch
from torch import nn

from .devices import device_of
from .groups import Group, Kept, Structure

#: Configuration keys by the kinds of the groups whose widths multiply to them.
KEYS: dict[tuple[str, ...], tuple[str, ...]] = {
    ("hidden",): ("hidden_size", "n_embd", "d_model", "dim"),
    ("neuron",): ("intermediate_size", "n_inner", "d_ff", "hidden_dim", "encoder_ffn_dim", "decoder_ffn_dim"),
    ("kv_group", "head"): (
        *("num_attention_heads", "n_head", "num_heads", "n_heads"),
        *("encoder_attention_heads", "decoder_attention_heads"),
    ),
    ("kv_group",): ("num_key_value_heads",),
    ("head_dim",): ("head_dim", "d_kv"),
    ("expert",): ("num_local_experts", "num_experts"),
}
LAYER_KEYS: tuple[str, ...] = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_decoder_layers")
LAYER_KEYS += ("encoder_layers", "decoder_layers")


def config_of(model: nn.Module) -> Any:
    """The configuration of a Hugging Face model, or None."""
    config = getattr(model, "config", None)
    return config if hasattr(config, "model_type") and hasattr(config, "to_dict") else None


def from_config(model: nn.Module) -> nn.Module:
    """A new model of the same class and configuration, where the weights of ``model`` are: with or without numbers."""
    config = config_of(model)
    if config is None:
        return model
    with torch.device(device_of(model)):
        return type(model)(copy.deepcopy(config)).eval()


def follow_config(dense: nn.Module, candidate: nn.Module, structure: Structure, kept: Kept) -> None:
    """Set what the configuration of ``candidate`` says about widths and depth, where all layers agree."""
    config, original = config_of(candidate), config_of(dense)
    if config is None:
        return
    for kinds, keys in KEYS.items():
        for key in keys:
            value = getattr(original, key, None)
            if key == "num_key_value_heads" and value == getattr(original, "num_attention_heads", None):
                kinds = ("kv_group", "head")  # every query head has its own keys and values
            share = _share(structure, kept, kinds, value) if type(value) is int else None
            if share is not None and value is not None and round(value * share) != value:
                with contextlib.suppress(AttributeError):  # a property that other values decide
                    setattr(config, key, round(value * share))
    if getattr(original, "head_dim", 0) is None:  # what the dense model leaves to be derived
        config.head_dim = original.hidden_size // original.num_attention_heads
    for group, mask in zip(structure.groups, kept, strict=True):
        if group.blocks and group.substitutes is None and not mask.all():
            _follow_depth(config, original, group, mask)


def _share(structure: Structure, kept: Kept, kinds: tuple[str, ...], value: int) -> float | None:
    """The kept share of the units of ``kinds``, or None where the layers differ in it.

    Of neurons only those count that ``value`` can mean: a classifier's are others.
    """
    share = 1.0
    for kind in kinds:
        groups = zip(structure.groups, kept, strict=True)
        found = {m.mean() for g, m in groups if g.kind == kind and (kind != "neuron" or g.size == value)}
        if len(found) > 1:
            return None
        share *= found.pop() if found else 1.0
    return share


def _follow_depth(config: Any, original: Any, group: Group, mask: Any) -> None:
    for key in LAYER_KEYS:
        of_other = ("decoder" in key) != ("decoder" in group.name) and ("decoder" in key or "encoder" in group.name)
        if getattr(original, key, None) == group.size and not of_other:
            setattr(config, key, int(mask.sum()))
    for key, value in vars(original).items():
        is_of_layers = "layer" in key and not key.endswith(("token_id", "token_ids"))  # others may be as long by chance
        if is_of_layers and isinstance(value, list) and len(value) == group.size:
            setattr(config, key, [value[unit] for unit in np.flatnonzero(mask)])


def inexpressible(model: nn.Module, structure: Structure) -> dict[str, str]:
    """Groups whose removal the configuration cannot say, so that the model could not be loaded again from it."""
    config = config_of(model)
    if config is None:
        return {}
    width_is_derived = not any(hasattr(config, key) for key in KEYS[("head_dim",)])
    reasons = {}
    for group in structure.groups:
        if group.kind == "head_dim":
            reasons[group.name] = "the configuration cannot say which elements of a head stay"
        elif group.kind in ("head", "kv_group", "hidden") and width_is_derived:
            reasons[group.name] = "the configuration derives the width of a head from hidden width and heads"
        elif group.substitutes is not None:
            reasons[group.name] = "the configuration knows whole layers only"
    return reasons
