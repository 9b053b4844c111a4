"""Discovery without recipes on the zoo of tests/models.py, beside Torch-Pruning (`pip install torch-pruning`).

Run: python -m benchmarks.zoo [--models a,b] [--out benchmarks/zoo.json] [--without-peer] [--timeout-s 120]

Neither tool is told anything about an architecture: no head counts, no custom pruners, no list of parameters.
Torch-Pruning is told, as its documentation asks, which layers make the output, and key-value caches, on which its
graph fails, are turned off for it; prunefront gets neither help. Both remove 30 % and 60 % of every group. A
candidate must run, with outputs of the dense shape. Where it leaves the widths of LayerNorm, RMSNorm and GroupNorm
whole, it must also equal the dense model in which the same elements are zero. (Statistics over a normalised width
change with that width: no tool can be equal there.) Torch-Pruning needs a new graph for every candidate.

Every model and tool has a process of its own, one at a time.
"""

from __future__ import annotations

import argparse
import copy
import importlib.metadata
import importlib.util
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map

if TYPE_CHECKING:
    import prunefront

ROOT = Path(__file__).resolve().parent.parent
RATIOS = (0.3, 0.6)
#: Fresh candidates whose median is reported, fewer if they take longer than the limit.
CANDIDATES, CANDIDATES_LIMIT_S = 5, 20.0
#: Largest difference relative to the largest output. Some models compute their norms in single precision.
TOLERANCE = 1e-6
COLUMNS = ("model", "params", "groups", "prunable", "trace", "proof", "candidate", "equals mask")
PEER_COLUMNS = ("TP groups", "TP build", "TP candidate", "Torch-Pruning's result")

Row = dict[str, Any]


# What both tools share.


def outputs_of(output: Any) -> list[torch.Tensor]:
    """The logits if the output has them, else all of its tensors."""
    logits = getattr(output, "logits", None)
    leaves = [logits] if isinstance(logits, torch.Tensor) else tree_leaves(output)
    return [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]


def forward(model: nn.Module, inputs: Any) -> list[torch.Tensor]:
    torch.manual_seed(0)
    if isinstance(inputs, Mapping):
        return outputs_of(model(**inputs))
    return outputs_of(model(*inputs) if isinstance(inputs, tuple) else model(inputs))


def run(model: nn.Module, inputs: Any) -> list[torch.Tensor]:
    """The outputs in evaluation mode and double precision; ``model`` itself is converted.

    The grouped product of experts exists in single precision only.
    """
    grouped = any("Experts" in type(module).__name__ for module in model.modules())
    dtype = torch.float32 if grouped else torch.float64
    converted = tree_map(lambda x: x.to(dtype) if isinstance(x, torch.Tensor) and x.is_floating_point() else x, inputs)
    with torch.no_grad():
        return [output.double() for output in forward(model.to(dtype).eval(), converted)]


def difference(left: list[torch.Tensor], right: list[torch.Tensor]) -> float:
    """The largest difference relative to the largest value, over all outputs."""
    pairs = zip(left, right, strict=True)
    return max((a - b).abs().max().item() / max(a.abs().max().item(), 1e-300) for a, b in pairs)


def check_output(model: nn.Module, inputs: Any, shapes: list[torch.Size]) -> list[torch.Tensor]:
    """The outputs of a candidate. Raises ValueError if their shapes differ from the dense model's, or not finite."""
    outputs = run(model, inputs)
    if (found := [output.shape for output in outputs]) != shapes:
        raise ValueError(f"the output has shape {tuple(found[0])} instead of {tuple(shapes[0])}")
    if not all(output.isfinite().all() for output in outputs):
        raise ValueError("the output is not finite")
    return outputs


