"""What the command line shows: progress, tables, log messages, all on one console."""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from numpy.typing import NDArray
from optuna.trial import TrialState
from rich.console import Console, RenderableType
from rich.console import Group as Lines
from rich.logging import RichHandler
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from ..search.latency import Failed, LatencyModel
from ..search.stairs import LEAST_WIDTHS, PERIODS, Stairs, override
from ..search.study import finished
from ..spaces import Space
from ..spaces.groups import Frozen, Group
from .finetuning import Progress as Point

#: Log messages pass above a live progress bar only when both are written by the same console.
console = Console()
errors = Console(stderr=True)


class ConsoleHandler(RichHandler):
    """For the logging configuration in ``conf/``."""

    def __init__(self, level: int | str = logging.NOTSET) -> None:
        super().__init__(level=level, console=console, show_path=False, show_time=False)


class SearchProgress:
    """A live bar with the best score and its cost; one more trial at every call."""

    def __init__(self, n_trials: int, objective: str, dense: Mapping[str, float]) -> None:
        self.objective, self.dense = objective, dense
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[best]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
        )
        self.bar = self.progress.add_task("searching", total=n_trials, best="")
        self.judged: TaskID | None = None

    def __enter__(self) -> SearchProgress:
        self.progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.progress.stop()

    def __call__(self, study: optuna.Study, trial: optuna.trial.FrozenTrial) -> None:
        trials = study.get_trials(deepcopy=False)
        done = sum(t.state == TrialState.COMPLETE or "error" in t.user_attrs for t in trials)
        self.progress.update(self.bar, completed=done, best=self.best(study))

    def judging(self, done: int, of: int) -> None:
        """After the last trial: a second bar, of the models that are repaired thoroughly and scored in full."""
        if self.judged is None:
            self.judged = self.progress.add_task("judging", total=of, best="")
        self.progress.update(self.judged, completed=done)

    def best(self, study: optuna.Study) -> str:
        trials = finished(study)
        if not trials:
            return "no score yet"
        best, guide = max(trials, key=lambda t: t.values[0]), (study.metric_names or ["score"])[0]
        share = best.user_attrs["costs"][self.objective] / self.dense[self.objective]
        return f"{guide} {best.values[0]:.4f} at {share:.1%} {self.objective}"


class TrainingProgress:
    """A live bar with loss, score and rate; one more point at every call."""

    def __init__(self, title: str) -> None:
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[told]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
        )
        self.bar = self.progress.add_task(title, total=None, told="")
        self.rate, self.score = "", ""

    def __enter__(self) -> TrainingProgress:
        self.progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.progress.stop()

    def __call__(self, point: Point) -> None:
        if point.score is not None:
            self.score = f"score {point.score:.4f}"
        if point.steps_per_s is not None:
            self.rate = f"{point.steps_per_s:.3g} steps/s"
        told = ", ".join(part for part in (f"loss {point.loss:.4g}", self.score, self.rate) if part)
        self.progress.update(self.bar, completed=point.step, total=point.steps, told=told)


def finetuned_table(
    found: Mapping[str, Mapping[str, Any]], dense: Mapping[str, float], score_name: str = "score"
) -> Table:
    """``found``: metrics of fine-tuned models by name; those from before stand with ``_before``."""
    table = Table(caption=f"{score_name} before and after; differences are to the dense model")
    for heading in ("model", "search, before", "after", "test, before", "after", "MACs", "steps"):
        table.add_column(heading, justify="left" if heading == "model" else "right")
    for name, metrics in found.items():
        scores = [
            _score(metrics.get(key), dense.get(split))
            for split in ("score", "test")
            for key in (f"{split}_before", split)
        ]
        table.add_row(name, *scores, _count(metrics.get("macs"), dense.get("macs")), f"{metrics['steps']:,}")
    return table


