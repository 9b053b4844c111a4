"""Our command lines in Hydra's terms, and the options that a run was started with."""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import shlex
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from omegaconf import DictConfig, OmegaConf

from ..search.files import write_text
from ..spaces.errors import ConfigError, StorageError

#: These take a run as their first argument.
POSITIONAL = ("front", "pick", "show", "dashboard", "finetune", "export", "load-check", "report", "worker")
#: And these several.
SEVERAL_RUNS = ("report",)
#: These print JSON for other programs on demand.
WITH_JSON = ("space", "measure", "front", "pick", "show")
#: Parts of tasks with free keys, which Hydra's schemas cannot list: what task=custom builds from `_target_`, domains of
#: text, values of a Hugging Face configuration.
OPEN_KEYS = (
    *("task.model.", "task.calibration.", "task.example_inputs.", "task.training."),
    *("task.config.", "task.train.", "task.search.", "task.test."),
)
#: Options that hold the path of a file or folder on this machine, and others that are one text: commas and brackets
#: in them mean themselves.
PATHS = ("run_dir", "run", "path", "start", "text", "data", "task.data", "latency.cache")
TEXTS = (*PATHS, "target.python", "storage")
#: The log of a run.
LOG = "prunefront.log"
#: Options as other programs have them, with dashes; and those of ours and Hydra's that are written so.
_DASHED = re.compile(r"--([a-z_][\w.-]*)(?:=.*)?", re.DOTALL)
FLAGS = (
    *("--json", "--multirun", "--cfg", "--resolve", "--package", "--info", "--version", "--run", "--hydra"),
    *("--hydra-help", "--config-path", "--config-name", "--config-dir", "--experimental-rerun"),
)
#: Those of Hydra's that take a value, short ones too.
_VALUED = (
    *("--cfg", "-c", "--package", "-p", "--config-path", "-cp", "--config-name", "-cn", "--config-dir", "-cd"),
    "--experimental-rerun",
)
#: OmegaConf's way to say that a text is no interpolation; backslashes before it are doubled.
_ESCAPED = re.compile(r"(\\*)\\\$\{")
#: In the place of what is secret in the URL of a storage.
_HIDDEN = "://..."
#: Tasks that run no code of the user.
BUILT_IN_TASKS = ("digits", "cifar_resnet", "hf_causal_lm", "hf_text_classification")


def prepare_overrides(name: str, arguments: Sequence[str]) -> list[str]:
    """Our shorthands in Hydra's terms: a run as first argument, ``--json``, ``resume=RUN``, free keys of a task."""
    flags, overrides = _apart(arguments)
    sweeps = bool({"-m", "--multirun"} & set(flags))
    for dashed in filter(None, map(_DASHED.fullmatch, [*flags, *overrides])):
        if f"--{dashed[1]}" not in FLAGS:
            raise ConfigError(f"options are written without dashes: {dashed[1].replace('-', '_')}=...")
    if name in POSITIONAL:
        overrides = _with_runs(name, overrides)
    overrides = [_one_text(override, sweeps) for override in overrides]
    if "--json" in overrides:
        if name not in WITH_JSON:
            raise ConfigError(f"--json is an option of {', '.join(WITH_JSON)}; prunefront {name} does not have it")
        overrides = ["json=true" if argument == "--json" else argument for argument in overrides]
    resumed = [a for a in overrides if a.startswith("resume=")]
    if resumed:
        if name != "search" or sweeps:
            raise ConfigError("resume=RUN continues one run of the search command; it does not go with -m")
        overrides.remove(resumed[-1])
        run_dir = _named_folder(resumed[-1])
        kept = inherited(run_dir, overrides, shlex.join(["prunefront", "search", *flags, f"resume={run_dir}"]))
        overrides = [*kept, *overrides, f"run_dir={quoted(str(run_dir))}"]
    if name == "worker":
        overrides = _joining(overrides, flags)
    if name in ("pick", "show", "finetune", "export"):
        overrides = [_with_names(override, sweeps) for override in overrides]
    if name == "finetune":
        overrides = [*_of_the_search(overrides, flags), *overrides]
    # Hydra's parser wants all overrides in one piece.
    return [*flags, *(f"++{a}" if a.startswith(OPEN_KEYS) else a for a in overrides)]


