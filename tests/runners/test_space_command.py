"""``prunefront space``: the tree that people read, and the JSON that programs read."""

import json
import logging

import pytest
import torch
from torch import nn

import prunefront
from prunefront.runners.cli import main
from prunefront.runners.display import console, folded_names, number_range

DIGITS = ["task=digits", "task.width=4", "task.epochs=1"]


def constant(model):
    return 1.0


def llama(layers=4):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=20,
    )
    return transformers.LlamaForCausalLM(config).eval()


def tokens():
    return {"input_ids": torch.arange(6)[None]}


def uneven():
    """Four equal layers, then one of another width."""
    torch.manual_seed(0)
    layers = [nn.Sequential(nn.Linear(6, width), nn.ReLU(), nn.Linear(width, 6)) for width in (8, 8, 8, 8, 5)]
    return nn.Sequential(*layers)


def encoder():
    torch.manual_seed(0)
    return nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 12, batch_first=True), 4).eval()


def talkative():
    print("a message of the model's own")
    logging.getLogger("own").warning("a warning of the model's own")
    return uneven()


def task(model, inputs="torch.randn", size="[2,6]"):
    given = [f"task.model._target_={__name__}.{model}", f"task.example_inputs._target_={inputs}"]
    given += [f"task.example_inputs.size={size}"] if size else []
    return ["task=custom", f"task.score={__name__}.constant", *given]


LLAMA = task("llama", f"{__name__}.tokens", "")


@pytest.fixture
def show(capsys, monkeypatch):
    """Output of the command on 80 columns."""
    monkeypatch.setattr(console, "width", 80)

    def show(*arguments):
        capsys.readouterr()
        assert main(["space", *arguments]) == 0
        shown = capsys.readouterr().out
        assert "\x1b" not in shown and all(len(line) <= 80 for line in shown.splitlines())
        return shown

    return show


def cells(shown, name):
    """The columns of the line that starts (after the tree's guides) with ``name``."""
    (line,) = [line for line in shown.splitlines() if line.lstrip("│├└─ ").startswith(f"{name} ")]
    return line.lstrip("│├└─ ").removeprefix(name).split()


def parameters(model):
    return sum(parameter.numel() for parameter in model.parameters())


def test_the_tree_follows_the_modules_with_single_children_joined(show):
    shown = show(*DIGITS)
    lines = [line.rstrip() for line in shown.splitlines()]
    below = lines[lines.index("block2") + 1 :]
    assert below[0].startswith("├─ conv1 ") and below[1].startswith("└─ conv2 ")
    assert cells(shown, "block1.conv1")[:3] == ["channel", "4", "1..4"]
    assert "1 output of the model: linear" in lines
    assert "all groups are exact" in shown and "~" not in shown


def test_the_end_tells_costs_seconds_and_what_is_not_seen(show):
    shown = show(*DIGITS)
    assert cells(shown, "params")[0] == "5,094" and cells(shown, "macs")[0] == "49,568"
    assert {"memory_bytes", "size_bytes"} <= set(shown.split())
    assert "Discovery took" in shown and "trace" in shown and "proof" in shown
    assert "only the branch that the example inputs take is seen" in " ".join(shown.split())


def test_widths_that_are_allowed_and_their_step(show):
    limits = ["space.max_ratio={block3.conv1: 0.5}", "space.min_ratio={block3.conv1: 0.25}"]
    shown = show(*DIGITS, "space.round_to=4", *limits)
    wide = [line.split() for line in shown.splitlines() if " channel   16 " in line]
    assert [line[2:7] for line in wide] == [
        ["channel", "16", "8..12", "by", "4"],
        ["channel", "16", "4..16", "by", "4"],
    ]


def test_equal_layers_are_shown_once_with_their_common_share(show):
    shown = show(*task("uneven"))
    assert cells(shown, "0..3") == ["x4"]
    assert cells(shown, "0 x4")[:4] == ["neuron", "8", "1..8", "12"]
    assert cells(shown, "4.0")[:4] == ["neuron", "5", "1..5", "3"]
    model = uneven()
    space = prunefront.discover(model, torch.randn(2, 6))
    smaller = space.apply(space.plan({f"{layer}.0": 1 for layer in range(4)}))
    assert cells(shown, "0 x4")[-1] == f"{1 - parameters(smaller) / parameters(model):.1%}"