def front_table(
    entries: Sequence[Mapping[str, Any]], picked: str, dense: Mapping[str, float], score_name: str = "score"
) -> Table:
    """``entries``: name and metrics of each model of the front; ``dense``: those of the dense model, where known."""
    table = Table(caption="shares are of the dense model; the test split was used for these models only")
    table.add_column("model")
    kinds = dict(_KINDS)
    if any("latency_ratio" in entry for entry in entries):
        kinds["latency_ms"] = ("latency", _milliseconds)
    for heading, _ in kinds.values():
        table.add_column(heading.format(score=score_name), justify="right")

    def _cells(metrics: Mapping[str, Any], dense: Mapping[str, Any]) -> list[str]:
        return [kind(metrics.get(key), dense.get(key)) for key, (_, kind) in kinds.items()]

    table.add_row("dense", *_cells(dense, {}), end_section=True)
    chosen = next(entry for entry in entries if entry["name"] == picked)
    table.add_row(f"picked ({picked})", *_cells(chosen, dense), style="bold green", end_section=True)
    for entry in entries:
        table.add_row(entry["name"], *_cells(entry, dense))
    return table


def multirun_table(rows: Sequence[Mapping[str, Any]], overrides: Sequence[str], best: str) -> Table:
    """``rows``: name and metrics of the pick of each ``run``, with those of its ``dense`` model."""
    table = Table(caption="shares are of the dense model of each run; the best score is marked")
    table.add_column("run")
    table.add_column("overrides", no_wrap=len(max(overrides, key=len)) <= MOST_OVERRIDES)
    shown = {key: kind for key, kind in _KINDS.items() if key != "params" and any(key in row for row in rows)}
    if any("latency_ratio" in row for row in rows):
        shown["latency_ms"] = ("latency", _milliseconds)
    for heading, _ in shown.values():
        table.add_column(heading.format(score="score"), justify="right")
    for row, text in zip(rows, overrides, strict=True):
        cells = [kind(row.get(key), row["dense"].get(key)) for key, (_, kind) in shown.items()]
        table.add_row(Path(row["run"]).name, text, *cells, style="bold green" if row["run"] == best else None)
    return table


#: Characters of a full bar, and of overrides that have a line of their own.
BAR, MOST_OVERRIDES = 20, 32


def bar(share: float) -> str:
    return "█" * round(BAR * share)


def _milliseconds(value: float | None, dense: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.3g} ms" if dense is None else f"{value:.3g} ms ({value / dense:.1%})"


def _score(value: float | None, dense: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.4f}" if dense is None else f"{value:.4f} ({value - dense:+.4f})"


def _count(value: float | None, dense: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,.0f}" if dense is None else f"{value:,.0f} ({value / dense:.1%})"


#: Columns of the table of models: headings, and how values are written.
_KINDS: dict[str, tuple[str, Callable[[float | None, float | None], str]]] = {
    "score": ("{score} (search)", _score),
    "test": ("{score} (test)", _score),
    "macs": ("MACs", _count),
    "params": ("params", _count),
}

#: Siblings in the tree of a space that differ by their number alone are shown once from this many on.
FOLDED_FROM = 3
#: So many names of frozen parts are shown for one reason, and of tied groups for one dimension.
NAMES_SHOWN = 3


@dataclass
class _Node:
    """One line of the tree and what is below it; ``cells`` is None where a module has no group of its own."""

    label: str
    cells: tuple[str, ...] | None = None
    notes: tuple[str, ...] = ()
    #: Positions of what the line stands for, in the order of ``space.dimensions``.
    dimensions: list[int] = field(default_factory=list)
    count: int = 1
    children: dict[str, _Node] = field(default_factory=dict)
    #: The modules below that have nothing else in them, as part of this line.
    rest: str = ""

    @property
    def shape(self) -> Hashable:
        """Equal for lines that read the same but for their label."""
        below = tuple((child.label, child.shape) for child in self.children.values())
        return self.rest, self.count, self.cells, self.notes, below


#: A name with the guides before it, and what it names; None for a note on the line above.
_Line = tuple[str, _Node | None]


def space_view(space: Space) -> RenderableType:
    """The groups as a tree of modules, what is frozen and why, and how small the model can get."""
    tied = space.tied_groups
    lines = list(_lines(_forest(space, tied)))
    parts: list[RenderableType] = [_space_tree(space, tied, lines), _space_legend(space, lines)]
    if space.frozen:
        parts += [Text(f"\n{len(space.frozen)} frozen, by reason:"), _frozen_table(space.frozen)]
    return Lines(*parts, Text(), _cost_table(space), Text(), _discovery(space))


