"""Every command of the documents is run in small, here or by a test that is named here: on small models, on the
processor instead of a GPU, over ssh to this machine."""

import json
import random
import re
import shlex
import shutil
import sys
from pathlib import Path

import pytest
from hydra import compose, initialize_config_module
from hydra.core.global_hydra import GlobalHydra

from benchmarks.postgresql import postgresql, programs
from prunefront.runners import cli
from prunefront.runners.config import register
from prunefront.runners.tasks import vocabulary
from tests.services import missing

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]

#: Commands of several processes, and the tests that run them.
ELSEWHERE = {
    "hydra/launcher=joblib": "test_launchers.py::test_every_job_is_a_search_and_one_table_shows_all",
    "hydra/launcher=submitit_local": "test_launchers.py::test_every_job_is_a_search_and_one_table_shows_all",
    "hydra/launcher=submitit_slurm": "test_launchers.py::test_searches_and_workers_run_on_slurm",
    "workers=": "test_worker_command.py::test_workers_share_the_trials_of_a_search",
    "check=true": "test_shearing.py::test_the_shapes_of_the_paper_can_be_had_from_llama_2",
    "steps=true": "test_cli.py::test_steps_of_latency_are_shown",
    "dashboard": "test_dashboard.py::test_the_dashboard_shows_plans_costs_and_constraints",
}

QUICK = ["latency.most=16", "latency.error=1", "latency.measurement_s=0.1", "latency.tolerance=0.5"]
TRIALS = ["n_trials=2", "finalists=1"]
TEXTS = ["task.sequence_length=16", "task.batch_size=4"]
LANGUAGE = [*TEXTS, "task.calibration_sequences=8"]
SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
SHEARING = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 8}
#: Options that make commands small, by what stands in these; of an option that is given twice the last counts.
SMALL = {
    r"^(search|rounds|space|measure)(?!.*task=(cifar|hf_|custom))(?!.*resume=)": ["task.width=4", "task.epochs=2"],
    r"task=cifar": ["task.depth=20", "task.calibration_images=128"],
    r"task=hf_causal": LANGUAGE,
    r"task=hf_text": [*TEXTS, "task.calibration_texts=8"],
    r"hidden_size=256": [*(f"task.config.{key}={value}" for key, value in SIZES.items()), "task.epochs=0.1"],
    r"^(search|rounds) ": TRIALS,
    r"resume=": ["n_trials=8"],
    r"^rounds ": ["rounds=2", "finetune.epochs=0.5"],
    r"^finetune ": ["finetune.epochs=0.5"],
    r"finetune.steps": ["finetune.steps=2"],
    r"^(search(?!.*(tracker\.|--help))|rounds|finetune) ": ["tracker=none"],
    r"(target|latency)": QUICK,
    r"budget.latency": ["budget.latency=500%"],  # so small a model takes the runtime's time, whatever its widths
    r"target=command": ["latency.most=8"],
    r"target=ssh": ["target.host=board", f"target.python={sys.executable}"],
    r"^experiment li2016": ["depth=20", "images=6", "epochs=1"],
    r"^experiment michel2019": ["layers=1", "heads=2", "hidden=8", "words=10", "epochs=1", "step=0.5"],
    r"^experiment michel2019 ": ["latency_on=torch", "measurement_s=0.1"],
    r"^experiment shearing$": [f"task.config.{key}={value}" for key, value in SHEARING.items()],
    r"^experiment shearing": [
        *("task.sequence_length=32", "task.batch_size=8", "task.search_sequences=8", "task.test_sequences=8"),
        *("shape.hidden=16", "shape.layers=1", "shape.heads=2", "shape.neurons=24"),
        *("points=2", "tokens=512", "task.epochs=0.01"),
    ],
    r"devices=\[cuda": ["devices=[cpu]"],  # tests/test_gpu.py has the real ones
    r"target.device=cuda": ["target.device=cpu"],
    r"runtime=tensorrt": ["target.runtime=onnxruntime", "target.precision=float32"],
    r"meta-llama": ["device=cpu", "task.train.web=train.txt", "task.train.books=test.txt"],
}
MODULE = """
import torch
from torch import nn
def make_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3))
def batches():
    return [(torch.randn(4, 6), torch.zeros(4))]
def accuracy(model):
    return sum(float(parameter.detach().abs().sum()) for parameter in model.parameters())
"""


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
HERE = [command for command in COMMANDS if not any(part in command for part in (*ELSEWHERE, "storage="))]


