"""The ``prunefront`` command: a subcommand, then Hydra overrides."""

from __future__ import annotations

import itertools
import json
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import hydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf

from ..spaces.errors import ConfigError, PrunefrontError, StorageError
from . import commands
from .config import register
from .dashboard import command as dashboard
from .display import errors
from .experiments import EXPERIMENTS
from .experiments import command as experiment
from .exporting.command import command as export
from .finetuning.command import command as finetune
from .picking import pick, show
from .rounds import command as rounds
from .workers import command as worker

COMMANDS: dict[str, tuple[Callable[[DictConfig], Any], str]] = {
    "space": (commands.space, "prunefront space task=digits"),
    "search": (commands.search, "prunefront search task=digits budget.macs=40% n_trials=200"),
    "measure": (commands.measure, "prunefront measure task=digits target=onnxruntime"),
    "front": (commands.front, "prunefront front runs/a budget.macs=30%"),
    "pick": (pick, "prunefront pick runs/a pick.macs=30%"),
    "show": (show, "prunefront show runs/a"),
    "finetune": (finetune, "prunefront finetune runs/a pick.macs=50% finetune.distill.weight=0.5"),
    "export": (export, "prunefront export runs/a pick.macs=50% format=onnx"),
    "worker": (worker, "prunefront worker runs/a storage=postgresql://user@host/studies"),
    "rounds": (rounds, "prunefront rounds task=digits budget.macs=20% rounds=3 finetune.epochs=3"),
    "experiment": (experiment, "prunefront experiment li2016 epochs=10"),
    "load-check": (commands.load_check, "prunefront load-check runs/a"),
    "dashboard": (dashboard, "prunefront dashboard runs/a"),
    "report": (commands.report, "prunefront report runs/a runs/b"),
}
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
#: Tasks that run no code of the user.
BUILT_IN_TASKS = ("digits", "cifar_resnet", "hf_causal_lm", "hf_text_classification")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(usage())
        return 0
    name, *rest = arguments
    if name not in COMMANDS:
        errors.print(f"unknown command {name!r}; expected one of {', '.join(COMMANDS)}", style="red")
        return 2
    debug = "--debug" in rest
    rest = [argument for argument in rest if argument != "--debug"]
    try:
        config_name = name.replace("-", "_")
        if name == "experiment" and rest and rest[0] in ("-h", "--help"):
            print(experiments_help())
            return 0
        if name == "experiment":
            config_name, rest = experiment_config(rest)
        if {"-h", "--help"} & set(rest):
            print(command_help(name, config_name))
            return 0
        return run_command(name, config_name, prepare_overrides(name, rest), debug)
    except PrunefrontError as error:
        return _report_error(error, debug)
    except KeyboardInterrupt:
        errors.print(
            "interrupted; what is finished is kept: search on with resume=<run>, fine-tune with the same command",
            style="yellow",
        )
        return 130


def experiment_config(arguments: Sequence[str]) -> tuple[str, list[str]]:
    """The configuration of the experiment that the first argument names, and the other arguments."""
    name, *rest = arguments or [""]
    if name not in EXPERIMENTS:
        raise ConfigError(f"prunefront experiment takes the name of one first: {', '.join(EXPERIMENTS)}")
    return f"experiment/{name}", rest


def experiments_help() -> str:
    """What there is to reproduce."""
    lines = [(experiment.__doc__ or "").splitlines()[0], "", "usage: prunefront experiment NAME [OPTION=VALUE ...]", ""]
    for name in EXPERIMENTS:
        text = (resources.files("prunefront.conf") / "experiment" / f"{name}.yaml").read_text(encoding="utf-8")
        lines.append(f"  {name:11} {text.splitlines()[1].lstrip('# ')}")
    return "\n".join([*lines, "", "prunefront experiment NAME --help shows the options."])


