"""Our command lines in Hydra's terms, and the options that a run was started with."""

from __future__ import annotations

import contextlib
import itertools
import json
import re
import shlex
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
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
#: Tasks that run no code of the user.
BUILT_IN_TASKS = ("digits", "cifar_resnet", "hf_causal_lm", "hf_text_classification")


def prepare_overrides(name: str, arguments: Sequence[str]) -> list[str]:
    """Our shorthands in Hydra's terms: a run as first argument, ``--json``, ``resume=RUN``, free keys of a task."""
    flags, overrides = _apart(arguments)
    for dashed in filter(None, map(_DASHED.fullmatch, [*flags, *overrides])):
        if f"--{dashed[1]}" not in FLAGS:
            raise ConfigError(f"options are written without dashes: {dashed[1].replace('-', '_')}=...")
    if name in POSITIONAL:
        overrides = _with_runs(name, overrides)
    if "--json" in overrides:
        if name not in WITH_JSON:
            raise ConfigError(f"--json is an option of {', '.join(WITH_JSON)}; prunefront {name} does not have it")
        overrides = ["json=true" if argument == "--json" else argument for argument in overrides]
    resumed = [a for a in overrides if a.startswith("resume=")]
    if resumed:
        if name != "search" or {"-m", "--multirun"} & set(flags):
            raise ConfigError("resume=RUN continues one run of the search command; it does not go with -m")
        overrides.remove(resumed[-1])
        run_dir = Path(resumed[-1].removeprefix("resume="))
        kept = inherited(run_dir, overrides, shlex.join(["prunefront", "search", *flags, f"resume={run_dir}"]))
        overrides = [*kept, *overrides, f"run_dir={_quoted(str(run_dir))}"]
    if name == "worker":
        overrides = _joining(overrides, flags)
    if name in ("pick", "show", "finetune", "export"):
        overrides = [f"pick.names{a.removeprefix('pick')}" if a.startswith("pick=") else a for a in overrides]
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
    """Folders at the beginning as the option ``run``: one, or several where the command takes them."""
    runs = list(itertools.takewhile(lambda text: "=" not in text and not text.startswith("-"), overrides))
    if len(runs) > 1 and name not in SEVERAL_RUNS:
        raise ConfigError(f"prunefront {name} takes one run, not {len(runs)}: {shlex.join(runs)}")
    if not runs:
        return overrides
    quoted = ",".join(map(_quoted, runs))
    return [f"run={quoted}" if len(runs) == 1 else f"run=[{quoted}]", *overrides[len(runs) :]]


def _joining(overrides: Sequence[str], flags: Sequence[str]) -> list[str]:
    """A worker has the options of the search whose folder comes first, where that is on this machine."""
    run = next((text for text in overrides if key_of(text) in ("run", "run_dir")), None)
    if run is None:
        raise ConfigError("prunefront worker takes the folder of a search first")
    run_dir = Path(json.loads(text) if (text := run.partition("=")[2]).startswith('"') else text.strip("'"))
    rest = [text for text in overrides if text != run]
    command = shlex.join(["prunefront", "worker", *flags, str(run_dir)])
    kept = inherited(run_dir, rest, command) if (run_dir / ".hydra").exists() else []
    kept = [text for text in kept if key_of(text) not in ("workers", "devices")]  # a machine has its own
    return [*kept, *rest, f"run_dir={_quoted(str(run_dir))}"]


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
    """What the user must say again to continue the run: where configurations are, and what names code."""
    stored = _stored_overrides(run_dir)
    again = [override for override in stored if key_of(override) != "run_dir" and not _is_harmless(override, stored)]
    return [*_config_dir(run_dir), *again]


def _config_dir(run_dir: Path) -> list[str]:
    """The user's own folder of configurations, as a flag."""
    path = run_dir / ".hydra" / "hydra.yaml"
    sources = OmegaConf.select(OmegaConf.load(path), "hydra.runtime.config_sources") if path.exists() else None
    found = [source for source in sources or () if source.get("provider") == "command-line"]
    return ["--config-dir", str(found[0].path)] if found else []


def options_keeper(run_dir: Path, config: DictConfig) -> Callable[[], None]:
    """What writes down the options of a run, to be called when the run is known to be this command's. Where nothing is
    there yet it is called at once."""
    keep = partial(keep_options, run_dir, config)
    if is_unused(run_dir):
        keep()
    return keep


def keep_options(run_dir: Path, config: DictConfig) -> None:
    """Write ``.hydra`` as Hydra does, which itself would do so before a run can be refused as another search's."""
    folder, hydra_config = run_dir / ".hydra", HydraConfig.instance().cfg
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "config.yaml", OmegaConf.to_yaml(config))
    write_text(folder / "hydra.yaml", OmegaConf.to_yaml(hydra_config))
    write_text(folder / "overrides.yaml", OmegaConf.to_yaml(HydraConfig.get().overrides.task))


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
    given = {key_of(override): override.partition("=")[2].strip("'") for override in overrides}
    run_dir = Path(given.get("run", ""))
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


def _quoted(value: str) -> str:
    """For Hydra's override grammar: a path may have characters with a meaning there."""
    plain = OverridesParser.create().parse_override(f"key={value}") if _parses(value) else None
    return value if plain is not None and plain.value() == value else "'" + value.replace("'", "\\'") + "'"


def _parses(value: str) -> bool:
    try:
        OverridesParser.create().parse_override(f"key={value}")
    except Exception:  # whatever the grammar raises, the value needs quotes
        return False
    return True