def test_there_are_commands():
    assert len(COMMANDS) > 70 and len(HERE) > 60


@pytest.mark.parametrize("place", ELSEWHERE.values())
def test_commands_that_run_elsewhere_do(place):
    file, _, name = place.partition("::")
    assert f"\ndef {name}(" in (Path(__file__).parent / file).read_text()


@pytest.fixture
def hydra():
    GlobalHydra.instance().clear()
    register()
    with initialize_config_module("prunefront.conf", version_base="1.3"):
        yield


@pytest.mark.parametrize("command", [command for command in COMMANDS if command not in HERE])
def test_commands_that_are_not_run_here_compose(command, hydra, monkeypatch, tmp_path):
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


@pytest.fixture(scope="module")
def made(tmp_path_factory, digits_run):
    """A run along a front, and texts."""
    folder = tmp_path_factory.mktemp("made")
    options = ["task.width=4", "task.epochs=2", "n_trials=6", "mode=front", "sampler=random", "tracker=none"]
    assert cli.main(["search", *options, f"run_dir={folder}/front"]) == 0
    write_texts(folder)
    return folder


def write_texts(folder: Path) -> None:
    drawn = random.Random(0)
    words = ["the", "cat", "sat", "on", "a", "mat", "and", "dog", "ran", "to", "red", "house", "by", "sea"]
    for name in ("train", "test"):
        (folder / f"{name}.txt").write_text("\n".join(" ".join(drawn.choices(words, k=12)) for _ in range(60)))
        rows = [f'"{" ".join(drawn.choices(words, k=6))}",{"ab"[number % 2]}' for number in range(60)]
        (folder / f"{name}.csv").write_text("\n".join(["text,label", *rows]))
    articles = {"Rivers": "water bank stream", "Kings": "crown war throne", "Birds": "wing nest egg"}
    parts = (f" = {name} = \n\n {' '.join(drawn.choices(w.split(), k=300))} \n" for name, w in articles.items())
    (folder / "wikitext2_valid.txt").write_text("".join(parts))
    (folder / "wikitext2_test.txt").write_text(" ".join(drawn.choices(words, k=3000)))


def write_checkpoints(folder: Path) -> None:
    """A small Llama, and a small BERT, with random weights."""
    transformers = pytest.importorskip("transformers")
    learnt = vocabulary.make_vocabulary("bpe", None, 270, [(folder / "train.txt").read_text()])
    kinds = {
        "checkpoints/tiny-llama": ("llama", SIZES, transformers.AutoModelForCausalLM),
        "checkpoints/my-bert": ("bert", SIZES, transformers.AutoModelForSequenceClassification),
        "meta-llama/Llama-2-7b-hf": ("llama", SHEARING, transformers.AutoModelForCausalLM),
    }
    for name, (architecture, sizes, kind) in kinds.items():
        config = transformers.AutoConfig.for_model(architecture, vocab_size=270, **sizes)
        kind.from_config(config).save_pretrained(folder / name)
        learnt.tokenizer.save_pretrained(folder / name)