def _space_tree(space: Space, tied: Sequence[Sequence[Group]], lines: Sequence[_Line]) -> Table:
    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column(_count_of_groups(space), overflow="fold")
    table.add_column("kind", no_wrap=True)
    for name in ("size", "widths", "tensors", "MACs", "params"):
        table.add_column(name, justify="right", no_wrap=True)
    shares = iter(_shares(space, [node.dimensions for _, node in lines if node and node.cells]))
    for name, node in lines:
        if node is None or node.cells is None:
            table.add_row(Text(name, style="dim"))
            continue
        tensors = {member.tensor for index in node.dimensions for group in tied[index] for member in group.members}
        share = [f"{part:.1%}" for part in next(shares)]
        table.add_row(Text(name), *node.cells, str(len(tensors) or ""), *share)
    return table


def _count_of_groups(space: Space) -> str:
    groups, dimensions = len(space.groups), len(space.dimensions)
    counted = f"{groups} group{'s' if groups > 1 else ''}"
    return counted if groups == dimensions else f"{counted}, {dimensions} widths"


def _forest(space: Space, tied: Sequence[Sequence[Group]]) -> list[_Node]:
    """What spans modules, then the tree of the module paths."""
    spanning, root = [], _Node("")
    lows, highs = space.smallest_widths(), space.round_widths(space.sizes.astype(np.float64))
    for index, (name, groups) in enumerate(zip(space.dimensions, tied, strict=True)):
        widths = f"{lows[index]}..{highs[index]}" if lows[index] < highs[index] else str(lows[index])
        step = max(space.options.step(group) for group in groups)
        size = f"{groups[0].size}{'' if all(group.exact for group in groups) else '~'}"
        cells = (groups[0].kind, size, widths if step == 1 else f"{widths} by {step}")
        if len(groups) > 1 or "*" in name or groups[0].name == "hidden":
            node = _Node(name, count=len(groups))
            spanning.append(node)
        else:
            node = _at(root, name)
        node.cells, node.notes, node.dimensions = cells, _notes(name, groups), [index]
    return [*spanning, *_folded(root.children.values(), FOLDED_FROM)]


def _at(root: _Node, path: str) -> _Node:
    for part in path.split("."):
        root = root.children.setdefault(part, _Node(part))
    return root


def _notes(name: str, groups: Sequence[Group]) -> tuple[str, ...]:
    """The units of blocks, and the groups of a dimension whose name does not say them."""
    units = [unit for group in groups for unit in group.blocks]
    if units:
        above, _, below = name.partition("*") if "*" in name else (f"{name}.", "", "")
        within = [unit.removeprefix(above).removesuffix(below) for unit in units] if len(groups) == 1 else units
        return (f"units {_some(folded_names(within), len(within))}",)
    if len(groups) == 1 or "*" in name:
        return ()
    names = folded_names(group.name for group in groups)
    return (*names[:NAMES_SHOWN], *([f"and {len(names) - NAMES_SHOWN} more"] if len(names) > NAMES_SHOWN else []))


def _folded(nodes: Iterable[_Node], least: int) -> list[_Node]:
    """Chains of single children joined, and siblings that read the same but for a number at the end as one."""
    alike: dict[Hashable, list[tuple[int, _Node]]] = {}
    for node in nodes:
        below = _folded(node.children.values(), least)
        node.children = {child.label + child.rest: child for child in below}
        if node.cells is None and len(below) == 1:
            (only,) = below
            joined = f".{only.label}{only.rest}"
            node = _Node(node.label, only.cells, only.notes, only.dimensions, only.count, only.children, joined)
        prefix, number = _numbered(node.label)
        key = (prefix, node.shape) if number is not None else node.label
        alike.setdefault(key, []).append((number or 0, node))
    found: list[_Node] = []
    for same in alike.values():
        found += [_merged(same)] if len(same) >= least else [node for _, node in same]
    return found


def _merged(same: Sequence[tuple[int, _Node]]) -> _Node:
    merged = _sum([node for _, node in same])
    numbers = number_range([number for number, _ in same])
    merged.label = _numbered(merged.label)[0] + (f"{{{numbers}}}" if "," in numbers else numbers)
    return merged


def _sum(nodes: Sequence[_Node]) -> _Node:
    first = nodes[0]
    dimensions = [index for node in nodes for index in node.dimensions]
    children = {key: _sum([list(node.children.values())[i] for node in nodes]) for i, key in enumerate(first.children)}
    count = sum(node.count for node in nodes)
    return _Node(first.label, first.cells, first.notes, dimensions, count, children, first.rest)