def run_command(name: str, config_name: str, overrides: Sequence[str], debug: bool) -> int:
    """Compose the configuration and run the command, once or (``-m``) for every combination."""
    command = COMMANDS[name][0]
    failed, own_process = [], os.getpid()

    def job(config: DictConfig) -> Any:
        try:
            return command(config)
        except PrunefrontError as error:
            failed.append(_report_error(error, debug))
            if os.getpid() != own_process:  # of a launcher, which tells this one
                raise

    if debug:
        os.environ["HYDRA_FULL_ERROR"] = "1"
    register()
    before = sys.argv
    sys.argv = [f"prunefront {name}", *overrides]
    try:
        hydra.main(version_base="1.3", config_path="pkg://prunefront.conf", config_name=config_name)(job)()
    finally:
        sys.argv = before
    return 1 if failed else 0


def prepare_overrides(name: str, arguments: Sequence[str]) -> list[str]:
    """Our shorthands in Hydra's terms: a run as first argument, ``--json``, ``resume=RUN``, free keys of a task."""
    overrides = list(arguments)
    if name in POSITIONAL:
        overrides = _with_runs(name, overrides)
    if "--json" in overrides:
        if name not in WITH_JSON:
            raise ConfigError(f"--json is an option of {', '.join(WITH_JSON)}; prunefront {name} does not have it")
        overrides = ["json=true" if argument == "--json" else argument for argument in overrides]
    resumed = [a for a in overrides if a.startswith("resume=")]
    if resumed:
        if name != "search" or {"-m", "--multirun"} & set(overrides):
            raise ConfigError("resume=RUN continues one run of the search command; it does not go with -m")
        overrides.remove(resumed[-1])
        run_dir = Path(resumed[-1].removeprefix("resume="))
        kept = inherited(run_dir, overrides, f"prunefront search resume={run_dir}")
        overrides = [*kept, *overrides, f"run_dir={_quoted(str(run_dir))}"]
    if name == "worker":
        overrides = _joining(overrides)
    if name in ("pick", "show", "finetune", "export"):
        overrides = [f"pick.names{a.removeprefix('pick')}" if a.startswith("pick=") else a for a in overrides]
    if name == "finetune":
        overrides = [*_of_the_search(overrides), *overrides]
    # Hydra's parser wants all overrides in one piece.
    overrides.sort(key=lambda argument: argument not in ("-m", "--multirun"))
    return [f"++{a}" if a.startswith(OPEN_KEYS) else a for a in overrides]


def _with_runs(name: str, overrides: list[str]) -> list[str]:
    """Folders at the beginning as the option ``run``: one, or several where the command takes them."""
    runs = list(itertools.takewhile(lambda text: "=" not in text and not text.startswith("-"), overrides))
    if len(runs) > 1 and name not in SEVERAL_RUNS:
        raise ConfigError(f"prunefront {name} takes one run, not {len(runs)}: {shlex.join(runs)}")
    if not runs:
        return overrides
    quoted = ",".join(map(_quoted, runs))
    return [f"run={quoted}" if len(runs) == 1 else f"run=[{quoted}]", *overrides[len(runs) :]]


def _joining(overrides: Sequence[str]) -> list[str]:
    """A worker has the options of the search whose folder comes first, where that is on this machine."""
    run = next((text for text in overrides if _key(text) in ("run", "run_dir")), None)
    if run is None:
        raise ConfigError("prunefront worker takes the folder of a search first")
    run_dir = Path(json.loads(text) if (text := run.partition("=")[2]).startswith('"') else text.strip("'"))
    rest = [text for text in overrides if text != run]
    kept = inherited(run_dir, rest, f"prunefront worker {run_dir}") if (run_dir / ".hydra").exists() else []
    kept = [text for text in kept if _key(text) != "workers"]
    return [*kept, *rest, f"run_dir={_quoted(str(run_dir))}"]


def inherited(run_dir: Path, overrides: Sequence[str], command: str, keys: Sequence[str] = ()) -> list[str]:
    """The overrides that the run was started with, all or those of ``keys``, without the ones given anew.

    A run's files never choose which code is run: overrides of task=custom must be given again. ``command`` is what the
    user is told to repeat with them.
    """
    stored = _stored_overrides(run_dir)
    given = {_key(override) for override in overrides}
    kept = [override for override in stored if _key(override) not in given | {"run_dir"}]
    # Of a choice that was made anew, such as another tracker, the old one's options say nothing.
    chosen = tuple(f"{_key(override)}." for override in overrides if override not in stored)
    kept = [override for override in kept if not override.startswith(chosen)]
    kept = [override for override in kept if not keys or _key(override).partition(".")[0] in keys]
    foreign = [override for override in kept if not _is_harmless(override, stored)]
    if foreign:
        raise ConfigError(
            f"{run_dir} was started with code of its own, which is not run because a file says so; "
            f"if it is yours, repeat: {command} {shlex.join(foreign)}"
        )
    return kept


