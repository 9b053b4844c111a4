"""``prunefront experiment shearing`` in small, and the shapes of the paper."""

import json
import os
import random
from pathlib import Path

import pytest
import torch

import prunefront
from prunefront.runners.cli import main

transformers = pytest.importorskip("transformers")

LLAMA_7B = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32,
            "head_dim": 128, "vocab_size": 32000, "max_position_embeddings": 4096}  # fmt: skip
TINY = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 8}
SMALL = ["task.sequence_length=32", "task.batch_size=8", "points=2", "shape.hidden=16", "shape.layers=1"]
SMALL += ["shape.heads=2", "shape.neurons=24", "task.search_sequences=8", "task.test_sequences=8"]


def sizes(values):
    return [f"task.config.{key}={value}" for key, value in values.items()]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The data folder, or one with a text of words in the same files."""
    folder = Path(os.environ.get("PRUNEFRONT_DATA", "../shared/data"))
    if (folder / "wikitext2_valid.txt").exists():
        return folder
    folder, drawn = tmp_path_factory.mktemp("data"), random.Random(0)
    for name in ("valid", "test"):
        words = drawn.choices(["the", "cat", "sat", "on", "a", "mat"], k=20_000)
        (folder / f"wikitext2_{name}.txt").write_text(" ".join(words))
    return folder


@pytest.fixture
def run(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("PRUNEFRONT_DATA", str(folder.resolve()))
    options = ["experiment", "shearing", *sizes(TINY), *SMALL, "tokens=1024", "task.epochs=0.05"]
    return [*options, f"run_dir={tmp_path / 'run'}"]


def test_a_shape_is_pruned_trained_compared_and_exported(run, tmp_path, capsys):
    assert main(run) == 0
    shown = capsys.readouterr().out
    assert "scratch_3x" in shown and "tokens" in shown
    found = json.loads((tmp_path / "run" / "results.json").read_text())
    tokens = {name: [point["tokens"] for point in row["curve"]] for name, row in found["trained"].items()}
    assert tokens["pruned"] == [0, 512, 1024] and tokens["scratch_1x"] == [512, 1024]
    assert tokens["scratch_3x"] == [512, 1024, 1536, 2048, 2560, 3072]
    assert len({row["params"] for row in found["trained"].values()}) == 1 and all(
        row["test_perplexity"] > 1 for row in found["trained"].values()
    )
    figure = (tmp_path / "run" / "shearing.svg").read_text()
    assert all(f"scratch, {share}x tokens" in figure for share in (1, 3))
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "checkpoint").eval()
    assert (model.config.hidden_size, model.config.num_hidden_layers, model.config.intermediate_size) == (16, 1, 24)
    pruned, ids = prunefront.load(tmp_path / "run" / "pruned"), torch.randint(256, (1, 32))
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, pruned(ids).logits)
    assert main(run) == 0  # nothing is trained again
    assert json.loads((tmp_path / "run" / "results.json").read_text()) == found


@pytest.mark.parametrize(("hidden", "layers", "heads", "neurons"), [(2048, 24, 16, 5504), (2560, 32, 20, 6912)])
def test_the_shapes_of_the_paper_can_be_had_from_llama_2(capsys, hidden, layers, heads, neurons):
    layer = 4 * hidden * 128 * heads + 3 * hidden * neurons + 2 * hidden
    params = 2 * 32000 * hidden + layers * layer + hidden
    shape = [f"shape.hidden={hidden}", f"shape.layers={layers}", f"shape.heads={heads}", f"shape.neurons={neurons}"]
    assert main(["experiment", "shearing", "check=true", *sizes(LLAMA_7B), *shape]) == 0
    shown = capsys.readouterr().out
    assert f"{params:,} of 6,738,415,616 parameters" in shown and f'"hidden_size": {hidden}' in shown


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["shape.hidden=null", "shape.layers=null", "shape.heads=null", "shape.neurons=null"], "shape sets nothing"),
        (["space.kinds=[neuron]"], "shape.hidden must mean one dimension"),
        (["task.score=accuracy"], "perplexity"),
        (["shape.hidden=1000"], "1..32"),
        (["device=nowhere"], "device nowhere is not known"),
    ],
)
def test_mistakes(run, capsys, options, told):
    assert main([*run, *options]) == 1
    assert told in capsys.readouterr().err


def test_an_experiment_must_be_named(capsys):
    assert main(["experiment"]) == 1 and "shearing" in capsys.readouterr().err
    assert main(["experiment", "shearing", "--help"]) == 0 and "scratch: [1, 3]" in capsys.readouterr().out