@pytest.fixture
def place(request, tmp_path, made, digits_run, cifar_folder, monkeypatch):
    """The folder in which the user stands, with everything that ``request.param``, a command, speaks of."""
    command = request.param
    own = made / "front" if "trial00" in command else digits_run
    for name, run in {"a": own, "b": digits_run, "front": made / "front", "within": digits_run}.items():
        shutil.copytree(run, tmp_path / "runs" / name)
    for file in made.glob("*.*"):
        shutil.copy(file, tmp_path)
    (tmp_path / "my_module.py").write_text(MODULE)
    (tmp_path / "on_my_board.sh").write_text(
        "#!/bin/sh\ntest -s $1 && test -e $2 && for i in 1 2 3 4; do echo 0.5; done\n"
    )
    (tmp_path / "on_my_board.sh").chmod(0o755)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("PRUNEFRONT_DATA", str(tmp_path if "shearing" in command else cifar_folder))
    if any(part in command for part in ("checkpoints/", "runs/llama", "meta-llama")):
        write_checkpoints(tmp_path)
    if "runs/m " in command:
        for number in "01":
            shutil.copytree(digits_run, tmp_path / "runs" / "m" / number)
        (tmp_path / "runs" / "m" / "multirun.yaml").write_text("")
    return command


def small(command: str, request) -> list[str]:
    """The command's arguments with options that make it small."""
    arguments = shlex.split(command)[1:]
    text = " ".join(arguments)
    if "--help" in arguments:
        return arguments
    for pattern, options in SMALL.items():
        arguments += options if re.search(pattern, text) else []
    if "target=" in text:
        arguments.append(f"latency.cache={request.getfixturevalue('made')}/cache")
    if "target=ssh" in text:
        folder = request.getfixturevalue("sshd")
        arguments.append(f"target.ssh_options=[-F,{folder}/config]")
    return arguments


def needed(command: str) -> list[list[str]]:
    """Commands that must have run before, for what the first one speaks of."""
    cifar = ["search", "task=cifar_resnet", *SMALL[r"task=cifar"], *TRIALS, "tracker=none", "run_dir=runs/a"]
    llama = ["search", "task=hf_causal_lm", "task.model=checkpoints/tiny-llama", *LANGUAGE, *TRIALS, "tracker=none"]
    llama += ["space=uniform", "budget.params=50%", "run_dir=runs/llama"]
    if "task=cifar_resnet" in command and "[runs/a]" in command:
        return [cifar]
    if "start=runs/a/dense/finetuned/sparse" in command:
        sparse = ["pick=dense", "finetune.name=sparse", "finetune.epochs=0.5", "finetune.sparsity=1e-3", "tracker=none"]
        return [cifar, ["finetune", "runs/a", *sparse]]
    if "domains" in command:
        return [[*llama, "task.train.web=train.txt", "task.train.books=test.txt"]]
    return [[*llama, "task.train=train.txt"]] if "runs/llama " in command and command.split()[1] == "finetune" else []


@pytest.mark.parametrize("place", HERE, indirect=True, ids=HERE)
def test_commands_run(place, request):
    for earlier in needed(place):
        if "runs/a" in earlier[-1]:
            shutil.rmtree("runs/a")
        assert cli.main(earlier) == 0
    names = [entry["name"] for entry in json.loads(Path("runs/front/result.json").read_text())["front"]]
    command = place.replace("trial0012", names[0]).replace("trial0031", names[-1])
    run_dirs = [argument.partition("=")[2] for argument in shlex.split(command) if argument.startswith("run_dir=runs/")]
    for run_dir in run_dirs:  # the documents speak of them as results already
        shutil.rmtree(run_dir, ignore_errors=True)
    assert cli.main(small(command, request)) == 0


def test_a_search_and_a_worker_share_a_database(tmp_path, cifar_folder, monkeypatch):
    if programs() is None:
        missing("PostgreSQL")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PRUNEFRONT_DATA", str(cifar_folder))
    told = [command for command in COMMANDS if "storage=" in command]
    assert [command.split()[1] for command in told] == ["search", "worker"]
    with postgresql("fsync=off") as (url, _):
        for command in told:
            arguments = shlex.split(command.replace("postgresql://user@host/studies", url))[1:]
            assert cli.main([*arguments, *SMALL[r"task=cifar"], *TRIALS, "tracker=none"]) == 0