def test_a_model_of_many_layers_stays_short(show):
    shown = show(*LLAMA, "task.model.layers=16", "space.proof=shapes")
    assert len(shown.splitlines()) <= 40
    assert shown.index("\nhidden ") < shown.index("model.layers.*.mlp") < shown.index("\nmodel.layers ")
    assert "~" in cells(shown, "hidden")[1] and "~ inexact" in shown
    assert cells(shown, "model.layers")[:3] == ["block", "16", "1..16"] and "│  units 0..15" in shown
    assert cells(shown, "mlp.gate_proj x15")[:3] == ["neuron", "24", "1..24"]
    assert "1 output of the model: lm_head" in shown


def test_tied_dimensions_are_one_line(show):
    shown = show(*LLAMA, "space=uniform")
    assert cells(shown, "model.layers.*.mlp.gate_proj x4")[:3] == ["neuron", "24", "1..24"]
    assert "gate_proj x3" not in shown and "widths" in shown.splitlines()[0]


def test_tied_dimensions_without_a_common_name_say_what_they_tie(show):
    shown = show(*DIGITS, "space=uniform")
    assert cells(shown, "channel:4 x2")[:3] == ["channel", "4", "1..4"]
    after = shown.partition("channel:4 x2")[2].splitlines()[1:3]
    assert [line.strip() for line in after] == ["conv", "block1.conv1"]


def test_frozen_parts_with_one_reason_are_one_line(show):
    shown = " ".join(show(*task("encoder", size="[1,5,8]"), "space.exclude=['*.linear1']").split())
    assert "8 excluded from the space: layers.0..3.linear1..2 " in shown


def test_json_says_everything_about_the_space(show):
    told = json.loads(show(*LLAMA, "--json"))
    model = llama()
    space = prunefront.discover(model, tokens())
    assert told["dimensions"] == list(space.dimensions) and set(told["seconds"]) == {"trace", "proof", "criteria"}
    assert [(g["name"], g["kind"], g["size"], g["exact"]) for g in told["groups"]] == [
        (g.name, g.kind, g.size, g.exact) for g in space.groups
    ]
    assert told["frozen"] == [{"name": frozen.name, "reason": frozen.reason} for frozen in space.frozen]
    assert told["dense_cost"]["params"] == parameters(model)
    smallest = space.plan({group["name"]: group["low"] for group in told["groups"]})
    assert told["smallest_cost"]["params"] == parameters(space.apply(smallest))
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    for group in told["groups"]:
        assert 1 <= group["low"] <= group["high"] == group["size"] and group["step"] == 1
        smaller = space.apply(space.plan({group["name"]: group["low"]}))
        assert group["share_of_params"] == pytest.approx(1 - parameters(smaller) / parameters(model))
        assert 0 < group["share_of_macs"] <= 1
        assert all(dim < tensors[tensor].ndim for tensor, dim in group["members"])
        assert bool(group["members"]) != bool(group["blocks"])
        assert all(model.get_submodule(block) is not None for block in group["blocks"])


@pytest.mark.parametrize("option", ["--json", "json=true"])
def test_nothing_but_json_on_stdout(option, capsys):
    assert main(["space", *task("talkative"), option]) == 0
    shown = capsys.readouterr()
    assert len(json.loads(shown.out)["groups"]) == 9
    assert "a message of the model's own" in shown.err and "a warning of the model's own" in shown.err


@pytest.mark.parametrize("command", ["search", "export", "report", "load-check"])
def test_other_commands_refuse_json(command, capsys):
    assert main([command, "a", "--json"]) == 1
    assert "--json is an option of space, measure, front, pick, show" in " ".join(capsys.readouterr().err.split())


def test_help_tells_of_json(capsys):
    assert main(["space", "--help"]) == 0
    assert "--json" in capsys.readouterr().out


def test_names_that_differ_by_numbers_are_folded():
    names = [f"layers.{layer}.{part}" for layer in range(12) for part in ("q", "k")]
    assert folded_names(names) == ["layers.0..11.q", "layers.0..11.k"]
    assert folded_names([*names, "layers.12.q", "head"]) == [*folded_names(names), "layers.12.q", "head"]
    assert folded_names(["a.1", "a.3", "a.4"]) == ["a.{1,3..4}"]
    assert folded_names(["conv", "conv.bias", "01", "02"]) == ["conv", "conv.bias", "01..2"]


@pytest.mark.parametrize(
    ("numbers", "expected"),
    [([5], "5"), ([2, 0, 1], "0..2"), ([0, 2, 4, 6], "0,2..6"), ([0, 1, 4, 7, 8], "0..1,4,7..8"), ([3, 9], "3,9")],
)
def test_ranges_of_numbers(numbers, expected):
    assert number_range(numbers) == expected