def count_params(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def timed(function: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    value = function()
    return time.perf_counter() - start, value


def candidates(make: Callable[[], Row]) -> Row:
    """The median of every number that ``make`` returns for one fresh candidate."""
    rows, start = [make()], time.perf_counter()
    while len(rows) < CANDIDATES and time.perf_counter() - start < CANDIDATES_LIMIT_S:
        rows.append(make())
    return {key: statistics.median(row[key] for row in rows) for key in rows[0]} | {"candidates": len(rows)}


def explain(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"


def tiny() -> tuple[nn.Module, torch.Tensor]:
    """What each tool is tried on before the clock runs, for what it imports when it is first used."""
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 3, 3)), torch.randn(1, 3, 8, 8)


class Report:
    """What a child knows so far. Every step prints it as a line, so that a child that is killed leaves its steps."""

    def __init__(self) -> None:
        self.row: Row = {}

    def add(self, values: Row) -> None:
        self.row |= values
        print(json.dumps(self.row), flush=True)

    def step(self, name: str, function: Callable[[], Row]) -> bool:
        """Add what ``function`` returns, or its error under ``errors[name]``; whether it succeeded."""
        try:
            self.add(function())
        except Exception as error:  # the tools' and the models' errors are what is being measured
            self.add({"errors": self.row.get("errors", {}) | {name: explain(error)}})
            return False
        return True


# prunefront


def measure_prunefront(report: Report, model: nn.Module, inputs: Any) -> None:
    import prunefront

    prunefront.discover(*tiny())
    shapes = [output.shape for output in forward(model, inputs)]
    spaces: list[prunefront.Space] = []

    def discover() -> Row:
        seconds, space = timed(lambda: prunefront.discover(model, inputs))
        spaces.append(space)
        parts = getattr(space, "seconds", {})
        return {
            "discover_s": seconds,
            "trace_s": parts.get("trace"),
            "proof_s": parts.get("proof"),
            "groups": len(space.groups),
            "exact_groups": sum(group.exact for group in space.groups),
            "frozen_by_proof": sum("failed its proof" in frozen.reason for frozen in space.frozen),
            "kinds": dict(Counter(group.kind for group in space.groups)),
        }

    if report.step("discover", discover):
        space = spaces[0]
        report.step("exact", lambda: {"difference": exact_difference(space, inputs, shapes)})
        report.step("all", lambda: {"runs": runs_with_all(space, inputs, shapes)})
        report.step("prunable", lambda: {"prunable_share": prunable_share(space, model)})
        generator = random.Random(0)
        report.step("candidate", lambda: candidates(lambda: time_plan(space, generator)))


def exact_difference(space: prunefront.Space, inputs: Any, shapes: list[torch.Size]) -> float | None:
    """Candidates of the exact groups against the masked dense model; None where no group is exact."""
    exact = [group.name for group in space.groups if group.exact]
    if not exact:
        return None
    found = []
    for ratio in RATIOS:
        widths = space.uniform(ratio).widths
        plan = space.plan({name: widths[name] for name in exact})
        found.append(difference(run(space.mask(plan), inputs), check_output(space.apply(plan), inputs, shapes)))
    return max(found)


def runs_with_all(space: prunefront.Space, inputs: Any, shapes: list[torch.Size]) -> bool:
    for ratio in RATIOS:
        check_output(space.apply(space.uniform(ratio)), inputs, shapes)
    return True


def prunable_share(space: prunefront.Space, model: nn.Module) -> float:
    smallest = space.apply(space.plan({group.name: least_width(group) for group in space.groups}))
    return 1 - count_params(smallest) / count_params(model)


def least_width(group: prunefront.Group) -> int:
    return min(group.size, max(group.at_least, group.multiple_of))


def time_plan(space: prunefront.Space, generator: random.Random) -> Row:
    drawn = {group.name: generator.randint(1, group.size) for group in space.groups}
    step = {group.name: group.multiple_of for group in space.groups}
    least = {group.name: least_width(group) for group in space.groups}
    plan = space.plan({name: max(least[name], width // step[name] * step[name]) for name, width in drawn.items()})
    return {"candidate_s": timed(lambda: space.apply(plan))[0]}


# Torch-Pruning


def measure_torch_pruning(report: Report, model: nn.Module, inputs: Any) -> None:
    warm = TorchPruning(*tiny())
    warm.pruner(warm.model, RATIOS[0]).step()
    config: Any = getattr(model, "config", None)
    if hasattr(config, "use_cache"):
        config.use_cache = False
    shapes = [output.shape for output in forward(model, inputs)]
    peer = TorchPruning(model, inputs)

    def build() -> Row:
        dense = copy.deepcopy(model)
        seconds, pruner = timed(lambda: peer.pruner(dense, RATIOS[0]))
        groups = pruner.DG.get_all_groups(pruner.ignored_layers, pruner.root_module_types)
        return {"ignored_layers": peer.ignored, "build_s": seconds, "groups": len(list(groups))}

    if not report.step("build", build):
        return
    report.step("all", lambda: peer.run_all(shapes))
    report.step("exact", lambda: peer.difference(shapes))
    report.step("candidate", lambda: candidates(peer.time_candidate))


class TorchPruning:
    """Torch-Pruning on one model, as its README shows it. Reference: https://arxiv.org/abs/2301.12900."""

    def __init__(self, model: nn.Module, inputs: Any) -> None:
        # A bare tensor would be tried unpacked first, which counts its layers twice.
        self.inputs = inputs if isinstance(inputs, tuple | Mapping) else (inputs,)
        self.model = model
        self.ignored = output_layers(model, inputs)

    def pruner(self, model: nn.Module, ratio: float) -> Any:
        """A pruner of ``model``, a copy of the dense model."""
        import torch_pruning

        return torch_pruning.pruner.MagnitudePruner(
            model,
            self.inputs,
            importance=torch_pruning.importance.MagnitudeImportance(p=1),
            pruning_ratio=ratio,
            ignored_layers=[model.get_submodule(name) for name in self.ignored],
            output_transform=outputs_of,
            # Its defaults are dictionaries that all pruners of a process share.
            in_channel_groups={},
            out_channel_groups={},
        )

    def run_all(self, shapes: list[torch.Size]) -> Row:
        """Prune every group. Raises what the candidate raises."""
        for ratio in RATIOS:
            candidate = copy.deepcopy(self.model)
            pruner = self.pruner(candidate, ratio)
            pruner.step()
            if not pruner.pruning_history():
                raise ValueError("nothing was pruned")
            check_output(candidate, self.inputs, shapes)
        return {"runs": True}

    def difference(self, shapes: list[torch.Size]) -> Row:
        """Candidates that leave normalised widths whole, against the masked dense model."""
        found, groups = [], 0
        for ratio in RATIOS:
            candidate = copy.deepcopy(self.model)
            pruner = self.pruner(candidate, ratio)
            for group in pruner.step(interactive=True):
                if not normalises(pruner, group):
                    group.prune()
            history = pruner.pruning_history()
            groups = len(history)
            if history:
                outputs = check_output(candidate, self.inputs, shapes)
                found.append(difference(run(self.masked(history), self.inputs), outputs))
        return {"exact_groups": groups, "difference": max(found, default=None)}

    def masked(self, history: list[Any]) -> nn.Module:
        """The dense model with zeros for the elements that ``history`` removes.

        The history is replayed on a model whose parameters hold the positions of their own elements: what is left
        tells what was kept.
        """
        positions = copy.deepcopy(self.model)
        pruner = self.pruner(positions, RATIOS[0])
        positions.double()
        for parameter in positions.parameters():
            parameter.data = torch.arange(parameter.numel(), dtype=torch.float64).view(parameter.shape)
        pruner.load_pruning_history(history)
        kept = dict(positions.named_parameters(remove_duplicate=False))
        masked = copy.deepcopy(self.model)
        for name, parameter in list(masked.named_parameters(remove_duplicate=False)):
            mask = torch.zeros(parameter.numel())
            mask[kept[name].detach().long().flatten()] = 1
            module, _, attribute = name.rpartition(".")
            # Torch-Pruning unties tied parameters: so does the mask.
            setattr(masked.get_submodule(module), attribute, nn.Parameter(parameter.data * mask.view(parameter.shape)))
        return masked

    def time_candidate(self) -> Row:
        """Seconds to build the graph and to prune. Copying the model is not counted."""
        copy_s, candidate = timed(lambda: copy.deepcopy(self.model))
        build_s, pruner = timed(lambda: self.pruner(candidate, 0.5))
        prune_s, _ = timed(pruner.step)
        return {"candidate_s": build_s + prune_s, "candidate_copy_s": copy_s, "candidate_prune_s": prune_s}


def normalises(pruner: Any, group: Any) -> bool:
    """Whether the group changes the width of a LayerNorm, an RMSNorm or a GroupNorm."""
    owners = [dependency.target.module for dependency, _ in group]
    for index, owner in enumerate(owners):
        if isinstance(owner, nn.Parameter):
            module, _, _ = pruner.DG._param_to_name[owner].rpartition(".")
            owners[index] = pruner.model.get_submodule(module)
    kinds = [type(owner).__name__.lower() for owner in owners]
    return any("norm" in kind and "batchnorm" not in kind and "instancenorm" not in kind for kind in kinds)


def output_layers(model: nn.Module, inputs: Any) -> list[str]:
    """Names of the linear and convolution layers from which the output comes with no such layer in between."""
    names: dict[Any, str] = {}
    hooks = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.modules.conv._ConvNd) or type(module).__name__ == "Conv1D":
            hook = module.register_forward_hook(lambda _m, _i, output, name=name: names.update({output.grad_fn: name}))
            hooks.append(hook)
    todo = [output.grad_fn for output in forward(model, inputs)]
    for hook in hooks:
        hook.remove()
    found, seen = set(), set()
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if node in names:
            found.add(names[node])
        else:
            todo += [function for function, _ in node.next_functions]
    return sorted(found)


# One process for each tool and model.

TOOLS: dict[str, Callable[[Report, nn.Module, Any], None]] = {
    "prunefront": measure_prunefront,
    "torch-pruning": measure_torch_pruning,
}


def measure_here(tool: str, name: str) -> None:
    """The child: print what ``tool`` does on the model ``name`` as lines of JSON, of which the last counts."""
    from tests.models import build

    warnings.filterwarnings("ignore")
    model, inputs = build(name)
    report = Report()
    report.add({"params": count_params(model)})
    TOOLS[tool](report, model, inputs)


def measure(tool: str, name: str, timeout_s: float) -> Row:
    """The last report of a child, with ``errors["process"]`` if it did not end by itself."""
    command = [sys.executable, "-m", "benchmarks.zoo", "--one", tool, name]
    try:
        child = subprocess.run(command, cwd=ROOT, capture_output=True, timeout=timeout_s)
        output, problem = child.stdout, None
        if child.returncode:
            last = child.stderr.decode(errors="replace").strip().splitlines()[-1:]
            problem = f"exit status {child.returncode} {' '.join(last)}"
    except subprocess.TimeoutExpired as expired:
        output, problem = expired.stdout or b"", f"timeout after {timeout_s:g} s"
    row: Row = {}
    for line in output.decode(errors="replace").splitlines():
        if line.startswith("{") and line.endswith("}"):
            row = json.loads(line)
    if problem:
        row["errors"] = row.get("errors", {}) | {"process": problem}
    return row


# The table


def result_cell(row: Row) -> str:
    """``equal``, or what is wrong, in a few words."""
    errors = row.get("errors", {})
    if early := errors.get("discover") or errors.get("build"):
        return shorten(f"fails: {early}")
    if row.get("groups") == 0:
        return "nothing to prune"
    # A child that was killed may have got far enough.
    if "runs" not in row and "all" not in errors:
        return shorten(errors.get("process", "no report"))
    agreement = agreement_of(row)
    if "all" not in errors:
        return shorten(agreement)
    failure = shorten(f"fails: {errors['all']}")
    return failure if agreement.startswith("fails") else f"{failure}; exact groups alone: {shorten(agreement)}"


def agreement_of(row: Row) -> str:
    """Whether candidates equal the masked dense model, where that can be."""
    errors = row.get("errors", {})
    if "exact" in errors:
        return f"fails: {errors['exact']}"
    if "difference" not in row:
        return f"runs, not compared: {errors.get('process', 'no report')}"
    if row["difference"] is None:
        return "runs, no exact group"
    of = "" if row["exact_groups"] == row["groups"] else f" ({row['exact_groups']} exact groups)"
    return f"equal{of}" if row["difference"] <= TOLERANCE else f"differs by {row['difference']:.0e}{of}"


def shorten(text: str, length: int = 90) -> str:
    text = text.replace("|", "/").replace("\n", " ")
    return text if len(text) <= length else f"{text[: length - 1]}…"


def seconds_cell(row: Row, key: str) -> str:
    value = row.get(key)
    return "" if value is None else f"{value:.3f} s" if value < 0.1 else f"{value:.2f} s"


def groups_cell(row: Row) -> str:
    """The number of groups, by kind where there are kinds, and what a failed proof froze (`space.frozen`)."""
    if "groups" not in row:
        return ""
    kinds = ", ".join(f"{count} {kind}" for kind, count in row.get("kinds", {}).items())
    left_out = f"; {row['frozen_by_proof']} frozen by proof" if row.get("frozen_by_proof") else ""
    return f"{row['groups']} ({kinds}){left_out}" if kinds else str(row["groups"])


def cells(name: str, found: Mapping[str, Row]) -> list[str]:
    ours = found["prunefront"]
    params = next((row["params"] for row in found.values() if "params" in row), None)
    share = ours.get("prunable_share")
    line = [name, "" if params is None else f"{params / 1e6:.2f} M", groups_cell(ours)]
    line.append("" if share is None else f"{100 * share:.0f} %")
    # Without its parts, discovery is reported as a whole.
    line.append(seconds_cell(ours, "trace_s" if ours.get("trace_s") is not None else "discover_s"))
    line += [seconds_cell(ours, "proof_s"), seconds_cell(ours, "candidate_s"), result_cell(ours)]
    if (peer := found.get("torch-pruning")) is not None:
        line += [groups_cell(peer), seconds_cell(peer, "build_s"), seconds_cell(peer, "candidate_s"), result_cell(peer)]
    return line


def table(rows: Sequence[tuple[str, Mapping[str, Row]]], peer: bool) -> str:
    columns = (*COLUMNS, *PEER_COLUMNS) if peer else COLUMNS
    lines = [columns, ["---"] * len(columns), *(cells(name, found) for name, found in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def machine() -> Row:
    """The processor and the versions that the numbers belong to."""
    processor = platform.processor() or platform.machine()
    if (cpuinfo := Path("/proc/cpuinfo")).exists():
        names = [line.partition(":")[2].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        processor = names[0] if names else processor
    versions: dict[str, str | None] = {}
    for package in ("torch", "torchvision", "timm", "transformers", *TOOLS):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    return {
        "processor": processor,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": versions,
    }


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.zoo", description=__doc__.splitlines()[0])
    parser.add_argument("--models", help="names in tests/models.py, separated by commas; all without it")
    parser.add_argument("--out", type=Path, help="also write everything as JSON to this file")
    parser.add_argument("--without-peer", action="store_true", help="measure prunefront only")
    parser.add_argument("--timeout-s", type=float, default=120, help="limit of one model with one tool")
    parser.add_argument("--one", nargs=2, metavar=("TOOL", "MODEL"), help=argparse.SUPPRESS)
    return parser.parse_args()


def earlier_rows(path: Path | None) -> dict[str, Mapping[str, Row]]:
    """Rows of an earlier run in the same file: those of other models stay."""
    if path is None or not path.exists():
        return {}
    models = json.loads(path.read_text())["models"]
    return {row.pop("model"): row for row in models}


def main() -> None:
    options = arguments()
    if options.one:
        return measure_here(*options.one)
    from tests.models import ZOO

    names = options.models.split(",") if options.models else list(ZOO)
    if unknown := [name for name in names if name not in ZOO]:
        sys.exit(f"unknown models {', '.join(unknown)}; the zoo has {', '.join(ZOO)}")
    if not options.without_peer and importlib.util.find_spec("torch_pruning") is None:
        sys.exit("this compares with Torch-Pruning: pip install torch-pruning, or pass --without-peer")
    tools = [tool for tool in TOOLS if tool == "prunefront" or not options.without_peer]
    before = {**machine(), "load_average": os.getloadavg()[0]}
    rows = earlier_rows(options.out)
    for number, name in enumerate(names, 1):
        found = {}
        for tool in tools:
            found[tool] = measure(tool, name, options.timeout_s)
            print(f"{number}/{len(names)} {name}, {tool}: {result_cell(found[tool])}", file=sys.stderr, flush=True)
        rows[name] = found
        if options.out:
            settings = {"ratios": RATIOS, "tolerance": TOLERANCE, "timeout_s": options.timeout_s}
            models = [{"model": model, **rows[model]} for model in ZOO if model in rows]
            options.out.write_text(json.dumps({"machine": before, **settings, "models": models}, indent=2) + "\n")
    print(table([(name, rows[name]) for name in ZOO if name in rows], peer=not options.without_peer))


if __name__ == "__main__":
    main()
