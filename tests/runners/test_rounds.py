"""Rounds of search and fine-tuning."""

import json

import pytest

import prunefront
from prunefront.runners.cli import main
from prunefront.runners.rounds import budgets
from prunefront.search.files import METRICS
from prunefront.spaces import Cost
from prunefront.spaces.errors import ConfigError

DENSE = Cost(1000, 400, 50, 1600)


def test_budgets_fall_by_the_same_factor_to_the_last():
    assert budgets({"macs": "25%"}, DENSE, 2) == [{"macs": "500"}, {"macs": "250"}]
    assert budgets({"params": "50", "flops": "2000"}, DENSE, 3) == [
        {"macs": "1000", "params": "200"},
        {"macs": "1000", "params": "100"},
        {"macs": "1000", "params": "50"},
    ]
    with pytest.raises(ConfigError, match="latency"):
        budgets({"latency": "5ms"}, DENSE, 2)


def test_rounds_prune_and_train_by_turns_and_go_on_where_they_were(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    command = ["rounds", "task=digits", "task.epochs=2", "budget.macs=40%", "rounds=2", "n_trials=4", "finalists=1"]
    command += ["finetune.epochs=1", "tracker=none", "run_dir=runs/r"]
    assert main(command) == 0
    described = json.loads((tmp_path / "runs/r/rounds.json").read_text())
    first, second = described["rounds"]
    assert second["macs"] <= 0.4 * described["dense"]["macs"] < first["macs"] <= 0.64 * described["dense"]["macs"]
    path = next((tmp_path / "runs/r/round2/front").glob("*/finetuned/sgd"))
    assert tmp_path / "runs/r" / second["model"] in (path, path.parent.parent)
    model = prunefront.load(path)
    metrics = json.loads((path / METRICS).read_text())
    assert [entry["round"] for entry in metrics["history"]] == [1] and sum(
        p.numel() for p in model.parameters()
    ) == second["params"]
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "runs/r").rglob("weights.safetensors")}
    assert main(command) == 0
    assert before == {p: p.stat().st_mtime_ns for p in (tmp_path / "runs/r").rglob("weights.safetensors")}
    assert main(["search", "task=digits", f"start={path}", "n_trials=2", "tracker=none", "run_dir=runs/s"]) == 0
    space = json.loads((tmp_path / "runs/s/space.json").read_text())
    assert space["dense_cost"]["macs"] == second["macs"]
    assert (
        main(
            [
                "finetune",
                "runs/s",
                "pick=dense",
                "finetune.name=sparse",
                "finetune.steps=3",
                "finetune.sparsity=0.01",
                "tracker=none",
            ]
        )
        == 0
    )
    assert prunefront.load(tmp_path / "runs/s/dense/finetuned/sparse") is not None
    capsys.readouterr()
    assert main([*command[:-1], "run_dir=runs/q", "rounds=0"]) == 1 and "at least 1" in capsys.readouterr().err
