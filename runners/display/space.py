"""A space as a tree of modules with the costs of its groups."""

from __future__ import annotations

import re
from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray
from rich.console import Group as Lines
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from ...spaces import Space
from ...spaces.groups import Frozen, Group

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
    smallest = space.smallest_costs()
    for (name, dense), least in zip(asdict(space.dense_cost).items(), smallest, strict=True):
        table.add_row(name, f"{dense:,.0f}", f"{least:,.0f}", f"{least / max(dense, 1):.1%}")
    return table


def _discovery(space: Space) -> Text:
    parts = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in space.seconds.items())
    return Text(
        f"Discovery took {sum(space.seconds.values()):.1f} s ({parts}). Of a forward whose control flow depends on "
        "data, only the branch that the example inputs take is seen."
    )
