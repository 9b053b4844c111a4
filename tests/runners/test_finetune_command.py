"""``prunefront finetune`` as a user meets it."""

import json
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch

import prunefront
from prunefront.runners.cli import main
from prunefront.runners.finetuning.checkpoints import load_checkpoint
from prunefront.search.files import resolve
from prunefront.search.saved import save_model
from tests.processes import environment

QUICK = ["finetune.epochs=1", "tracker=none"]


@pytest.fixture
def run(digits_run, tmp_path):
    """A copy that may be written to."""
    return shutil.copytree(digits_run, tmp_path / "run", ignore=shutil.ignore_patterns("wandb"))


def result(run):
    return json.loads((run / "result.json").read_text())


def metrics(folder):
    return json.loads((folder / "metrics.json").read_text())


def test_the_picked_model_is_trained_and_saved_beside_its_plan(run, capsys):
    assert main(["finetune", str(run), "finetune.epochs=4", "finetune.ema=0.9", "tracker=none"]) == 0
    shown = capsys.readouterr().out
    picked = result(run)["picked"]
    folder = run / "front" / picked / "finetuned" / "sgd"
    assert f'prunefront.load("{folder}")' in shown and "68/68" in shown and "steps/s" in shown
    found, before = metrics(folder), metrics(run / "front" / picked)
    assert found["score_before"] == before["score"] and found["test_before"] == before["test"]
    assert found["score"] > before["score"] and found["macs"] == before["macs"] and len(found["evaluations"]) == 4
    plans = [json.loads((path / "plan.json").read_text())["plan"] for path in (folder, folder.parent.parent)]
    assert plans[0] == plans[1] and prunefront.load(folder)(torch.zeros(1, 1, 8, 8)).shape == (1, 10)
    assert main(["load-check", str(folder)]) == 0 and main(["load-check", str(run)]) == 0
    name = f"{picked}+sgd"
    assert resolve(run) == folder and f'"name":"{name}"' in (run / "report.html").read_text()
    capsys.readouterr()
    assert main(["pick", str(run)]) == 0 and capsys.readouterr().out.strip() == str(folder)
    assert main(["pick", str(run), f"pick={picked}"]) == 0 and capsys.readouterr().out.strip() == str(
        folder.parent.parent
    )
    assert main(["front", str(run)]) == 0 and name in capsys.readouterr().out
    assert main(["show", str(run), f"pick={name}", "--json"]) == 0
    (model,) = json.loads(capsys.readouterr().out)
    assert model["metrics"]["score"] == found["score"] and model["groups"]


def test_a_model_that_got_worse_is_told_of_and_not_taken(run, capsys):
    picked = result(run)["picked"]
    assert main(["finetune", str(run), *QUICK, "finetune.lr=30", "finetune.precision=float32"]) in (0, 1)
    shown = capsys.readouterr()
    assert "got worse" in shown.err or "no longer finite" in shown.err
    assert resolve(run) == run / "front" / picked


def test_several_picks_with_distillation(run):
    names = [entry["name"] for entry in result(run)["front"]]
    options = [*QUICK, "finetune=adamw", "finetune.distill.weight=0.5", "finetune.distill.temperature=2"]
    assert main(["finetune", f"run={run}", "pick=all", *options]) == 0
    for name in names:
        recipe = metrics(run / "front" / name / "finetuned" / "adamw")["recipe"]
        assert recipe["distill"] == {"weight": 0.5, "temperature": 2.0, "hidden": 0.0}
    assert main(["finetune", str(run), f"pick=[{names[0]}]", *QUICK]) == 0
    assert (run / "front" / names[0] / "finetuned" / "sgd" / "weights.safetensors").exists()


def test_a_budget_picks_the_best_that_holds_it(run):
    entry = result(run)["front"][0]
    assert main(["finetune", str(run), f"pick.macs={entry['macs']}", *QUICK]) == 0
    assert (run / "front" / entry["name"] / "finetuned" / "sgd").exists()


def test_layers_of_the_dense_model_teach_those_of_one_shape_or_it_is_told(run, capsys):
    """DigitsNet's blocks have the widths of its residual streams, which the search prunes."""
    status = main(["finetune", str(run), *QUICK, "finetune.distill.hidden=0.1"])
    assert status == 0 or "finetune.distill.hidden=0" in capsys.readouterr().err


def ended_by(number, run):
    """The checkpoint of a training, and the status of its process."""
    command = [sys.executable, "-m", "prunefront", "finetune", str(run), "finetune.epochs=30", "tracker=none"]
    command += ["finetune.checkpoint_min=0"]
    checkpoint = run / "front" / result(run)["picked"] / "finetuned" / "sgd.checkpoint.safetensors"
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, env=environment()) as process:
        deadline = time.monotonic() + 120
        while not checkpoint.exists() or load_checkpoint(checkpoint)[1]["step"] < 10:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.02)
        process.send_signal(number)
    return checkpoint, process.returncode


