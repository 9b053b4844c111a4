"""Write docs/options.md from the configurations, and docs/api.md from the docstrings.

Run: python docs/generate.py
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from importlib import resources
from pathlib import Path

import prunefront
from prunefront.runners.cli import COMMANDS

DOCS = Path(__file__).parent
WRITTEN = "<!-- written by docs/generate.py -->\n\n"
#: Groups of options in the order of the page.
GROUPS = ("space", "target", "task", "finetune", "tracker")
_LINE = re.compile(r"^(?P<indent> *)(?P<key>[\w]+):\s*(?P<rest>.*)$")


def options() -> str:
    """Every option of every command and group, with its default and what its comment says."""
    lines = [
        "# Options",
        "",
        "Every option of the command line, from the files in `conf/`, which Hydra composes: "
        "`prunefront COMMAND option=value`. `prunefront COMMAND --help` shows the same. Types are checked against the "
        "structured configurations in "
        "`runners/config.py`; a name that does not exist is an error.",
        "",
        "## Commands",
    ]
    conf = Path(str(resources.files("prunefront.conf")))
    for name, command in COMMANDS.items():
        path = conf / f"{name.replace('-', '_')}.yaml"
        if not path.exists():
            continue
        description = inspect.getdoc(command.function) or ""
        lines += ["", f"### prunefront {name}", "", description, "", f"`{command.example}`", ""]
        lines += [*_chosen(path), *_table(path)]
    for title, folder in [("Experiments", "experiment"), *((f"`{group}=`", group) for group in GROUPS)]:
        lines += ["", f"## {title}"]
        for path in sorted((conf / folder).glob("*.yaml")):
            first = path.read_text(encoding="utf-8").splitlines()[:2]
            what = next(text for text in first if not text.startswith("# @"))
            name = f"prunefront experiment {path.stem}" if folder == "experiment" else f"{folder}={path.stem}"
            lines += ["", f"### {name}", "", what.lstrip("# ") + ".", "", *_table(path)]
    return "\n".join(lines) + "\n"


def _chosen(path: Path) -> list[str]:
    """The groups that a command has, with what is chosen by default."""
    found = re.findall(r"^  - (\w+): (\w+)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    return [f"Groups: {', '.join(f'`{group}={name}`' for group, name in found)}.", ""] if found else []


def _table(path: Path) -> list[str]:
    rows = list(_rows(path.read_text(encoding="utf-8")))
    return ["| option | default | |", "| --- | --- | --- |", *rows] if rows else ["No options."]


def _rows(text: str) -> Iterator[str]:
    """A row a key, in order; comments of whole lines belong to the next key."""
    above: list[str] = []
    parents: list[tuple[int, str]] = []
    body = text.partition("  - _self_")[2]
    for line in body.splitlines():
        if line.startswith("hydra:"):
            return
        if line.startswith("#"):
            above.append(line.lstrip("# "))
            continue
        match = _LINE.match(line)
        if not match:
            continue
        parents = [(indent, key) for indent, key in parents if indent < len(match["indent"])]
        parents.append((len(match["indent"]), match["key"]))
        value, _, comment = match["rest"].partition("#")
        name = ".".join(key for _, key in parents)
        default = value.strip() or "—"
        shown = "required" if default == "???" else default if default == "—" else f"`{default}`"
        yield f"| `{name}` | {_cell(shown)} | {_cell(' '.join([*above, comment.strip()]).strip())} |"
        above = []


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def api() -> str:
    """Everything that `import prunefront` gives."""
    lines = ["# Python API", "", "What `import prunefront` gives. Errors are subclasses of `PrunefrontError`.", ""]
    for name in sorted(prunefront.__all__, key=lambda name: (not name[0].islower(), name)):
        thing = getattr(prunefront, name)
        lines += [f"## {name}", ""]
        if inspect.isclass(thing):
            lines += [*_described(name, thing), *_methods(thing)]
        else:
            lines += _described(name, thing)
    return "\n".join(lines).rstrip() + "\n"


def _described(name: str, thing: object) -> list[str]:
    text = _text(thing)
    if inspect.isclass(thing) and issubclass(thing, Exception):
        return [text, ""]
    return ["```python", f"{name}{_signature(thing)}", "```", "", text, ""]


def _methods(thing: type) -> list[str]:
    lines: list[str] = []
    for name, member in vars(thing).items():
        if name.startswith("_"):
            continue
        if isinstance(member, property) and member.fget and member.fget.__doc__:
            lines += [f"- **{name}**: {_text(member.fget)}", ""]
        elif inspect.isfunction(member) and member.__doc__:
            lines += ["```python", f"{thing.__name__}.{name}{_signature(member)}", "```", "", _text(member), ""]
    return lines


def _signature(thing: object) -> str:
    signature = inspect.signature(thing)  # type: ignore[arg-type]
    shown = [str(parameter) for parameter in signature.parameters.values() if parameter.name != "self"]
    kinds = [p.kind for p in signature.parameters.values() if p.name != "self"]
    if inspect.Parameter.KEYWORD_ONLY in kinds and inspect.Parameter.VAR_POSITIONAL not in kinds:
        shown.insert(kinds.index(inspect.Parameter.KEYWORD_ONLY), "*")
    returned = "" if signature.return_annotation is inspect.Signature.empty else f" -> {signature.return_annotation}"
    text = f"({', '.join(shown)}){returned}"
    if len(text) > 100:
        text = "(\n" + "".join(f"    {parameter},\n" for parameter in shown) + f"){returned}"
    text = re.sub(r"(: |-> )'([^']*)'", r"\1\2", text)  # annotations are strings
    text = re.sub(r"<factory>|<object object at 0x[0-9a-f]+>", "...", text)
    return re.sub(r"<class '(?:\w+\.)*(\w+)'>", r"\1", text)


def _text(thing: object) -> str:
    """A docstring as Markdown: roles as code, sections of Google style as lists."""
    text = inspect.getdoc(thing) or ""
    text = re.sub(r":(?:class|func|meth|data|attr):`~?\.?([\w.]+)`", r"`\1`", text).replace("``", "`")
    text = re.sub(r"^(Raises|Returns|Args|Yields):$", r"**\1**\n", text, flags=re.MULTILINE)
    text = re.sub(r"\n {8,}(\S)", r" \1", text)
    return re.sub(r"^    (\S)", r"- \1", text, flags=re.MULTILINE)


if __name__ == "__main__":
    for file, content in (("options.md", options()), ("api.md", api())):
        (DOCS / file).write_text(WRITTEN + content, encoding="utf-8")