def _of_the_search(overrides: Sequence[str]) -> list[str]:
    """Task and tracker of the run that is fine-tuned; none where the user names a task for a run of the Python API."""
    given = {_key(override): override.partition("=")[2].strip("'") for override in overrides}
    run_dir = Path(given.get("run", ""))
    if "run" not in given or ("task" in given and not (run_dir / ".hydra").exists()):
        return []
    return inherited(run_dir, overrides, f"prunefront finetune {shlex.quote(str(run_dir))}", ("task", "tracker"))


def _stored_overrides(run_dir: Path) -> list[str]:
    path = run_dir / ".hydra" / "overrides.yaml"
    if not path.exists():
        raise StorageError(f"{run_dir} is no run of the search command: it has no .hydra/overrides.yaml")
    try:
        stored = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
    except Exception as error:  # YAML's and OmegaConf's errors have no common root
        raise StorageError(f"{path} is damaged: {error}") from error
    if not isinstance(stored, list) or not all(isinstance(override, str) for override in stored):
        raise StorageError(f"{path} is damaged: it is no list of overrides")
    return [override.replace("++", "", 1) if override.startswith("++") else override for override in stored]


def _is_harmless(override: str, stored: Sequence[str]) -> bool:
    """Sets a plain value of a built-in choice; names no code."""
    key = _key(override)
    if "_target_" in override or "${" in override or key.startswith(("~", "+", "hydra")):
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


def _key(override: str) -> str:
    return override.partition("=")[0]


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


def _report_error(error: PrunefrontError, debug: bool) -> int:
    if debug:
        raise error
    errors.print(f"[bold red]error[/] {type(error).__name__}: ", end="")
    errors.print(str(error), markup=False, highlight=False, soft_wrap=True)
    return 1


def usage() -> str:
    """The commands, each with an example."""
    lines = ["Find and build smaller PyTorch models by structured pruning.", "", "commands:"]
    lines += [f"  {name:11} {(command.__doc__ or '').splitlines()[0]}" for name, (command, _) in COMMANDS.items()]
    lines += ["", "examples:", *(f"  {example}" for _, example in COMMANDS.values())]
    lines += [
        "  prunefront search resume=runs/a n_trials=400",
        "  prunefront search -m budget.macs=30%,50%,70% seed=0,1",
        "",
        "prunefront COMMAND --help shows a command's options; --debug shows tracebacks.",
    ]
    return "\n".join(lines)


def command_help(name: str, config_name: str) -> str:
    """The command's options with their defaults and meanings: its configuration file, and the choices beside it."""
    command, example = COMMANDS[name]
    files = resources.files("prunefront.conf")
    text = (files / f"{config_name}.yaml").read_text(encoding="utf-8")
    options = text.partition("- _self_\n")[2].partition("\nhydra:")[0].strip()
    argument = " RUN" if name in POSITIONAL else config_name.removeprefix(name).replace("/", " ")
    lines = [(command.__doc__ or "").splitlines()[0], "", f"usage: prunefront {name}{argument} [OPTION=VALUE ...]"]
    lines += [f"  {example}", "", "options and their defaults (Hydra overrides, such as budget.macs=40%):", ""]
    lines += [f"  {line}" for line in options.splitlines()]
    for group in ("task", "space", "finetune", "target", "tracker"):
        if f"- {group}:" in text:
            lines += ["", f"{group}=... one of"]
            for file in sorted((files / group).iterdir(), key=lambda file: file.name):
                content = file.read_text(encoding="utf-8")
                lines.append(f"  {file.name.removesuffix('.yaml'):13} {content.splitlines()[0].lstrip('# ')}")
                body = content.partition("- _self_\n")[2].strip()
                lines += [f"    {group}.{line}" for line in body.splitlines()]
    if name == "search":
        lines += ["", "resume=RUN n_trials=N continues a run up to N trials; -m runs all combinations of values."]
    return "\n".join(lines)
