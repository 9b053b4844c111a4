"""One model of a run: its folder for programs, its widths for people."""

import json
import shutil

import pytest

import prunefront
from prunefront.runners.cli import main
from prunefront.runners.display import console
from prunefront.runners.report.content import described_run
from prunefront.runners.runs import read_run
from prunefront.search.files import resolve
from prunefront.spaces.errors import StorageError


def test_the_folder_of_a_pick_is_all_that_is_printed(digits_run, capsys):
    assert main(["pick", str(digits_run)]) == 0
    path = capsys.readouterr().out.strip()
    assert path == str(resolve(digits_run)) and prunefront.load(path) is not None
    assert main(["pick", str(digits_run), "pick.macs=60%", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == [path]
    assert main(["pick", str(digits_run), "pick.macs=1%"]) == 1 and "prunefront search" in capsys.readouterr().err


def test_names_that_hydra_reads_as_numbers_are_names(digits_run, capsys):
    for given, read in (("12", "12"), ("true", "True"), ("[12,trial0000]", "12")):
        assert main(["pick", str(digits_run), f"pick={given}"]) == 1
        assert f"the run has no {read}" in capsys.readouterr().err


def test_the_dense_model_is_a_pick_too(digits_run, capsys):
    assert main(["pick", str(digits_run), "pick=dense"]) == 0
    assert capsys.readouterr().out.strip() == str(digits_run / "dense")
    assert main(["show", str(digits_run), "pick=dense", "--json"]) == 0
    (model,) = json.loads(capsys.readouterr().out)
    assert all(group["width"] == group["size"] for group in model["groups"]) and model["metrics"]["score"] > 0


def test_a_budget_that_nothing_holds_names_the_search_for_it(digits_run, capsys):
    assert main(["pick", str(digits_run), "pick.macs=1%"]) == 1
    advice = capsys.readouterr().err
    assert "budget.macs=1%" in advice and f"warm_start=[{digits_run}]" in advice and "task" in advice


def test_a_latency_that_was_not_measured_is_no_budget(digits_run, capsys):
    for limit in ("5ms", "50%"):
        assert main(["pick", str(digits_run), f"pick.latency={limit}"]) == 1
        advice = capsys.readouterr().err
        assert "no latency was measured" in advice and "target=onnxruntime" in advice


def test_a_model_is_shown_with_every_group_in_80_columns(digits_run, capsys, monkeypatch):
    monkeypatch.setattr(console, "width", 80)
    assert main(["show", str(digits_run)]) == 0
    shown = capsys.readouterr().out
    assert main(["show", str(digits_run), "--json"]) == 0
    (model,) = json.loads(capsys.readouterr().out)
    assert all(group["name"] in shown and 1 <= group["width"] <= group["size"] for group in model["groups"])
    assert "\x1b" not in shown and max(map(len, shown.splitlines()[:-1])) <= 80
    assert model["path"] in shown.replace("\n", "")


@pytest.fixture
def run(digits_run, tmp_path):
    """A copy that may be written to."""
    return shutil.copytree(digits_run, tmp_path / "run", ignore=shutil.ignore_patterns("wandb"))


def test_one_model_is_meant_by_a_run_whoever_asks(run, capsys):
    """The best was fine-tuned of a model that a longer search has left behind."""
    folder = shutil.copytree(resolve(run), run / "front" / "trial9999" / "finetuned" / "sgd")
    metrics = json.loads((folder / "metrics.json").read_text())
    (folder / "metrics.json").write_text(json.dumps({**metrics, "score": 1.5}))
    assert main(["pick", str(run)]) == 0 and capsys.readouterr().out.strip() == str(folder)
    assert main(["load-check", str(run)]) == 0 and str(folder) in capsys.readouterr().out
    assert main(["front", str(run)]) == 0 and f'load("{folder}")' in capsys.readouterr().out
    assert resolve(run) == folder and described_run(run)["picked"] == "trial9999+sgd"


@pytest.mark.parametrize("name", ["../../outside/m", "..", "", 3])
def test_names_that_lead_out_of_a_run_are_refused(run, name):
    result = json.loads((run / "result.json").read_text())
    result["front"].append({**result["front"][0], "name": name})
    (run / "result.json").write_text(json.dumps(result))
    for reads in (read_run, resolve):
        with pytest.raises(StorageError, match="damaged"):
            reads(run)