def _apart(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Hydra's flags with their values, and everything else."""
    flags, overrides = [], []
    rest = iter(arguments)
    for argument in rest:
        if argument == "--json" or not argument.startswith("-"):
            overrides.append(argument)
        else:
            flags += [argument, *(itertools.islice(rest, 1) if argument in _VALUED else ())]
    return flags, overrides


def _with_runs(name: str, overrides: list[str]) -> list[str]:
    """Folders at the beginning as the option ``run``: one, or several where the command takes them. The first argument
    is a folder even with an equals sign, where there is such a one."""

    def is_run(place: int, text: str) -> bool:
        may_be = place == 0 or name in SEVERAL_RUNS
        return not text.startswith("-") and ("=" not in text or (may_be and Path(text).is_dir()))

    runs = [text for _, text in itertools.takewhile(lambda given: is_run(*given), enumerate(overrides))]
    if len(runs) > 1 and name not in SEVERAL_RUNS:
        raise ConfigError(f"prunefront {name} takes one run, not {len(runs)}: {shlex.join(runs)}")
    if not runs:
        return overrides
    folders = ",".join(map(quoted, runs))
    return [f"run={folders}" if len(runs) == 1 else f"run=[{folders}]", *overrides[len(runs) :]]


def _one_text(override: str, sweeps: bool) -> str:
    """An option of ``TEXTS`` so that Hydra takes its value as it is written; paths may begin with ``~``.

    Raises:
        ConfigError: the folder of a run is empty.
    """
    key, _, value = override.partition("=")
    if key == "run_dir" and value_of(override) == "":
        raise ConfigError("run_dir= needs the name of a folder, such as run_dir=runs/a")
    if key not in TEXTS or value == "null" or value.startswith(("[", "{", "'", '"')):
        return override
    found = parsed(override)
    if found is not None and found.is_sweep_override() and (sweeps or not Path(value).exists()):
        return override
    return f"{key}={_as_written(os.path.expanduser(value) if key in PATHS else value)}"


def _named_folder(override: str) -> Path:
    """The folder that is the value: as it is written where there is one, else as Hydra reads it."""
    written = override.partition("=")[2]
    folder = written if Path(written).is_dir() else str(value_of(override))
    if "${" in folder:
        raise ConfigError(
            f"{folder} cannot be the folder of a search: ${{ has a meaning in Hydra; give it another name"
        )
    return Path(folder).expanduser()


def _with_names(override: str, sweeps: bool) -> str:
    """``pick=`` in full. Raises ConfigError for several names that are no list."""
    key, _, value = override.partition("=")
    if key != "pick":
        return override
    if not sweeps and "," in value and not value.startswith(("[", "'", '"')):
        raise ConfigError(f"pick takes several names as a list: 'pick=[{value}]'")
    return f"pick.names={value}"


def _joining(overrides: Sequence[str], flags: Sequence[str]) -> list[str]:
    """A worker has the options of the search whose folder comes first, where that is on this machine."""
    run = next((text for text in overrides if key_of(text) in ("run", "run_dir")), None)
    if run is None:
        raise ConfigError("prunefront worker takes the folder of a search first")
    run_dir = _named_folder(run)
    rest = [text for text in overrides if text != run]
    command = shlex.join(["prunefront", "worker", *flags, str(run_dir)])
    kept = inherited(run_dir, rest, command) if (run_dir / ".hydra").exists() else []
    kept = [text for text in kept if key_of(text) not in ("workers", "devices")]  # a machine has its own
    return [*kept, *rest, f"run_dir={quoted(str(run_dir))}"]


def inherited(
    run_dir: Path, overrides: Sequence[str], command: str, keys: Sequence[str] = (), instead: str | None = None
) -> list[str]:
    """The overrides that the run was started with, all or those of ``keys``, without the ones given anew.

    A run's files never choose which code is run: overrides of task=custom must be given again. ``command`` is what the
    user is told to repeat with them, ``instead`` what can be done with a run of the Python API.
    """
    stored = _stored_overrides(run_dir, instead)
    given = {key_of(override) for override in overrides}
    kept = [override for override in stored if key_of(override) not in given | {"run_dir"}]
    # Of a choice that was made anew, such as another tracker, the old one's options say nothing.
    chosen = tuple(f"{key_of(override)}." for override in overrides if override not in stored)
    kept = [override for override in kept if not override.startswith(chosen)]
    kept = [override for override in kept if not keys or key_of(override).partition(".")[0] in keys]
    if unknown := [override for override in kept if _is_without_secret(override)]:
        raise ConfigError(
            f"{run_dir} has its study in a storage whose URL is written nowhere; repeat it: "
            f"{command} {shlex.join(unknown)}"
        )
    foreign = [override for override in kept if not _is_harmless(override, stored)]
    if foreign:
        repeated = [*foreign, *(override for override in overrides if key_of(override) != "run")]
        if "--config-dir" not in command:
            repeated += _config_dir(run_dir)
        raise ConfigError(
            f"{run_dir} was started with code of its own, which is not run because a file says so; "
            f"if it is yours, repeat: {command} {shlex.join(repeated)}"
        )
    return kept


def to_be_repeated(run_dir: Path) -> list[str]:
    """What the user must say again to continue the run: where configurations are, what names code, and the storage."""
    stored = _stored_overrides(run_dir)
    said = [override for override in stored if key_of(override) != "run_dir"]
    again = [text for text in said if _is_without_secret(text) or not _is_harmless(text, stored)]
    return [*_config_dir(run_dir), *again]


def without_secret(override: str) -> str:
    """Of a storage only its kind, ``storage=postgresql://...``: its URL may hold a password."""
    if key_of(override) != "storage" or "${" in override or value_of(override) is None:
        return override
    return f"{override.partition('=')[0]}={storage_kind(str(value_of(override)))}"


def storage_kind(url: str) -> str:
    """The URL of a storage as it may be shown: ``postgresql://...``."""
    found = re.match(r"[a-z0-9+]+(?=://)", url)
    return f"{found[0] if found else ''}{_HIDDEN}"


def _is_without_secret(override: str) -> bool:
    return key_of(override) == "storage" and override.endswith(_HIDDEN)


def shown_options(config: DictConfig) -> dict[str, Any]:
    """All options as plain values, for others to read."""
    return _without_storage(OmegaConf.to_container(config, resolve=True))


def _without_storage(options: Any) -> Any:
    url = options.get("storage")
    return options if url is None or "${" in url else {**options, "storage": storage_kind(url)}


def hide_storage(multirun: Path) -> None:
    """In ``multirun.yaml``, which Hydra has written."""
    if multirun.exists():
        options = OmegaConf.to_container(OmegaConf.load(multirun))
        if isinstance(options, dict) and options.get("storage") is not None:
            shown = {**_without_storage(options), "hydra": _hydra_without_storage(options.get("hydra", {}))}
            write_text(multirun, OmegaConf.to_yaml(OmegaConf.create(shown)))


def _hydra_without_storage(hydra: Any) -> Any:
    """Hydra's own options, with the command line in two places."""
    given = hydra["overrides"]["task"]
    for override in given:
        name = hydra["job"].get("override_dirname") or ""
        hydra["job"]["override_dirname"] = name.replace(override, without_secret(override))
    hydra["overrides"]["task"] = [without_secret(override) for override in given]
    return hydra


def _config_dir(run_dir: Path) -> list[str]:
    """The user's own folder of configurations, as a flag."""
    path = run_dir / ".hydra" / "hydra.yaml"
    sources = OmegaConf.select(OmegaConf.load(path), "hydra.runtime.config_sources") if path.exists() else None
    return config_dir_among(sources or ())


def config_dir_among(sources: Iterable[Any]) -> list[str]:
    """Of Hydra's ``runtime.config_sources``, the user's own folder as a flag."""
    found = [source for source in sources if source.get("provider") == "command-line"]
    return ["--config-dir", str(found[0]["path"])] if found else []


def options_keeper(run_dir: Path, config: DictConfig) -> Callable[[], None]:
    """What writes down the options of a run, to be called when the run is known to be this command's. Where nothing is
    there yet it is called at once."""
    keep = partial(keep_options, run_dir, config)
    if is_unused(run_dir):
        keep()
    return keep


def keep_options(run_dir: Path, config: DictConfig) -> None:
    """Write ``.hydra`` as Hydra does, which itself would do so before a run can be refused as another search's."""
    folder, hydra_config = run_dir / ".hydra", OmegaConf.to_container(HydraConfig.instance().cfg)
    assert isinstance(hydra_config, dict)
    hydra = _hydra_without_storage(hydra_config["hydra"])
    kept = {
        "config": _without_storage(OmegaConf.to_container(config)),
        "hydra": {"hydra": hydra},
        "overrides": hydra["overrides"]["task"],
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in kept.items():
        write_text(folder / f"{name}.yaml", OmegaConf.to_yaml(OmegaConf.create(content)))


def is_unused(run_dir: Path) -> bool:
    """Whether nothing is there, or a log of what this process has said so far."""
    return not run_dir.exists() or all(path.name == LOG for path in run_dir.iterdir())


def forget_options(run_dir: Path) -> None:
    """Remove the folder of a run that has nothing but its options and its log, or not even these."""
    folder = run_dir / ".hydra"
    if not run_dir.is_dir() or any(path.name not in (folder.name, LOG) for path in run_dir.iterdir()):
        return
    for path in (*folder.glob("*.yaml"), *run_dir.glob(LOG)):
        path.unlink()
    with contextlib.suppress(OSError):  # something else is there: it stays
        for empty in filter(Path.exists, (folder, run_dir)):
            empty.rmdir()


def _of_the_search(overrides: Sequence[str], flags: Sequence[str]) -> list[str]:
    """Task and tracker of the run that is fine-tuned; none where the user names a task for a run of the Python API."""
    given = {key_of(override): value_of(override) for override in overrides}
    run_dir = Path(str(given.get("run", "")))
    if "run" not in given or ("task" in given and not (run_dir / ".hydra").exists()):
        return []
    instead = "name it, task=..., or go on in Python, with prunefront.finetune"
    command = shlex.join(["prunefront", "finetune", *flags, str(run_dir)])
    return inherited(run_dir, overrides, command, ("task", "tracker"), instead)


def _stored_overrides(run_dir: Path, instead: str | None = None) -> list[str]:
    path = run_dir / ".hydra" / "overrides.yaml"
    if not run_dir.is_dir():
        raise StorageError(f"{run_dir} does not exist; expected the folder of a run")
    if not path.exists():
        raise StorageError(
            f"{run_dir} was not made by the search command (it has no .hydra/overrides.yaml), so that its task is not "
            f"known: {instead or f'go on in Python, with prunefront.search(..., run_dir={str(run_dir)!r})'}"
        )
    try:
        stored = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
    except Exception as error:  # YAML's and OmegaConf's errors have no common root
        raise StorageError(f"{path} is damaged: {error}") from error
    if not isinstance(stored, list) or not all(isinstance(override, str) for override in stored):
        raise StorageError(f"{path} is damaged: it is no list of overrides")
    return [override.replace("++", "", 1) if override.startswith("++") else override for override in stored]


def _is_harmless(override: str, stored: Sequence[str]) -> bool:
    """Sets a plain value of a built-in choice; names no code."""
    key = key_of(override)
    if "_target_" in override or "${" in override or override.startswith(("~", "+", "hydra")):
        return False
    if key == "task":
        return override.partition("=")[2] in BUILT_IN_TASKS
    if key == "tracker":
        return override in ("tracker=wandb", "tracker=none")
    if key == "target":
        return override in ("target=none", "target=torch", "target=onnxruntime", "target=openvino", "target=tensorrt")
    if key.startswith("target.") and ("target=ssh" in stored or "target=command" in stored):
        return False  # hosts, programs and options for ssh
    if key == "space":
        return override in ("space=all", "space=widths", "space=depth", "space=uniform")
    return not key.startswith("task.") or "task=custom" not in stored


def key_of(override: str) -> str:
    """Without Hydra's marks of keys that are added."""
    return override.lstrip("+").partition("=")[0]


def value_of(override: str) -> Any:
    """As Hydra reads it, with interpolations as they are written; where it cannot, all as it is written."""
    found = parsed(override)
    if found is None or found.is_sweep_override():
        return override.partition("=")[2]
    value = found.value()
    return _ESCAPED.sub(lambda found: found[1][: len(found[1]) // 2] + "${", value) if isinstance(value, str) else value


def quoted(value: str) -> str:
    """For Hydra's override grammar, so that nothing in ``value`` has a meaning there."""
    return _as_written(re.sub(r"(\\*)\$\{", r"\1\1\\${", value))


def _as_written(value: str) -> str:
    """In quotes where Hydra would read something else; interpolations are filled in."""
    found = parsed(f"key={value}")
    if found is not None and not found.is_sweep_override() and found.value() == value:
        return value
    escaped = re.sub(r"(\\*)'", r"\1\1\\'", value)  # backslashes have a meaning before quotes alone
    return "'" + re.sub(r"(\\+)$", r"\1\1", escaped) + "'"


def parsed(override: str) -> Override | None:
    """None where Hydra cannot read it."""
    try:
        return OverridesParser.create().parse_override(override)
    except Exception:  # whatever the grammar raises, it cannot be read
        return None