def test_sigterm_ends_a_training_as_ctrl_c_does(run, capfd):
    checkpoint, status = ended_by(signal.SIGTERM, run)
    assert status == 143 and load_checkpoint(checkpoint)[1]["step"] >= 10
    assert "interrupted; what is finished is kept" in capfd.readouterr().err


def test_a_killed_command_goes_on(run):
    checkpoint, _ = ended_by(signal.SIGKILL, run)
    done = load_checkpoint(checkpoint)[1]
    assert main(["finetune", str(run), "finetune.epochs=30", "tracker=none"]) == 0
    found = metrics(checkpoint.parent / "sgd")
    assert not checkpoint.exists() and found["steps"] == 510
    assert found["curve"][: len(done["curve"])] == done["curve"]


def test_models_that_were_fine_tuned_outlive_a_longer_search(run, tiny):
    picked = result(run)["picked"]
    assert main(["finetune", str(run), *QUICK]) == 0
    folder = run / "front" / picked
    save_model(folder, prunefront.load(folder), None, metrics(folder), torch.zeros(1, 1, 8, 8))
    assert prunefront.load(folder / "finetuned" / "sgd")
    assert main(["search", f"resume={run}", "n_trials=12", "tracker=none"]) == 0
    assert prunefront.load(folder / "finetuned" / "sgd")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["pick=trial9999"], "the run has no trial9999"),
        (["pick.macs=1"], "holds the budget; search for one: prunefront search"),
        (["pick.mcas=50%"], "mcas"),
        (["pick=all", "pick.macs=50%"], "names or a budget"),
        (["finetune=lion"], "lion"),
        (["finetune.lr=0"], "finetune.lr must be above 0"),
        (["finetune.name=../../evil"], "finetune.name='../../evil' names a folder"),
        (["finetune.name='a=b c'"], "finetune.name='a=b c' names a folder"),
        (["finetune.lr=1e30"], "is not finite|loss is (nan|inf)|no longer finite"),
        (["finetune.distill.weight=2"], "distill.weight must be from 0 to 1"),
        (["device=warp"], "device warp is not known"),
    ],
)
def test_mistakes_get_an_error_without_a_traceback(run, capfd, arguments, expected):
    try:
        status = main(["finetune", str(run), *QUICK, *arguments])
    except SystemExit as ended:  # Hydra's own refusals
        status = ended.code
    shown = "".join(capfd.readouterr())
    assert status and re.search(expected, shown) and "Traceback" not in shown


def test_another_recipe_of_the_same_name_is_refused(run, capsys):
    assert main(["finetune", str(run), *QUICK]) == 0
    assert main(["finetune", str(run), *QUICK, "finetune.lr=0.01"]) == 1
    assert "finetune.lr 0.05, not 0.01" in capsys.readouterr().err
    assert main(["finetune", str(run), *QUICK, "finetune.lr=0.01", "finetune.name=slow"]) == 0
    assert main(["finetune", str(run), *QUICK, "finetune.lr=0.02", "restart=true"]) == 0


def test_no_run(tmp_path, capsys):
    assert main(["finetune", str(tmp_path)]) == 1
    assert "was not made by the search command" in capsys.readouterr().err


MODULE = """
import torch
from torch import nn
class Net(nn.Sequential):
    def __init__(self, width=8):
        torch.manual_seed(0)
        super().__init__(nn.Linear(6, width), nn.ReLU(), nn.Linear(width, 3))
def batches():
    return [(torch.randn(8, 6, generator=torch.Generator().manual_seed(0)), torch.arange(8) % 3)]
def loss(output, batch):
    return nn.functional.cross_entropy(output, batch[1])
def score(model):
    with torch.no_grad():
        return -float(loss(model(batches()[0][0]), batches()[0]))
"""


def test_a_model_of_ones_own_and_no_code_run_from_a_run_folder(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tuned_module.py").write_text(MODULE)
    own = ["task=custom", "task.model._target_=tuned_module.Net", "task.model.width=16"]
    own += ["task.score=tuned_module.score", "task.calibration._target_=tuned_module.batches"]
    trained = ["task.training._target_=tuned_module.batches", "task.loss=tuned_module.loss"]
    assert main(["search", *own, "tracker=none", "n_trials=4", "sampler=random", "run_dir=a"]) == 0
    capsys.readouterr()
    assert main(["finetune", "a", *QUICK]) == 1
    advice = capsys.readouterr().err
    repeated = shlex.split(advice.partition("finetune a ")[2])
    assert repeated == [*own, *QUICK]
    assert main(["finetune", "a", *QUICK, *repeated]) == 1
    assert "task.training._target_" in capsys.readouterr().err
    options = ["finetune.steps=30", "finetune.distill.weight=0.2", "tracker=none"]
    assert main(["finetune", "a", *options, *repeated, *trained]) == 0
    folder = tmp_path / "a" / "front" / result(tmp_path / "a")["picked"] / "finetuned" / "sgd"
    assert metrics(folder)["score"] > metrics(folder)["score_before"]