def _numbered(label: str) -> tuple[str, int | None]:
    found = re.fullmatch(r"(.*?)(0|[1-9]\d*)", label)
    return (found[1], int(found[2])) if found else (label, None)


def number_range(numbers: Iterable[int]) -> str:
    """``0..11``, ``0,2..10`` or ``0..2,4,7..9``."""
    ordered = sorted(numbers)
    steps = {after - before for before, after in pairwise(ordered)}
    if len(ordered) > 3 and len(steps) == 1 and steps != {1}:
        return f"{ordered[0]},{ordered[1]}..{ordered[-1]}"
    runs: list[list[int]] = []
    for number in ordered:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ",".join(f"{run[0]}..{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)


def folded_names(names: Iterable[str]) -> list[str]:
    """Names of modules, those that differ by numbers alone as one: ``layers.0..11.mlp``."""
    root = _Node("")
    for name in names:
        _at(root, name).cells = ()

    def paths(nodes: Iterable[_Node], above: str) -> Iterator[str]:
        for node in nodes:
            path = above + node.label + node.rest
            if node.cells is not None:
                yield path
            yield from paths(node.children.values(), f"{path}.")

    return list(paths(_folded(root.children.values(), least=2), ""))


def _some(names: Sequence[str], count: int) -> str:
    """The first few; ``count`` is what all of ``names`` stand for."""
    shown = ", ".join(names[:NAMES_SHOWN])
    return shown if len(names) <= NAMES_SHOWN else f"{shown} ... ({count} in all)"


def _lines(nodes: Sequence[_Node], guide: str | None = None) -> Iterator[_Line]:
    """The tree from top to bottom."""
    for node in nodes:
        last = node is nodes[-1]
        branch = "" if guide is None else guide + ("└─ " if last else "├─ ")
        below = "" if guide is None else guide + ("   " if last else "│  ")
        times = f" x{node.count}" if node.count > 1 else ""
        yield f"{branch}{node.label}{node.rest}{times}", node
        children = list(node.children.values())
        for note in node.notes:
            yield f"{below}{'│  ' if children else '   '}{note}", None
        yield from _lines(children, below)


def _shares(space: Space, lines: Sequence[Sequence[int]]) -> NDArray[np.float64]:
    """For every line, what of MACs and params goes when its dimensions are at their smallest, and no others."""
    widths = np.tile(space.sizes, (len(lines), 1))
    smallest = space.smallest_widths()
    for row, dimensions in enumerate(lines):
        widths[row, dimensions] = smallest[dimensions]
    dense = np.array([space.dense_cost.macs, space.dense_cost.params], dtype=np.float64)
    shares: NDArray[np.float64] = (dense - space.cost_batch(widths)[:, :2]) / np.maximum(dense, 1)
    return shares


def _space_legend(space: Space, lines: Sequence[_Line]) -> Text:
    told = ["MACs, params: the share of the dense model that goes at a line's smallest width"]
    if any(node is not None and node.count > 1 for _, node in lines):
        told.append("xN: N groups of that size; their tensors and shares are counted together")
    if all(group.exact for group in space.groups):
        told.append("all groups are exact: the smaller model equals the masked one")
    else:
        told.append("~ inexact: smaller and masked model differ by nature; all others are exact")
    return Text("\n".join(told), style="dim")


def _frozen_table(frozen: Sequence[Frozen]) -> Table:
    """One line a reason; reasons that differ by the number of a layer alone are one."""
    found: dict[str, list[Frozen]] = {}
    for part in frozen:
        found.setdefault(re.sub(r"\b[A-Za-z_]\w*(\.\w+)+", _without_numbers, part.reason), []).append(part)
    table = Table.grid(padding=(0, 1, 0, 0))
    table.add_column(justify="right")
    table.add_column(overflow="fold")
    for reason, parts in found.items():
        told = parts[0].reason if len({part.reason for part in parts}) == 1 else reason
        names = _some(folded_names(part.name for part in parts), len(parts))
        table.add_row(f"{len(parts)}", Text.assemble(f"{told}: ", (names, "dim")))
    return table


def _without_numbers(path: re.Match[str]) -> str:
    return re.sub(r"\d+(?=\.|$)", "*", path[0])


def _cost_table(space: Space) -> Table:
    table = Table.grid(padding=(0, 2, 0, 0))
    for name in ("cost", "dense", "smallest", "share"):
        table.add_column(justify="left" if name == "cost" else "right")
    table.add_row("", "dense", "smallest")
    smallest = space.cost_batch(space.smallest_widths()[None])[0]
    for (name, dense), least in zip(asdict(space.dense_cost).items(), smallest, strict=True):
        table.add_row(name, f"{dense:,.0f}", f"{least:,.0f}", f"{least / max(dense, 1):.1%}")
    return table


def _discovery(space: Space) -> Text:
    parts = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in space.seconds.items())
    return Text(
        f"Discovery took {sum(space.seconds.values()):.1f} s ({parts}). Of a forward whose control flow depends on "
        "data, only the branch that the example inputs take is seen."
    )


