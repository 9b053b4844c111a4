"""Documentation: links lead somewhere, generated pages are current, every command is one that exists, and
those that need no more than this machine are run."""

import importlib.util
import re
import shlex
import shutil
from pathlib import Path

import pytest
from hydra import compose, initialize_config_module
from hydra.core.global_hydra import GlobalHydra

from prunefront.runners import cli
from prunefront.runners.config import register

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
#: Options that make a command of the documents small; the last of an option counts.
SMALL = {
    "search": ["task.width=4", "task.epochs=1", "n_trials=3", "finalists=1", "tracker=none"],
    "rounds": ["task.width=4", "task.epochs=1", "n_trials=2", "rounds=1", "finetune.epochs=1", "tracker=none"],
    "space": ["task.width=4", "task.epochs=1"],
    "measure": ["task.width=4", "task.epochs=1", "latency.most=8", "latency.measurement_s=0.2"],
    "finetune": ["finetune.epochs=1", "tracker=none"],
}
#: What a command needs that is not here; these are only composed.
ABSENT = {
    "cifar_resnet": "images",
    "hf_": "texts",
    "shearing": "minutes",
    "li2016": "images",
    "michel2019": "a text",
    "my_module": "a module",
    "ssh": "another machine",
    "cuda": "a GPU",
    "tensorrt": "a GPU",
    "on_my_board": "a board",
    "storage=": "a database",
    "worker": "a search that is running",
    "task=...": "a task",
    "-m": "many runs",
    "resume=": "the options of a test's run",
    "dashboard": "a server that ends",
    "runs/llama": "a language model",
    "run_dir=runs/b": "a fine-tuned model",
    "runs/m": "a multirun",
    "trial00": "names that another run has",
    "start=": "a fine-tuned model",
    "latency": "minutes of measuring: tests/runners/test_targets.py",
    "target=": "minutes of measuring: tests/runners/test_targets.py",
}


def commands() -> list[str]:
    """Every `prunefront` line of a shell block, once, without its comment."""
    found: dict[str, None] = {}
    for page in PAGES:
        for block in re.findall(r"```sh\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL):
            for line in block.replace("\\\n", " ").splitlines():
                text = re.sub(r"\s+#.*$", "", line)
                text = text[text.index("prunefront ") :] if re.match(r"(\w+=\S+ )*prunefront ", text) else ""
                if text:
                    found[" ".join(text.split())] = None
    return list(found)


COMMANDS = commands()


def absent(command: str) -> str | None:
    return next((reason for part, reason in ABSENT.items() if part in command), None)


@pytest.fixture
def hydra():
    GlobalHydra.instance().clear()
    register()
    with initialize_config_module("prunefront.conf", version_base="1.3"):
        yield


@pytest.fixture
def runs(tmp_path, digits_run, ended_front):
    """A folder with what the documents call runs/a and so on."""
    for name, run in (("a", digits_run), ("b", digits_run), ("front", ended_front), ("within", digits_run)):
        shutil.copytree(run, tmp_path / "runs" / name)
    return tmp_path


@pytest.fixture(scope="module")
def ended_front(tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("front") / "front"
    options = ["task.width=4", "task.epochs=2", "n_trials=6", "mode=front", "sampler=random", "tracker=none"]
    assert cli.main(["search", *options, f"run_dir={run_dir}"]) == 0
    return run_dir


def test_there_are_commands():
    assert len(COMMANDS) > 50 and sum(absent(command) is None for command in COMMANDS) > 20


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_composes(command, hydra, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    name, *arguments = shlex.split(command)[1:]
    assert name in cli.COMMANDS
    if "--help" in arguments or "-m" in arguments:
        arguments = [a for a in arguments if a not in ("--help", "-m")]
        arguments = [re.sub(r"=(.*?),.*$", r"=\1", argument) for argument in arguments]
    config_name = name.replace("-", "_")
    if name == "experiment":
        config_name, arguments = cli.experiment_config(arguments)
    arguments = [argument for argument in arguments if not argument.startswith("resume=") and argument != "task=..."]
    if name in ("worker", "finetune"):  # they read options of the run, which is not here
        arguments = [argument for argument in arguments if "=" in argument]
        arguments = [f"pick.names{a.removeprefix('pick')}" if a.startswith("pick=") else a for a in arguments]
    else:
        arguments = cli.prepare_overrides(name, arguments)
    compose(config_name=config_name, overrides=list(arguments))


@pytest.mark.parametrize("command", [command for command in COMMANDS if absent(command) is None])
def test_commands_that_need_this_machine_alone_run(command, runs, monkeypatch, tmp_path):
    monkeypatch.chdir(runs)
    name, *arguments = shlex.split(command)[1:]
    own = [argument for argument in arguments if not argument.startswith("run_dir=")]
    if "tracker." in command:
        monkeypatch.setenv("WANDB_MODE", "offline")
    extra = [f"run_dir={tmp_path}/run"] if name in ("search", "rounds") else []
    if any("warm_start" in argument for argument in own):
        extra += ["task.epochs=2"]  # the model that the run is of
    small = [option for option in SMALL.get(name, ()) if "--help" not in own]
    if "tracker." in command:
        small.remove("tracker=none")
    assert cli.main([name, *own, *small, *extra]) == 0


def slug(heading: str) -> str:
    """GitHub's name of a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith("http"):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{page.name} links to {target}"
        if anchor:
            headings = re.findall(r"^#+ (.*)$", file.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in map(slug, headings), f"{page.name} links to {target}"
    for name in re.findall(r"`((?:docs|examples|benchmarks|search|spaces|runners|conf)/[\w./]+\.\w+)`", text):
        assert (ROOT / name).exists(), f"{page.name} names {name}"


@pytest.mark.parametrize("page", ["options", "api"])
def test_generated_pages_are_current(page):
    spec = importlib.util.spec_from_file_location("generate", ROOT / "docs" / "generate.py")
    assert spec is not None and spec.loader is not None
    generate = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(generate)
    expected = generate.WRITTEN + getattr(generate, page)()
    assert (ROOT / "docs" / f"{page}.md").read_text(encoding="utf-8") == expected, "run python docs/generate.py"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_in_the_documents_is_python(page):
    for block in re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL):
        if page.name != "api.md":  # signatures
            compile(block, str(page), "exec")
