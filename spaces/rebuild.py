"""A model's structure as JSON, and a model from that JSON, without pickle and without running any ``__init__``.

A file may name only classes of Python modules that are imported already or belong to :data:`.trust.TRUSTED` packages,
only :class:`torch.nn.Module` classes and dataclasses, and only functions of torch: a file from a stranger does not
choose what code runs.
"""

from __future__ import annotations

import importlib
import math
import sys
from collections.abc import Mapping
from types import BuiltinFunctionType, FunctionType
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from . import equivalents
from .copying import copy_model
from .errors import StorageError
from .residual import Substitute
from .sizes import NAMESPACES, field_path, fields_of, is_record, is_record_class, set_size
from .surgery import KEPT_BLOCKS, kept_blocks, renumber, tensors_of
from .trust import SCRIPT, is_trusted

_CONFIG_CLASSES = {
    "transformers.configuration_utils.PretrainedConfig",
    "transformers.configuration_utils.PreTrainedConfig",
    "transformers.generation.configuration_utils.GenerationConfig",
}
_PLAIN = (bool, int, str, type(None))
_BASE_STATE = frozenset(vars(nn.Module()))
#: What recurrent layers make of their parameters.
_FLAT_WEIGHTS = ("_flat_weights", "_flat_weight_refs")
#: Records in records.
_DEEPEST = 5


def describe(model: nn.Module) -> dict[str, Any]:
    """The structure of ``model`` as JSON: classes, attributes, children, tensor names.

    ``left_out`` lists what JSON cannot express; a model that needs one of these cannot be rebuilt.
    """
    names = {id(tensor): name for name, tensor in tensors_of(model).items()}
    first = {id(module): name for name, module in model.named_modules()}
    left_out: list[str] = []
    configs = _configs_of(model)
    places = {id(config): place for place, config in enumerate(configs)}
    modules = [_describe_module(name, module, names, first, places, left_out) for name, module in model.named_modules()]
    described = [
        {"class": _path(type(config)), "attributes": _attributes(config, "config", places, left_out)}
        for config in configs
    ]
    return {"modules": modules, "configs": described, "left_out": left_out}


def _describe_module(
    name: str,
    module: nn.Module,
    names: dict[int, str],
    first: dict[int, str],
    configs: dict[int, int],
    left_out: list[str],
) -> dict[str, Any]:
    return {
        "name": name,
        "class": _path(type(module)),
        "attributes": _attributes(module, name, configs, left_out),
        "children": {k: first[id(child)] if child is not None else None for k, child in module._modules.items()},
        "parameters": {k: names[id(p)] if p is not None else None for k, p in module._parameters.items()},
        "buffers": {k: names[id(b)] if b is not None else None for k, b in module._buffers.items()},
        "transient": sorted(module._non_persistent_buffers_set),
        "trainable": [k for k, p in module._parameters.items() if p is not None and p.requires_grad],
    }


