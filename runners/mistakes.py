"""What is wrong with a command line that Hydra refuses, in a sentence that says what to do."""

from __future__ import annotations

import difflib
import re
import shlex
from collections.abc import Iterator, Sequence

import hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ..spaces.errors import ConfigError
from .overrides import parsed, quoted

#: Hydra's words for a key that no schema has.
_UNKNOWN = re.compile(r"Could not override '([^']+)'")
#: And for a single value where a list belongs.
_NO_LIST = re.compile(r"Error merging override (\w+)=[\s\S]*is not a ListConfig")

#: NumPy's generators take as many.
SEEDS = 2**32


def check_complete(config: DictConfig, command: str, example: str) -> None:
    """Raises ConfigError where a value is missing that has no default, and for seeds that no generator takes.
    ``example`` is a call that works."""
    if missing := OmegaConf.missing_keys(config):
        key = min(missing)
        needs = "the folder of a run first" if key == "run" else f"{key}=..."
        raise ConfigError(f"{command} needs {needs}, as in: {example}")
    for key in ("seed", "task.seed", "finetune.seed"):
        seed = OmegaConf.select(config, key)
        if isinstance(seed, int) and not 0 <= seed < SEEDS:
            raise ConfigError(f"{key} must be from 0 to {SEEDS - 1}, not {seed}")


def explained(error: Exception, command: str, config_name: str, overrides: Sequence[str]) -> ConfigError:
    """``command`` is how the user called it, ``config_name`` its configuration."""
    text = _told(error)
    unknown = _UNKNOWN.search(text)
    if unknown:
        key = unknown[1].lstrip("+~")
        nearest = _nearest(key, list(_keys(_composed(config_name, overrides))))
        text = f"{command} has no option {key}" + (f"; did you mean {nearest}?" if nearest else "")
        text += f" ({command} --help shows all)"
    if listed := _NO_LIST.search(text):
        given = next((text for text in overrides if text.startswith(f"{listed[1]}=")), f"{listed[1]}=...")
        text = f"{listed[1]} takes a list: '{listed[1]}=[{given.partition('=')[2]}]'"
    if unreadable := next((given for given in overrides if "=" in given and parsed(given) is None), None):
        key, _, value = unreadable.partition("=")
        text = (
            f"{command}: {unreadable} cannot be read: characters other than letters, digits and /.:_- mean something "
            f"to Hydra; quote the value, inside the quotes of the shell: {_for_the_shell(f'{key}={quoted(value)}')}"
        )
    return ConfigError(text)


def _for_the_shell(text: str) -> str:
    return shlex.quote(text) if re.search(r'["$`\\!]', text) else f'"{text}"'


def _told(error: Exception) -> str:
    """Hydra's message with its cause, which says what is wrong with a value."""
    parts = [str(error).strip()]
    cause = error.__cause__
    if isinstance(cause, OmegaConfBaseException) and not _UNKNOWN.search(parts[0]):
        parts.append(str(cause).strip().splitlines()[0])
    return "\n".join(parts)


def _composed(config_name: str, overrides: Sequence[str]) -> DictConfig:
    """The configuration with the choices among ``overrides``, as far as they are right."""
    choices = [text for text in overrides if re.fullmatch(r"\w+=\w+", text)]
    GlobalHydra.instance().clear()
    with hydra.initialize_config_module("prunefront.conf", version_base="1.3"):
        try:
            return hydra.compose(config_name, choices)
        except (HydraException, OmegaConfBaseException):
            return hydra.compose(config_name)


def _keys(config: DictConfig, prefix: str = "") -> Iterator[str]:
    """All options by their full names."""
    for name in map(str, config):
        key = f"{prefix}{name}"
        yield key
        if not OmegaConf.is_missing(config, name) and isinstance(inside := config._get_node(name), DictConfig):
            yield from _keys(inside, f"{key}.")


def _nearest(key: str, keys: Sequence[str]) -> str | None:
    """The same name in another place, or the most similar one."""
    leaf = key.rpartition(".")[2]
    elsewhere = [known for known in keys if known.rpartition(".")[2] == leaf]
    return next(iter(elsewhere + difflib.get_close_matches(key, keys, n=1)), None)
