"""Experiments on tiny versions of their models, and the parts that decide their numbers."""

import json
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest
import torch

import prunefront
from prunefront.runners.cli import main
from prunefront.runners.experiments import li2016, michel2019
from prunefront.runners.experiments.charts import Line, label, line_chart, ticks
from prunefront.runners.experiments.steps import Steps
from prunefront.runners.tasks.cifar_resnet import CifarResNet
from prunefront.spaces import discover
from prunefront.spaces.errors import ConfigError, SearchError

WORDS = {
    "Rivers": "water bank stream flood bridge",
    "Kings": "crown war throne castle queen",
    "Birds": "wing nest egg song tree",
}


def test_ticks_are_round_and_hold_the_values():
    assert ticks(0.13, 0.87) == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1.0])
    assert ticks(5, 5)[0] <= 5 <= ticks(5, 5)[-1]
    assert [label(tick) for tick in (0, 0.25, 7500, 25e4, 15e5)] == ["0", "0.25", "7500", "250k", "1.5M"]


def test_a_chart_is_a_picture_with_every_line_and_name(tmp_path):
    lines = [Line("a", [0, 1], [2, 3]), Line("b <&>", [0, 1], [3, 2]), Line("a", [0, 1], [1, 1], is_dashed=True)]
    line_chart(tmp_path / "chart.svg", "title", "x", "y", lines)
    root = ElementTree.parse(tmp_path / "chart.svg").getroot()
    found = root.findall("{*}polyline")
    assert len(found) == 3 and found[0].get("stroke") == found[2].get("stroke") != found[1].get("stroke")
    assert "b <&>" in [text.text for text in root.iter("{http://www.w3.org/2000/svg}text")]


def test_steps_are_kept_and_belong_to_their_options(tmp_path):
    steps, calls = Steps(tmp_path, {"seed": 0}), []
    assert steps.kept("a", lambda: calls.append(1) or [1.5]) == steps.kept("a", lambda: calls.append(1)) == [1.5]
    assert len(calls) == 1
    with pytest.raises(SearchError, match="other values of seed"):
        Steps(tmp_path, {"seed": 1})


def test_layers_lose_what_costs_them_the_same_accuracy():
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Linear(4, 10), torch.nn.ReLU(), torch.nn.Linear(10, 10), torch.nn.ReLU(), torch.nn.Linear(10, 2)
    )
    space = discover(model, torch.randn(1, 4))
    tough, soft = [0.9 - r for r in li2016.RATIOS], [0.9 - r / 4 for r in li2016.RATIOS]
    plan = li2016.allocated(space, dict(zip((g.name for g in space.groups), (tough, soft), strict=True)), 0.5)
    widths = li2016.plan_widths(space, plan)
    assert space.cost(plan).macs <= 0.5 * space.dense_cost.macs
    assert (
        widths[0] > 2 * widths[1]
    )  # a drop of d costs the tough layer d of its filters, and the soft one four times that
    with pytest.raises(ConfigError, match="of the MACs, not 1%"):
        li2016.allocated(space, {group.name: tough for group in space.groups}, 0.01)


def test_nothing_is_lost_where_accuracy_rises_by_chance():
    lost = li2016.monotone([0.9, 0.91, 0.88, 0.89, 0.5])
    assert lost == pytest.approx([0, 0, 0.02, 0.02, 0.4], abs=1e-6) and (np.diff(lost) > 0).all()


def test_only_first_convolutions_lose_filters_and_what_is_left_is_trained(cifar_folder, tmp_path, monkeypatch, capsys):
    command = [
        "experiment",
        "li2016",
        "depth=20",
        f"data={cifar_folder}",
        "images=6",
        "epochs=1",
        f"run_dir={tmp_path}/l",
    ]
    assert main(command) == 0
    found = json.loads((tmp_path / "l/results.json").read_text())
    assert found["macs"] <= 0.724 and found["paper"]["macs"] == 0.724
    pruned, retrained = (prunefront.load(tmp_path / "l" / name) for name in ("pruned", "retrained"))
    dense = CifarResNet(20)
    kept = {name: m.out_channels for name, m in pruned.named_modules() if isinstance(m, torch.nn.Conv2d)}
    full = {name: m.out_channels for name, m in dense.named_modules() if isinstance(m, torch.nn.Conv2d)}
    smaller = {name for name in full if kept[name] < full[name]}
    assert smaller and all(name.startswith("layer") and name.endswith("conv1") for name in smaller)
    assert len(found["ratios"]) == 9 and sum(p.numel() for p in pruned.parameters()) == round(
        found["params"] * sum(p.numel() for p in dense.parameters())
    )
    assert not torch.equal(retrained.linear.weight, pruned.linear.weight)
    picture = ElementTree.parse(tmp_path / "l/sensitivity.svg").getroot()
    assert len(picture.findall("{*}polyline")) == 9
    monkeypatch.setattr(li2016, "sensitivity", lambda *_: pytest.fail("measured again"))
    assert main(command) == 0 and "the paper: dense 93.04 %" in capsys.readouterr().out


@pytest.fixture(scope="module")
def articles(tmp_path_factory):
    rng = np.random.default_rng(0)
    text = "".join(
        f" = {name} = \n\n {' '.join(rng.choice(words.split(), 600))} \n = = Section = = \n"
        for name, words in WORDS.items()
    )
    path = tmp_path_factory.mktemp("text") / "articles.txt"
    path.write_text(text)
    return path


def test_passages_are_split_by_article(articles, tmp_path):
    train, test = michel2019.write_passages(articles, tmp_path, 20, 0)
    assert michel2019.task_labels(train) == michel2019.task_labels(test) == set(WORDS)
    assert len(train.read_text().splitlines()) == 1 + 3 * 24 and len(test.read_text().splitlines()) == 1 + 3 * 6
    with pytest.raises(ConfigError, match="no articles"):
        michel2019.write_passages(train, tmp_path, 20, 0)


def test_heads_go_one_by_one_and_the_experiment_goes_on_where_it_was(articles, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    options = [
        "layers=2",
        "heads=4",
        "hidden=16",
        "words=10",
        "epochs=40",
        "lr=3e-3",
        "step=0.25",
        "latency_on=torch",
        "measurement_s=0.1",
    ]
    command = [
        "experiment",
        "michel2019",
        f"text={articles}",
        *options,
        "run_dir=runs/m",
    ]
    assert main(command) == 0
    found = json.loads((tmp_path / "runs/m/results.json").read_text())
    for name in ("one-shot", "iterative"):
        assert [point["removed"] for point in found[name]] == [0, 0.25, 0.5, 0.75]
        assert found[name][0]["accuracy"] == found["one-shot"][0]["accuracy"] > 0.6  # words tell the articles apart
    assert [sum(point["widths"].values()) for point in found["one-shot"]] == [8, 6, 4, 2]
    assert len(found["latency"]) == 4 and found["latency"][-1]["macs"] < 1
    assert (tmp_path / "runs/m/heads.svg").exists() and (tmp_path / "runs/m/latency.svg").exists()
    monkeypatch.setattr(michel2019, "one_shot", None)  # would fail if it ran again
    assert main(command) == 0 and "heads go at a loss" in capsys.readouterr().out


def test_unknown_experiments_and_options_are_refused(capsys, tmp_path):
    assert main(["experiment", "li2017"]) == 1 and "li2016, michel2019, shearing" in capsys.readouterr().err
    assert main(["experiment", "michel2019", "text=none.txt", f"run_dir={tmp_path}/never"]) == 1
    assert "none.txt does not exist" in capsys.readouterr().err
