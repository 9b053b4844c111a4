"""The ``prunefront`` command: a subcommand, then Hydra overrides."""

from __future__ import annotations

import difflib
import importlib
import logging
import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib import metadata, resources
from importlib.resources.abc import Traversable
from pathlib import Path
from types import FrameType
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException
from rich.text import Text

from ..spaces.errors import ConfigError, PrunefrontError, StorageError
from .config import register
from .display import errors
from .experiments import EXPERIMENTS
from .mistakes import check_complete, explained
from .overrides import POSITIONAL, forget_options, hide_storage, is_unused, prepare_overrides
from .runs import MULTIRUN

#: What a shell says of a process that SIGTERM has ended.
TERMINATED = 128 + signal.SIGTERM


@dataclass(frozen=True)
class Command:
    """``where``: its module and function, imported when it runs, since most of them wait seconds for torch;
    ``summary``: the first line of that function's description; ``example``: a call that works."""

    where: str
    summary: str
    example: str

    @property
    def function(self) -> Callable[[DictConfig], Any]:
        module, _, name = self.where.partition(":")
        found: Callable[[DictConfig], Any] = getattr(importlib.import_module(f".{module}", __package__), name)
        return found


COMMANDS = {
    "space": Command(
        "commands:space",
        "Show what can be pruned, at which share of the cost, what cannot and why, and how small the model can get.",
        "prunefront space task=digits",
    ),
    "search": Command(
        "commands:search",
        "Search within a budget or along the front, and save the models that were found.",
        "prunefront search task=digits budget.macs=40% n_trials=200",
    ),
    "measure": Command(
        "commands:measure",
        "Measure plans of a model on a target until their latency can be predicted, and show how well it can.",
        "prunefront measure task=digits target=onnxruntime",
    ),
    "front": Command(
        "viewing:front",
        "Show the front of a run, or the picks of a multirun; with a budget, what holds it and the best of that.",
        "prunefront front runs/a pick.macs=30%",
    ),
    "pick": Command(
        "viewing:pick",
        "Print the folder of the best model within a budget, for other programs.",
        "prunefront pick runs/a pick.macs=30%",
    ),
    "show": Command(
        "viewing:show",
        "Show one model of a run in detail: scores and costs beside the dense model's, and the width of every group.",
        "prunefront show runs/a",
    ),
    "finetune": Command(
        "finetuning.command:command",
        "Train picked models of a run back, with or without the dense model as a teacher.",
        "prunefront finetune runs/a pick.macs=50% finetune.distill.weight=0.5",
    ),
    "export": Command(
        "exporting.command:command",
        "Write a picked model as ONNX, a torch.export program, safetensors, OpenVINO or a Hugging Face checkpoint.",
        "prunefront export runs/a pick.macs=50% format=onnx",
    ),
    "worker": Command(
        "workers:command",
        "Join a search that another process has begun, from this machine or another, until it is over.",
        "prunefront worker runs/a storage=postgresql://user@host/studies",
    ),
    "rounds": Command(
        "rounds:command",
        "Search and fine-tune in rounds of ever smaller budgets, each from the model of the one before.",
        "prunefront rounds task=digits budget.macs=20% rounds=3 finetune.epochs=3",
    ),
    "experiment": Command(
        "experiments:command",
        "Reproduce a published system in several steps: tables, figures and models.",
        "prunefront experiment li2016 epochs=10",
    ),
    "load-check": Command(
        "viewing:load_check",
        "Load a saved model as a stranger would, and compare it with what was written down about it.",
        "prunefront load-check runs/a",
    ),
    "dashboard": Command(
        "dashboard:command",
        "Open optuna-dashboard on the study of a run, finished or not: all trials with plans, costs and constraints.",
        "prunefront dashboard runs/a",
    ),
    "report": Command(
        "viewing:report",
        "Write report.html of a finished run again, or one page that compares several runs.",
        "prunefront report runs/a runs/b",
    ),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status."""
    if argv is None:
        _end_cleanly_when_terminated()
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(usage())
        return 0
    name, *rest = arguments
    if name == "--version":
        print(metadata.version("prunefront"))
        return 0
    if name not in COMMANDS:
        nearest = difflib.get_close_matches(name, COMMANDS, n=1)
        told = f"did you mean {nearest[0]}?" if nearest else f"expected one of {', '.join(COMMANDS)}"
        errors.print(f"unknown command {name!r}; {told}", style="red")
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
            print(command_help(name, config_name, rest))
            return 0
        return run_command(name, config_name, prepare_overrides(name, rest), debug)
    except PrunefrontError as error:
        return _report_error(error, debug)
    except BrokenPipeError:
        return _output_is_closed()
    except OSError as error:
        return _report_error(refused(error), debug)
    except KeyboardInterrupt:
        errors.print(
            "interrupted; what is finished is kept: search on with resume=<run>, fine-tune with the same command",
            style="yellow",
        )
        return TERMINATED if signal.getsignal(signal.SIGTERM) is signal.SIG_IGN else 130
    except SystemExit as ended:
        if ended.code == TERMINATED:
            errors.print("terminated; what is finished is kept, as after Ctrl-C", style="yellow")
        raise


def _end_cleanly_when_terminated() -> None:
    """kill, timeout and Slurm send SIGTERM: processes beside this one are ended too, and temporary folders removed."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, partial(_terminated, os.getpid()))


def _terminated(own_process: int, number: int, frame: FrameType | None) -> None:
    signal.signal(number, signal.SIG_IGN if os.getpid() == own_process else signal.SIG_DFL)
    if os.getpid() != own_process:  # a fork, which has nothing to clean up
        os.kill(os.getpid(), number)
        return
    by_ctrl_c = signal.getsignal(signal.SIGINT)
    if callable(by_ctrl_c) and by_ctrl_c is not signal.default_int_handler:
        by_ctrl_c(signal.SIGINT, frame)  # a fine-tuning ends its step and saves its state
    else:
        sys.exit(TERMINATED)


def experiment_config(arguments: Sequence[str]) -> tuple[str, list[str]]:
    """The configuration of the experiment that the first argument names, and the other arguments."""
    name, *rest = arguments or [""]
    if name not in EXPERIMENTS:
        raise ConfigError(f"prunefront experiment takes the name of one first: {', '.join(EXPERIMENTS)}")
    return f"experiment/{name}", rest


def experiments_help() -> str:
    """What there is to reproduce."""
    lines = [COMMANDS["experiment"].summary, "", "usage: prunefront experiment NAME [OPTION=VALUE ...]", ""]
    for name in EXPERIMENTS:
        text = (resources.files("prunefront.conf") / "experiment" / f"{name}.yaml").read_text(encoding="utf-8")
        lines.append(f"  {name:11} {text.splitlines()[1].lstrip('# ')}")
    return "\n".join([*lines, "", "prunefront experiment NAME --help shows the options."])


def run_command(name: str, config_name: str, overrides: Sequence[str], debug: bool) -> int:
    """Compose the configuration and run the command, once or (``-m``) for every combination."""
    failed, own_process = [], os.getpid()

    def job(config: DictConfig) -> Any:
        folder = Path(HydraConfig.get().runtime.output_dir)
        # A multirun's table tells of jobs without a result.
        is_multirun = HydraConfig.get().mode == RunMode.MULTIRUN
        may_go = is_unused(folder) and folder != Path.cwd() and not is_multirun
        if is_multirun:
            hide_storage(Path(hydra.utils.get_original_cwd(), HydraConfig.get().sweep.dir, MULTIRUN))
        try:
            check_complete(config, f"prunefront {name}", COMMANDS[name].example)
            return COMMANDS[name].function(config)
        except BrokenPipeError:
            _output_is_closed()
        except (PrunefrontError, OSError) as error:
            if may_go:
                forget_options(folder)
            failed.append(_report_error(error if isinstance(error, PrunefrontError) else refused(error), debug))
            if os.getpid() != own_process:  # of a launcher, which tells this one
                raise

    register()
    try:
        with _called_with([f"prunefront {name}", *overrides]):
            hydra.main(version_base="1.3", config_path="pkg://prunefront.conf", config_name=config_name)(job)()
    except (HydraException, OmegaConfBaseException) as error:
        if debug:
            raise
        raise explained(error, f"prunefront {name}", config_name, overrides) from error
    finally:
        _close_logs()
    return 1 if failed else 0


@contextmanager
def _called_with(arguments: list[str]) -> Iterator[None]:
    """Hydra reads the program's own arguments; its errors are raised and not printed."""
    argv, before = sys.argv, os.environ.pop("HYDRA_FULL_ERROR", None)
    sys.argv, os.environ["HYDRA_FULL_ERROR"] = arguments, "1"
    try:
        yield
    finally:
        sys.argv = argv
        del os.environ["HYDRA_FULL_ERROR"]
        if before is not None:
            os.environ["HYDRA_FULL_ERROR"] = before


def _close_logs() -> None:
    """What this process does next is not the run's."""
    for handler in [handler for handler in logging.root.handlers if isinstance(handler, logging.FileHandler)]:
        logging.root.removeHandler(handler)
        handler.close()


def _output_is_closed() -> int:
    """The reader of a pipe, such as head, has seen enough: nothing else is written, at Python's end neither."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def refused(error: OSError) -> PrunefrontError:
    """What the system refuses, such as a folder that cannot be made."""
    if error.filename is None:
        return PrunefrontError(f"the system says: {error.strerror or error}")
    return StorageError(f"{error.filename} cannot be read or written: {error.strerror or error}")


def _report_error(error: PrunefrontError, debug: bool) -> int:
    if debug:
        raise error
    errors.print(Text.assemble(("error", "bold red"), f" {type(error).__name__}: {error}"), soft_wrap=True)
    return 1


def usage() -> str:
    """The commands, each with an example."""
    lines = ["Find and build smaller PyTorch models by structured pruning.", "", "commands:"]
    lines += [f"  {name:11} {command.summary}" for name, command in COMMANDS.items()]
    lines += ["", "examples:", *(f"  {command.example}" for command in COMMANDS.values())]
    lines += [
        "  prunefront search resume=runs/a n_trials=400",
        "  prunefront search -m budget.macs=30%,50%,70% seed=0,1",
        "",
        "prunefront COMMAND --help shows a command's options; --debug shows tracebacks.",
    ]
    return "\n".join(lines)


def command_help(name: str, config_name: str, arguments: Sequence[str] = ()) -> str:
    """The command's options with their defaults and meanings: its configuration file, and the choices beside it; of a
    choice that is among ``arguments``, its options too."""
    chosen = {key: value for key, _, value in (text.partition("=") for text in arguments)}
    files = resources.files("prunefront.conf")
    text = (files / f"{config_name}.yaml").read_text(encoding="utf-8")
    options = text.partition("- _self_\n")[2].partition("\nhydra:")[0].strip()
    argument = " RUN" if name in POSITIONAL else config_name.removeprefix(name).replace("/", " ")
    command = COMMANDS[name]
    lines = [command.summary, "", f"usage: prunefront {name}{argument} [OPTION=VALUE ...]"]
    lines += [f"  {command.example}", "", "options and their defaults (Hydra overrides, such as budget.macs=40%):", ""]
    lines += [f"  {line}" for line in options.splitlines()]
    groups = re.findall(r"^  - (\w+): (\w+)$", text, re.MULTILINE)
    for group, default in groups:
        is_of_run = name in ("finetune", "worker") and group in ("task", "tracker")
        lines += _choices(files / group, group, "that of the run" if is_of_run else default, chosen.get(group))
    if groups:
        lines += ["", f"With a choice, such as {groups[0][0]}={groups[0][1]}, --help shows its options too."]
    if name == "search":
        lines += ["", "resume=RUN n_trials=N continues a run up to N trials; -m runs all combinations of values."]
    return "\n".join(lines)


def _choices(folder: Traversable, group: str, default: str, chosen: str | None) -> list[str]:
    """What ``group=`` can be, a line each, with the options of the ``chosen`` one."""
    lines = ["", f"{group}=... one of ({default} by default)"]
    files = sorted(folder.iterdir(), key=lambda file: file.name)
    longest = max(len(file.name.removesuffix(".yaml")) for file in files)
    for file in files:
        name = file.name.removesuffix(".yaml")
        content = file.read_text(encoding="utf-8")
        lines.append(f"  {name:{longest}} {content.splitlines()[0].lstrip('# ')}")
        if name == chosen:
            body = content.partition("- _self_\n")[2].strip()
            lines += [f"    {line}" if line.startswith("#") else f"    {group}.{line}" for line in body.splitlines()]
    return lines