def latency_view(model: LatencyModel, target: Mapping[str, Any]) -> RenderableType:
    """Measured plans beside what is predicted for them, and how far predictions are off in cross-validation."""
    widths = np.array([measured.widths for measured in model.measured])
    predicted, macs = model.ratios(widths), model.space.cost_batch(widths)[:, 0] / model.space.dense_cost.macs
    table = Table(title="measured plans, slowest first; shares are of the dense model")
    for name in ("MACs", "latency", "predicted", "off by"):
        table.add_column(name, justify="right")
    for row in sorted(range(len(widths)), key=lambda index: -model.measured[index].ratio):
        ratio = model.measured[row].ratio
        table.add_row(f"{macs[row]:.1%}", f"{ratio:.1%}", f"{predicted[row]:.1%}", f"{predicted[row] / ratio - 1:+.1%}")
    facts = ", ".join(f"{key} {value}" for key, value in target.items() if value is not None)
    summary = _failures(model.known.failed) + (
        f"{facts}\ndense model {model.dense_ms:.3g} ms; predictions are off by {model.error:.1%} on average in "
        f"cross-validation, Kendall's tau {model.tau:.2f}, from {len(widths)} plans"
    )
    return Lines(table, Text(summary))


def _failures(failed: Sequence[Failed]) -> str:
    """A line for each reason; empty where nothing failed."""
    reasons = Counter(plan.reason for plan in failed)
    lines = [f"{count} more cannot be measured: {reason}\n" for reason, count in reasons.most_common()]
    return "".join(lines) + ("refresh=true tries them again\n" if failed else "")


#: Lines of a chart of latency against width.
CHART_LINES = 6


def stairs_view(found: Sequence[Stairs], target: Mapping[str, Any]) -> RenderableType:
    """Latency against width, how well steps of any period explain it, and what to search with."""
    if not found:
        return Text(f"no group of this space has {LEAST_WIDTHS} widths: there are no steps to be seen")
    table = Table(title="error of held-out times, in % of the dense model, with steps of so many units")
    table.add_column("kind", no_wrap=True)
    table.add_column("group", overflow="fold")
    for name in ("none", *map(str, PERIODS[1:]), "round_to"):
        table.add_column(name, justify="right", no_wrap=True)
    for stairs in found:
        errors = [f"{100 * stairs.errors[period]:.2f}" for period in PERIODS]
        table.add_row(stairs.kind, stairs.dimension, *errors, str(stairs.round_to))
    charts = [Text(f"\nlatency of {stairs.dimension} against its width\n{_chart(stairs)}") for stairs in found]
    facts = ", ".join(f"{key} {value}" for key, value in target.items() if value is not None)
    return Lines(table, *charts, Text(f"\n{facts}\nsearch with: '{override(found)}'"))


def _chart(stairs: Stairs) -> str:
    """A column a width, in eighths of a line."""
    low, high = min(stairs.ratios), max(stairs.ratios)
    heights = [round((ratio - low) / max(high - low, 1e-9) * 8 * CHART_LINES) for ratio in stairs.ratios]
    lines = []
    for line in reversed(range(CHART_LINES)):
        label = {CHART_LINES - 1: f"{high:.1%}", 0: f"{low:.1%}"}.get(line, "")
        columns = "".join(" ▁▂▃▄▅▆▇█"[min(max(height - 8 * line, 0), 8)] for height in heights)
        lines.append(f"{label:>7} {columns}".rstrip())
    first, last = str(stairs.widths[0]), str(stairs.widths[-1])
    return "\n".join([*lines, f"{'':7} {first}{last:>{max(len(heights) - len(first), 1)}}"])