def rebuild(description: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> nn.Module:
    """The model that :func:`describe` saw, in evaluation mode, owning ``tensors``.

    Raises:
        StorageError: a class is not available or not allowed, or the description is damaged.
    """
    try:
        configs = _new_configs(description.get("configs", []))
        modules = {entry["name"]: _new_module(entry, configs) for entry in description["modules"]}
        parameters: dict[str, nn.Parameter] = {}
        for entry in description["modules"]:
            module = modules[entry["name"]]
            for key, child in entry["children"].items():
                module._modules[key] = None if child is None else modules[child]
            for key, name in entry["parameters"].items():
                module._parameters[key] = None if name is None else _parameter(name, key, entry, tensors, parameters)
            for key, name in entry["buffers"].items():
                module._buffers[key] = None if name is None else tensors[name]
            module._non_persistent_buffers_set.update(entry["transient"])
            if isinstance(module, nn.RNNBase):
                module._init_flat_weights()
        return modules[""].eval()
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        if isinstance(error, StorageError):
            raise
        raise StorageError(f"the description of the model's structure is damaged: {error!r}") from error


def refill(model: nn.Module, description: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> nn.Module:
    """A copy of the dense ``model`` that owns ``tensors``, has the sizes of the described one and lacks its removed
    blocks.

    Raises:
        StorageError: ``model`` has other modules or tensors than the described one.
    """
    entries = {entry["name"]: entry for entry in description["modules"]}
    shell = copy_model(model, {id(tensor): tensor for tensor in tensors_of(model).values()})  # shares the weights
    if any(entry["class"].startswith(f"{equivalents.__name__}:") for entry in entries.values()):
        shell = equivalents.replace(shell)
    try:
        _take_out(shell, entries)
    except (AttributeError, KeyError) as error:
        raise StorageError(f"the given model lacks blocks that the saved one has: {error}") from error
    held, modules = tensors_of(shell), dict(shell.named_modules())
    if differing := sorted(set(held) ^ set(tensors)) or sorted(set(modules) ^ set(entries)):
        raise StorageError(f"the saved model and the given one differ in {', '.join(differing[:5])}")
    memo: dict[int, Any] = {}
    for name, tensor in held.items():
        memo[id(tensor)] = tensors[name]
        if isinstance(tensor, nn.Parameter):
            memo[id(tensor)] = nn.Parameter(tensors[name], requires_grad=tensor.requires_grad)
    filled = copy_model(shell, memo).eval()
    modules = dict(filled.named_modules())
    for name, module in modules.items():
        for key, encoded in entries[name]["attributes"].items():
            _refill_sizes(module, key, encoded)
    return filled


def _take_out(model: nn.Module, entries: Mapping[str, Mapping[str, Any]]) -> None:
    """Take the blocks out of their containers that are not described, and put substitutes in the place of parts."""
    for name in list(entries):  # outer containers come first: what is inside gets its name by them
        encoded = entries[name]["attributes"].get(KEPT_BLOCKS)
        if encoded is not None:
            _shorten(model.get_submodule(name), _decode(encoded))
    for name, entry in entries.items():
        if entry["class"] == _path(Substitute) and name:
            substitute = _new_module(entry, []).eval()
            substitute._parameters.update(dict.fromkeys(entry["parameters"]))
            parent, _, key = name.rpartition(".")
            model.get_submodule(parent)._modules[key] = substitute


def _shorten(container: nn.Module, kept: tuple[int, ...]) -> None:
    """Leave the blocks ``kept``, places in the dense model, in ``container``, which may have lost some before."""
    places = kept_blocks(container) or range(len(container._modules))
    for key, place in zip(list(container._modules), places, strict=True):
        if place not in kept:
            del container._modules[key]
    renumber(container)


def _refill_sizes(module: nn.Module, attribute: str, encoded: Any) -> None:
    """Set what the description says of an integer, a tuple of integers, or the integers of a record or dictionary."""
    held = getattr(module, attribute, None)
    if _is_size(held):
        value = None if _is_reference(encoded) else _decode(encoded)
        if _is_size(value):
            setattr(module, attribute, value)
        return
    is_described = isinstance(encoded, dict) and list(encoded) in (["record"], ["dict"])
    sizes = {key: size for key, size in fields_of(held).items() if type(size) is int and is_described}
    described = _described_fields(encoded) if sizes else {}
    for key, size in sizes.items():
        if type(described.get(key)) is int and described[key] != size:
            set_size(module, field_path(attribute, held, key), described[key])


def _described_fields(encoded: dict[str, Any]) -> dict[Any, Any]:
    """JSON values by the names of the fields."""
    fields: dict[Any, Any] = encoded["record"]["attributes"] if "record" in encoded else dict(encoded["dict"])
    return fields


def _is_size(value: Any) -> bool:
    return type(value) is int or (isinstance(value, tuple) and all(type(item) is int for item in value))


def _new_module(entry: Mapping[str, Any], configs: list[Any]) -> nn.Module:
    cls = _module_class(entry["class"])
    module: nn.Module = cls.__new__(cls)
    nn.Module.__init__(module)
    _set_attributes(module, entry["attributes"], configs)
    return module


def _configs_of(model: nn.Module) -> list[Any]:
    """The Hugging Face configurations that modules of ``model`` and other configurations hold, each once."""
    found: dict[int, Any] = {}
    todo = [value for module in model.modules() for value in vars(module).values()]
    while todo:
        value = todo.pop(0)
        if _is_config(value) and id(value) not in found:
            found[id(value)] = value
            todo += vars(value).values()
    return list(found.values())


def _is_config(value: Any) -> bool:
    names = {f"{cls.__module__}.{cls.__qualname__}" for cls in type(value).__mro__}
    return bool(names & _CONFIG_CLASSES)


def _is_reference(value: Any) -> bool:
    """Whether it describes a configuration or a record."""
    return isinstance(value, dict) and list(value) in (["config"], ["record"])


def _attributes(held: Any, name: str, configs: dict[int, int], left_out: list[str], depth: int = 0) -> dict[str, Any]:
    """JSON for the attributes of a module, configuration or record; names of those that have none go to ``left_out``.

    ``depth``: of records in records, which may refer to each other.
    """
    attributes: dict[str, Any] = {}
    for key, value in vars(held).items():
        if isinstance(held, nn.Module) and key in _BASE_STATE:
            if key.endswith("hooks") and value:
                left_out.append(f"{name}.{key}".lstrip("."))
            continue
        if isinstance(held, nn.RNNBase) and key in _FLAT_WEIGHTS:
            continue
        try:
            if is_record(value) and depth < _DEEPEST:
                fields = _attributes(value, f"{name}.{key}", configs, left_out, depth + 1)
                attributes[key] = {"record": {"class": _path(type(value)), "attributes": fields}}
            else:
                attributes[key] = {"config": configs[id(value)]} if id(value) in configs else _encode(value)
        except TypeError:
            left_out.append(f"{name}.{key}".lstrip("."))
    return attributes


def _set_attributes(held: Any, attributes: Mapping[str, Any], configs: list[Any]) -> None:
    for key, value in attributes.items():
        state = isinstance(held, nn.Module) and key in _BASE_STATE
        if key.startswith("__") or state or callable(getattr(type(held), key, None)):
            raise StorageError(f"the description sets the attribute {key!r}, which would change what code runs")
        vars(held)[key] = _resolved(value, configs) if _is_reference(value) else _decode(value)


def _resolved(value: Mapping[str, Any], configs: list[Any]) -> Any:
    """The configuration that is referred to, or a record, without running its ``__init__``."""
    if "config" in value:
        return configs[value["config"]]
    path = value["record"]["class"]
    cls: Any = next((cls for cls in NAMESPACES if _path(cls) == path), None) or _class(path)
    if not is_record_class(cls) or hasattr(cls, "__del__"):
        raise StorageError(f"the saved model uses {path}, which is no dataclass here")
    record = cls.__new__(cls)
    _set_attributes(record, value["record"]["attributes"], configs)
    return record


def _new_configs(entries: list[Mapping[str, Any]]) -> list[Any]:
    """Configurations, without running their ``__init__``, which refuses widths that pruning makes."""
    configs = []
    for entry in entries:
        cls = _class(entry["class"])
        bases = cls.__mro__ if isinstance(cls, type) else ()
        if not any(f"{base.__module__}.{base.__qualname__}" in _CONFIG_CLASSES for base in bases):
            raise StorageError(f"the saved model uses {entry['class']}, which is no configuration of Hugging Face")
        configs.append(cls.__new__(cls))
    for config, entry in zip(configs, entries, strict=True):
        _set_attributes(config, entry["attributes"], configs)
    return configs


def _parameter(
    name: str,
    key: str,
    entry: Mapping[str, Any],
    tensors: Mapping[str, torch.Tensor],
    known: dict[str, nn.Parameter],
) -> nn.Parameter:
    if name not in known:
        known[name] = nn.Parameter(tensors[name], requires_grad=key in entry["trainable"])
    return known[name]


def _encode(value: Any) -> Any:
    """JSON for ``value``: plain values as they are, all else as a one-key object. Raises TypeError if impossible."""
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, type):
        if not issubclass(value, nn.Module):
            raise TypeError(f"{value} is no module class")
        return {"class": _path(value)}
    if type(value) in _PLAIN or (type(value) is float and math.isfinite(value)):
        return value
    if type(value) is float:
        return {"float": repr(value)}
    if isinstance(value, torch.Size) or type(value) is tuple:
        return {"tuple": [_encode(item) for item in value]}
    if type(value) in (list, set):
        return {type(value).__name__: [_encode(item) for item in value]}
    if type(value) is dict:
        return {"dict": [[_encode(key), _encode(item)] for key, item in value.items()]}
    if isinstance(value, torch.dtype):
        return {"dtype": str(value).removeprefix("torch.")}
    if isinstance(value, FunctionType | BuiltinFunctionType) and _function(value.__name__) is value:
        return {"function": value.__name__}
    raise TypeError(f"no JSON for {type(value).__name__}")


def _decode(value: Any) -> Any:
    if type(value) in (*_PLAIN, float):
        return value
    ((kind, content),) = value.items()
    if kind == "class":
        return _module_class(content)
    if kind == "float":
        return float(content)
    if kind == "dict":
        return {_decode(key): _decode(item) for key, item in content}
    if kind in ("tuple", "list", "set"):
        return {"tuple": tuple, "list": list, "set": set}[kind](_decode(item) for item in content)
    if kind == "dtype" and isinstance(found := getattr(torch, content), torch.dtype):
        return found
    if kind == "function" and (function := _function(content)) is not None:
        return function
    raise StorageError(f"the description holds an unknown kind of value: {kind}")


def _function(name: str) -> Any:
    """The activation or operator of torch with that name, or None."""
    found = getattr(F, name, None)
    if isinstance(found, FunctionType) and found.__module__ == F.__name__:
        return found
    return found if isinstance(found, BuiltinFunctionType) else None


def own_classes(model: nn.Module) -> list[str]:
    """Classes of modules that were defined in the running script or notebook: elsewhere they have no name."""
    found = {type(module) for module in model.modules()}
    return sorted(cls.__qualname__ for cls in found if cls.__module__ == SCRIPT)


def _path(cls: type) -> str:
    return f"{cls.__module__}:{cls.__qualname__}"


def _module_class(path: str) -> type[nn.Module]:
    found = _class(path)
    if found is None and path.startswith(f"{SCRIPT}:"):
        raise StorageError(
            f"the saved model uses the class {path.partition(':')[2]} of the script that saved it; give the dense "
            "model, load(path, model=dense_model), or define the class in a module of its own and search again"
        )
    if not (isinstance(found, type) and issubclass(found, nn.Module)):
        raise StorageError(f"the saved model uses {path}, which is not a module class here")
    return found


def _class(path: str) -> Any:
    """What ``path`` names, in a module that is imported already or trusted."""
    module, _, qualname = path.partition(":")
    if module not in sys.modules:
        if not is_trusted(module):
            raise StorageError(
                f"the saved model uses {qualname} of {module}: if you trust it, import {module} first, "
                f"on the command line with 'modules=[{module}]'"
            )
        try:
            importlib.import_module(module)
        except ImportError as error:
            raise StorageError(f"the saved model uses {module}, which cannot be imported: {error}") from error
    found: Any = sys.modules[module]
    for part in qualname.split("."):
        found = getattr(found, part, None)
    return found
