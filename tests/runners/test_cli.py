"""The command line as a user meets it."""

import ast
import json
import shlex
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf
from torch import nn

import prunefront
from prunefront.runners import commands, dense
from prunefront.runners.cli import COMMANDS, main, refused
from prunefront.runners.overrides import prepare_overrides, quoted, value_of
from prunefront.search.front import picked_by
from prunefront.search.loop import Loop
from prunefront.search.study import finished, read_study
from tests.processes import environment


@pytest.fixture
def in_tmp(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_run_leaves_what_its_folder_promises(digits_run):
    left = {path.name for path in digits_run.iterdir()}
    assert {"study.journal", "space.json", "front", "dense", "result.json", "report.html", ".hydra", "wandb"} <= left
    result = json.loads((digits_run / "result.json").read_text())
    dense = json.loads((digits_run / "dense" / "metrics.json").read_text())
    assert {"score", "test", "macs", "params"} <= set(dense) and {"score", "test"} <= set(result["front"][0])
    model = prunefront.load(digits_run)
    picked = next(entry for entry in result["front"] if entry["name"] == result["picked"])
    assert sum(p.numel() for p in model.parameters()) == picked["params"] < dense["params"]
    assert picked["macs"] <= dense["macs"] / 2 and model(torch.zeros(1, 1, 8, 8)).shape == (1, 10)


def test_search_shows_a_table_and_what_to_do_next(in_tmp, tiny, capsys):
    assert main(["search", *tiny, "tracker=none", "run_dir=runs/a"]) == 0
    shown = capsys.readouterr().out
    assert "6/6" in shown and "dense" in shown and "picked" in shown
    assert 'prunefront.load("runs/a")' in shown and "resume=runs/a" in shown
    assert "picked: the best score within the budget" in shown and "trials are told the fidelity" in shown
    assert main(["front", "runs/a"]) == 0
    shown, picked = capsys.readouterr().out, json.loads((in_tmp / "runs/a/result.json").read_text())["picked"]
    assert shown.count(picked) == 2 and f"picked ({picked})" in shown  # in the table, and to be loaded


def test_along_a_front_the_knee_is_picked_and_what_was_judged_is_told(in_tmp, tiny, capsys):
    assert main(["search", *tiny, "mode=front", "n_trials=8", "tracker=none", "run_dir=runs/a"]) == 0
    shown, result = capsys.readouterr().out, json.loads((in_tmp / "runs/a/result.json").read_text())
    worse = result["judged"] - len(result["front"])
    assert f"picked: {picked_by(False, len(result['front']))}" in shown
    assert (f"{worse} of {result['judged']} judged models are no better" in shown) == (worse > 0)


def test_a_killed_run_continues_with_its_options(in_tmp, tiny):
    options = [argument for argument in tiny if not argument.startswith("n_trials")]
    command = [sys.executable, "-m", "prunefront", "search", *options, "n_trials=100000", "tracker=none", "run_dir=a"]
    journal = in_tmp / "a" / "study.journal"
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, env=environment()) as process:
        while not (journal.exists() and journal.read_text().count('"state":1') > 5):
            with pytest.raises(subprocess.TimeoutExpired):  # it must still be running
                process.wait(0.1)
        process.send_signal(signal.SIGKILL)
    done = len(finished(read_study(in_tmp / "a")))
    assert main(["search", "resume=a", f"n_trials={done + 2}"]) == 0
    study = read_study(in_tmp / "a")
    assert len(finished(study)) == done + 2
    assert "sampler=random" in (in_tmp / "a" / ".hydra" / "overrides.yaml").read_text()


def test_every_combination_of_a_multirun_has_its_own_run(in_tmp, tiny):
    assert main(["search", "-m", *tiny, "budget.macs=40%,60%", "tracker=none", "run_dir=m"]) == 0
    limits = [json.loads((in_tmp / "m" / name / "space.json").read_text())["search"]["budget"] for name in "01"]
    assert limits == [{"macs": "40%"}, {"macs": "60%"}]


def test_the_picks_of_a_multirun_are_one_table(digits_run, tmp_path, capsys):
    for name, share in (("0", "40%"), ("1", "60%")):
        shutil.copytree(digits_run, tmp_path / "m" / name)
        (tmp_path / "m" / name / ".hydra" / "overrides.yaml").write_text(f"- seed=3\n- budget.macs={share}\n")
    (tmp_path / "m" / "2").mkdir()
    (tmp_path / "m" / "wandb").mkdir()
    (tmp_path / "m" / "multirun.yaml").write_text("")
    assert main(["front", str(tmp_path / "m")]) == 0
    shown = capsys.readouterr()
    assert "budget.macs=40%" in shown.out and "seed=3" not in shown.out and "2 is left out" in shown.err
    assert "wandb" not in shown.err
    assert main(["front", str(tmp_path / "m"), "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["overrides"][1] for row in rows] == ["budget.macs=40%", "budget.macs=60%"] and rows[0]["score"] > 0
    assert main(["front", str(tmp_path / "m"), "pick.macs=0.1%"]) == 1 and "no finished run" in capsys.readouterr().err


def test_brackets_and_colons_are_no_markup(digits_run, in_tmp, capsys):
    (in_tmp / "a[b]:zap:").symlink_to(digits_run)
    for command in ("front", "load-check", "report"):
        assert main([command, "a[b]:zap:"]) == 0 and "a[b]:zap:/" in capsys.readouterr().out
    assert main(["finetune", "[red]x"]) == 1 and "StorageError: [red]x does not exist" in capsys.readouterr().err
    shutil.copytree(digits_run, in_tmp / "m" / "0")
    (in_tmp / "m" / "multirun.yaml").touch()
    shutil.copytree(in_tmp / "m" / "0", in_tmp / "m" / "1")
    (in_tmp / "m" / "1" / ".hydra" / "overrides.yaml").write_text("- space.exclude=[block1.*]\n")
    assert main(["front", "m"]) == 0 and "space.exclude=[block1.*]" in capsys.readouterr().out


@given(st.text(st.characters(exclude_categories=["Cs", "Cc"])) | st.text("ab\\'\"${}[](),=:#~ é.01/"))
@settings(max_examples=200, deadline=None)
def test_whatever_is_quoted_is_read_as_it_was(text):
    override = f"key={quoted(text)}"
    assert value_of(override) == text
    assert OmegaConf.create({"key": OverridesParser.create().parse_override(override).value()})["key"] == text


@pytest.mark.parametrize("name", ["lr=0.1,x", "${x}", "x{y}", "é ü", "a(1)#b", "tr\\", 'it\'s "a"', "~", "a,b"])
def test_a_run_may_have_any_name(digits_run, in_tmp, capsys, name):
    (in_tmp / name).symlink_to(digits_run)
    assert main(["pick", name]) == 0 and capsys.readouterr().out.startswith(f"{name}/front/")
    assert main(["front", name]) == 0
    load = capsys.readouterr().out.partition("load    ")[2]
    assert ast.literal_eval(load.partition("(")[2].strip().removesuffix(")")).startswith(f"{name}/front/")
    assert main(["pick", name, "pick.macs=1%"]) == 1
    advised = shlex.split(capsys.readouterr().err.partition("prunefront ")[2])
    assert value_of(advised[-1].replace("[", "").removesuffix("]")) == name
    assert (f"run={quoted(name)}") in prepare_overrides("finetune", [name])


def test_a_run_with_an_apostrophe_goes_on(in_tmp, tiny, capsys):
    name = "it's (1) é"
    assert main(["search", *tiny, "tracker=none", f"run_dir={name}"]) == 0
    more = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("more"))
    assert main(shlex.split(more)[2:]) == 0
    assert main(["finetune", name, "finetune.steps=2", "tracker=none"]) == 0
    assert main(["worker", name]) == 0 and f"done with {name}" in capsys.readouterr().out


def test_where_jobs_change_the_folder_runs_are_named_in_full(in_tmp, tiny, capsys, monkeypatch):
    assert main(["search", *tiny, "tracker=none", "run_dir=a", "hydra.job.chdir=true"]) == 0
    assert f"resume={in_tmp}/a " in capsys.readouterr().out


def test_what_the_system_refuses_is_no_file_problem():
    assert str(refused(OSError(28, "No space left on device"))) == "the system says: No space left on device"
    assert "a/b cannot be read or written" in str(refused(OSError(13, "Permission denied", "a/b")))


def test_the_url_of_a_storage_is_written_nowhere(in_tmp, tiny, capsys):
    storage = f"storage=sqlite:///{in_tmp}/s3cret.db"
    assert main(["search", "-m", *tiny, storage, "run_dir=m"]) == 0
    more = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("more"))
    assert "resume=m/0 storage=sqlite://... n_trials=" in more
    written = [path for path in (in_tmp / "m").rglob("*") if path.is_file()]
    assert {"multirun.yaml", "hydra.yaml", "report.html"} <= {path.name for path in written}
    assert not [path for path in written if b"s3cret" in path.read_bytes()]
    assert main(["search", "resume=m/0", "n_trials=7"]) == 1
    assert "written nowhere; repeat it: prunefront search resume=m/0 storage=sqlite://..." in capsys.readouterr().err
    assert main(["search", "resume=m/0", storage, "n_trials=7"]) == 0 and "7/7" in capsys.readouterr().out
    assert main(["finetune", "m/0", "finetune.epochs=1", "tracker=none"]) == 0


def test_criteria_and_compensation_are_options_of_the_space(in_tmp, tiny):
    options = ["space.criterion=[l1,taylor]", "space.compensation=sequential"]
    assert main(["search", *tiny, *options, "tracker=none", "run_dir=c"]) == 0
    described = json.loads((in_tmp / "c" / "space.json").read_text())["search"]
    assert described["criterion"] == "l1, taylor" and described["compensation"] == "sequential"
    assert '"criterion":"l1, taylor"' in (in_tmp / "c" / "report.html").read_text()


QUICK = ["latency.most=16", "latency.error=1", "latency.measurement_s=0.2", "latency.tolerance=0.2"]


def test_steps_of_latency_are_shown(in_tmp, tiny, capsys):
    command = ["measure", *tiny[:2], "target=torch", *QUICK, "steps=true", f"latency.cache={in_tmp}/cache"]
    assert main([*command, "--json"]) == 0
    described = json.loads(capsys.readouterr().out)
    (steps,) = described["steps"]
    assert steps["kind"] == "channel" and len(steps["widths"]) == len(steps["ratios"]) >= 12
    assert described["override"].startswith("space.round_to=")
    assert main(command) == 0
    out = capsys.readouterr().out
    assert "search with: 'space.round_to=" in out and "█" in out and "with steps of so many units" in out
    assert main([*command, "refresh=true"]) == 1
    assert "leave one of them out" in capsys.readouterr().err


def test_latency_is_measured_and_budgeted(in_tmp, tiny, capsys):
    model = [option for option in tiny if option.startswith("task.")]
    cache = f"latency.cache={in_tmp}/cache"
    assert main(["measure", *model, "target=torch", *QUICK, cache, "--json"]) == 0
    measured = json.loads(capsys.readouterr().out)
    assert len(measured["measured"]) == 16 and measured["target"]["target"] == "torch" and measured["dense_ms"] > 0
    assert main(["measure", *model, "target=torch", *QUICK, cache]) == 0
    assert "off by" in capsys.readouterr().out
    options = ["target=torch", "budget.latency=150%", *QUICK, cache, "tracker=none", "run_dir=l"]
    assert main(["search", *tiny, *options]) == 0
    result = json.loads((in_tmp / "l" / "result.json").read_text())
    assert result["objective"] == "latency_ms" and result["dense"]["latency_ms"] > 0
    assert all(entry["latency_ms"] > 0 and entry["latency_predicted_ms"] > 0 for entry in result["front"])
    assert '"latency_predicted_ms":' in (in_tmp / "l" / "report.html").read_text()
    capsys.readouterr()
    assert main(["front", "l", "pick.latency=1000%"]) == 0
    assert " ms" in capsys.readouterr().out


def test_a_multirun_tells_of_its_failures(in_tmp, tiny):
    assert main(["search", "-m", *tiny, "budget.macs=40%,0.01%", "tracker=none", "run_dir=m"]) == 1
    assert prunefront.load(in_tmp / "m" / "0")


def test_front_mode_and_selection_within_a_budget(in_tmp, tiny, capsys):
    assert main(["search", *tiny, "mode=front", "budget.params=90%", "tracker=none", "run_dir=f"]) == 0
    result = json.loads((in_tmp / "f" / "result.json").read_text())
    assert result["objective"] == "params"
    cheapest = result["front"][0]
    capsys.readouterr()
    assert main(["front", "f", f"pick.params={cheapest['params']}"]) == 0
    assert f'load("f/front/{cheapest["name"]}")' in capsys.readouterr().out


def test_commands_that_only_look(digits_run, in_tmp, capsys):
    assert main(["load-check", str(digits_run)]) == 0
    assert main(["load-check", str(digits_run / "dense")]) == 0
    assert main(["front", str(digits_run)]) == 0
    assert main(["report", str(digits_run)]) == 0
    assert main(["space", "task.width=4", "task.epochs=1"]) == 0
    assert "MACs by torch's flop counter" in capsys.readouterr().out
    assert not list(in_tmp.iterdir())


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["search", "task.wdith=3"], "has no option task.wdith; did you mean task.width?"),
        (["search", "budget.mac=50%"], "did you mean budget.macs?"),
        (["search", "macs=50%"], "did you mean budget.macs?"),
        (["front", "nowhere", "budget.macs=50%"], "did you mean pick.macs?"),
        (["search", "nonsense.whatever=1"], "has no option nonsense.whatever (prunefront search --help shows all)"),
        (["search", "n_trials=many"], "'many' of type 'str' could not be converted to Integer"),
        (["search", "task=dogits"], "dogits"),
        (["front"], "needs the folder of a run first, as in: prunefront front runs/a"),
        (["experiment", "michel2019"], "needs text=..."),
        (["search", "budget.macs=0.5"], "write macs=50% for a share"),
        (["search", "budget.macs=5furlongs"], "cannot read budget macs"),
        (["search", "task.width=4", "task.epochs=1", "budget.macs=0.01%"], "budget macs=0.01%: the smallest candidate"),
        (["search", "task.width=4", "task.epochs=1", "sampler=annealing"], "unknown sampler"),
        (["space", "task.width=4", "task.epochs=1", "space.criterion=[l1,l3]"], "unknown criterion ['l3']"),
        (["space", "task.width=4", "task.epochs=1", "space.compensation=ls"], "unknown compensation 'ls'"),
        (["search", "task.width=4", "task.epochs=1", "budget.latency=5ms"], "needs the target to measure on"),
        (["search", "budget.latency=5furlongs"], "cannot read budget latency"),
        (["measure", "target=none"], "nothing to measure on"),
        (["measure", "target=torch", "target.precision=int3"], "unknown precision"),
        (["search", "task=custom"], "task.model must make"),
        (["search", "task=custom", "task.model._target_=torch.nn.Nothing"], "torch.nn.Nothing"),
        (["search", "task=custom", "task.model._target_=torch.nn.Identity"], "task.example_inputs is not set"),
        (["search", "task=cifar_resnet", "task.data=nowhere"], "PRUNEFRONT_DATA"),
        (["search", "resume=nowhere"], "nowhere does not exist"),
        (["search", "--n_trials", "5"], "options are written without dashes: n_trials="),
        (["search", "--n-trials", "5"], "options are written without dashes: n_trials="),
        (["search", "mode=front", "budget.macs=50%", "lowest=60%"], "not below the budget macs=50%"),
        (["search", "budget.macs=30%..70%"], "mode=front with the budget macs=70% and lowest=30%"),
        (["search", "devices=cpu"], "devices takes a list: 'devices=[cpu]'"),
        (["search", "warm_start=[nowhere]"], "warm_start: nowhere does not exist"),
        (["search", "budget.macs=150%"], "more than the dense model has"),
        (["search", "budget.macs=(3"], "inside the quotes of the shell: \"budget.macs='(3'\""),
        (["search", "run_dir="], "run_dir= needs the name of a folder"),
        (["search", "seed=-1"], "seed must be from 0 to 4294967295, not -1"),
        (["search", "latency.most=2"], "latency.most must be at least 4, not 2"),
        (["measure", "latency.most=3"], "latency.most must be at least 4, not 3"),
        (["pick", "runs/a", "pick=trial0000,trial0009"], "as a list: 'pick=[trial0000,trial0009]'"),
        (["search", "task.width=4", "task.epochs=1", "budget.macs=50"], "was 50% meant?"),
        (["search", "-m", "resume=nowhere"], "does not go with -m"),
        (["front", "nowhere"], "nowhere does not exist"),
        (["front", "."], "no run of a search"),
        (["load-check", "nowhere"], "does not exist"),
        (["report", "nowhere"], "nowhere does not exist"),
        (["fornt"], "unknown command"),
    ],
)
def test_mistakes_get_an_error_without_a_traceback(in_tmp, capfd, arguments, expected):
    more = ["tracker=none"] if arguments[0] == "search" else []
    try:
        status = main([*arguments, *more])
    except SystemExit as ended:  # Hydra's own refusals
        status = ended.code
    shown = "".join(capfd.readouterr())
    assert status and expected in shown and "Traceback" not in shown


def test_a_run_of_python_and_a_model_of_a_run_are_told_what_to_do_with(digits_run, in_tmp, capsys):
    folder = next((digits_run / "front").iterdir())
    assert main(["export", str(folder), "format=onnx"]) == 1
    assert f"name the run, and the model: {digits_run} pick={folder.name}" in capsys.readouterr().err
    shutil.copytree(digits_run, in_tmp / "a", ignore=shutil.ignore_patterns(".hydra"))
    assert main(["search", "resume=a", "n_trials=8", "task=digits"]) == 1
    assert "go on in Python, with prunefront.search(..., run_dir='a')" in capsys.readouterr().err
    assert main(["finetune", "a"]) == 1 and "name it, task=..., or" in capsys.readouterr().err


def test_debug_shows_the_traceback(in_tmp):
    with pytest.raises(prunefront.PrunefrontError):
        main(["search", "resume=nowhere", "--debug"])


def test_a_run_of_another_task_is_refused(in_tmp, tiny, capsys, monkeypatch):
    assert main(["search", *tiny, "tracker=none", "run_dir=a"]) == 0
    assert main(["search", *tiny, "task.seed=1", "tracker=none", "run_dir=a"]) == 1
    assert "belongs to another task, with task.seed=0, not 1:" in capsys.readouterr().err
    with monkeypatch.context() as patched:
        patched.setattr(commands, "make_task", lambda config: pytest.fail("a model was made first"))
        assert main(["search", *tiny, "budget.macs=30%", "tracker=none", "run_dir=a"]) == 1
    shown = capsys.readouterr().err
    assert "budget {'macs': '50%'}, not {'macs': '30%'}" in shown and "with warm_start it learns" in shown


def test_a_refused_search_changes_nothing_in_the_run_that_it_named(in_tmp, tiny, capsys):
    def kept():
        return {p: p.read_bytes() for p in (in_tmp / "a").rglob("*") if p.is_file() and p.suffix != ".log"}

    assert main(["search", *tiny, "tracker=none", "run_dir=a"]) == 0
    before = kept()
    for other in (["mode=front"], ["budget.macs=30%"], ["task.seed=1"]):
        assert main(["search", *tiny, *other, "run_dir=a"]) == 1  # with the tracker, which must not start
    assert main(["search", *tiny, "budget.macs=30%", "workers=2", "run_dir=a"]) == 1
    assert main(["rounds", "task=digits", "tracker=none", "run_dir=a"]) == 1
    assert "folder of their own" in capsys.readouterr().err
    assert kept() == before
    assert main(["search", "resume=a", "n_trials=7"]) == 0 and "7/7" in capsys.readouterr().out
    assert "- n_trials=7" in (in_tmp / "a/.hydra/overrides.yaml").read_text().splitlines()


def test_a_dense_model_is_kept_before_it_is_scored_and_not_trained_again(in_tmp, tiny, monkeypatch):
    def interrupted(*_):
        raise prunefront.PrunefrontError("interrupted")

    with monkeypatch.context() as patched:
        patched.setattr(dense, "dense_scores", interrupted)
        assert main(["search", *tiny, "tracker=none", "run_dir=a"]) == 1
    weights = (in_tmp / "a/dense/weights.safetensors").read_bytes()
    monkeypatch.setattr("prunefront.runners.tasks.digits.fit", interrupted)
    assert main(["search", *tiny, "tracker=none", "run_dir=a"]) == 0
    assert (in_tmp / "a/dense/weights.safetensors").read_bytes() == weights
    assert json.loads((in_tmp / "a/result.json").read_text())["dense"]["score"] > 0.3


def test_a_refused_search_leaves_the_options_of_one_that_was_killed(in_tmp, tiny):
    (in_tmp / "a/.hydra").mkdir(parents=True)
    (in_tmp / "a/.hydra/overrides.yaml").write_text("- task.width=4\n- task.epochs=2\n- tracker=none\n")
    assert main(["search", "resume=a", "budget.macs=150%"]) == 1
    assert "task.width=4" in (in_tmp / "a/.hydra/overrides.yaml").read_text()


def test_a_score_that_failed_can_be_put_right_in_the_same_run(in_tmp, capsys):
    (in_tmp / "own_scores.py").write_text(MODULE + "\ndef broken(model):\n    raise ValueError('no such split')\n")
    own = ["task=custom", "task.model._target_=own_scores.Net", "task.model.width=16", "run_dir=a"]
    own += ["task.calibration._target_=own_scores.batches", "tracker=none", "n_trials=3", "sampler=random"]
    assert main(["search", *own, "task.score=own_scores.broken"]) == 1 and "no such split" in capsys.readouterr().err
    assert main(["search", *own, "task.score=own_scores.weight"]) == 0
    assert main(["search", *own, "task.score=own_scores.broken"]) == 1 and "another task" in capsys.readouterr().err


def test_a_task_that_keeps_its_model_shares_the_weights_that_are_the_same():
    def net(seed):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16))

    held, same, other = net(0), net(0), net(1)
    before = held[0].weight.clone()
    dense.share_weights(held, other)
    assert torch.equal(held[0].weight, before) and held[0].weight.data_ptr() != other[0].weight.data_ptr()
    dense.share_weights(held, same)
    assert held[0].weight.data_ptr() == same[0].weight.data_ptr() and torch.equal(held[0].weight, before)


@pytest.mark.parametrize("command", ["search", "rounds"])
def test_a_command_that_is_refused_at_once_leaves_no_folder(in_tmp, command):
    assert main([command, "task=digits", "budget.macs=150%"]) == 1 and not any((in_tmp / "runs").glob("*"))
    (in_tmp / "kept").mkdir()
    (in_tmp / "kept/notes.txt").write_text("the user's")
    assert main([command, "task=custom", "tracker=none", "run_dir=kept"]) == 1
    assert [path.name for path in (in_tmp / "kept").iterdir()] == ["notes.txt"]


MODULE = """
import torch
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf
from torch import nn
class Net(nn.Sequential):
    def __init__(self, width=8):
        torch.manual_seed(0)
        super().__init__(nn.Linear(6, width), nn.ReLU(), nn.Linear(width, 3))
def batches():
    return [(torch.zeros(4, 6), torch.zeros(4))]
def weight(model):
    return sum(float(parameter.detach().abs().sum()) for parameter in model.parameters())
"""


def test_a_model_of_ones_own_and_no_code_run_from_a_run_folder(in_tmp, capsys):
    (in_tmp / "own_module.py").write_text(MODULE)
    own = ["task=custom", "task.model._target_=own_module.Net", "task.model.width=16", "task.score=own_module.weight"]
    own += ["task.calibration._target_=own_module.batches", "task.test=own_module.weight"]
    options = ["tracker=none", "n_trials=4", "sampler=random"]
    assert main(["search", *own, *options, "run_dir=a"]) == 0
    assert isinstance(prunefront.load("a"), nn.Sequential)
    more = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("more"))
    assert shlex.split(more.partition("search ")[2]) == ["resume=a", *own, "n_trials=8"]
    assert main(["search", "resume=a", "n_trials=6"]) == 1
    advice = capsys.readouterr().err
    repeated = shlex.split(advice.partition("repeat: prunefront search resume=a ")[2])
    assert repeated == [*own, "n_trials=6"]
    assert main(["search", "resume=a", *repeated]) == 0
    assert len(finished(read_study(in_tmp / "a"))) == 6
    assert main(["export", "a", "format=safetensors", "modules=[own_module]"]) == 0
    assert main(["load-check", "a", "modules=[own_module]"]) == 0
    capsys.readouterr()
    assert main(["pick", "a", "pick.macs=1%"]) == 1
    advised = shlex.split(capsys.readouterr().err.partition("prunefront search ")[2])
    assert sorted(advised) == sorted([*own, "tracker=none", "budget.macs=1%", "warm_start=[a]"])


def test_a_reader_of_a_pipe_may_stop(tmp_path):
    command = f"{shlex.quote(sys.executable)} -m prunefront rounds --help"
    ended = subprocess.run(["sh", "-c", f"{command} | true"], capture_output=True, text=True, check=True)
    assert not ended.stderr


def test_load_check_finds_what_was_changed(digits_run, tmp_path, capsys):
    folder = tmp_path / "model"
    shutil.copytree(digits_run / "dense", folder)
    metrics = json.loads((folder / "metrics.json").read_text())
    (folder / "metrics.json").write_text(json.dumps({**metrics, "macs": metrics["macs"] + 1}))
    assert main(["load-check", str(folder)]) == 1
    (folder / "metrics.json").write_text(json.dumps(metrics))
    weights = folder / "weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    assert main(["load-check", str(folder)]) == 1
    shown = capsys.readouterr().err
    assert "and metrics.json says" in shown and "checksum differs" in shown


def test_help_shows_the_options_of_a_choice_that_is_named(capsys):
    assert main(["search", "--help"]) == 0
    short = capsys.readouterr().out
    assert len(short.splitlines()) < 80 and "task.depth" not in short and "cifar_resnet" in short
    assert main(["search", "task=cifar_resnet", "space=all", "--help"]) == 0
    shown = capsys.readouterr().out
    assert "task.depth: 56" in shown and "space.round_to: 1" in shown and ".#" not in shown


@pytest.mark.parametrize("arguments", [[], ["--help"], *([name, "--help"] for name in COMMANDS)])
def test_help(arguments, capsys):
    assert main(arguments) == 0
    assert "prunefront" in capsys.readouterr().out


def test_summaries_are_what_the_commands_say_of_themselves():
    for command in COMMANDS.values():
        assert command.function.__doc__.splitlines()[0] == command.summary


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--help"], "commands:"),
        (["search", "--help"], "n_trials"),
        (["serch"], "unknown command"),
        (["search", "n_trails=10"], "did you mean n_trials"),
        (["front", "RUN"], "digits"),
        (["pick", "RUN"], "front"),
        (["show", "RUN"], "share that is kept"),
    ],
)
def test_commands_that_run_no_model_do_not_wait_for_torch(arguments, told, digits_run):
    arguments = [str(digits_run) if argument == "RUN" else argument for argument in arguments]
    code = "import sys; from prunefront.runners.cli import main; main(sys.argv[1:]); print('torch' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True)
    assert told in run.stdout + run.stderr
    assert run.stdout.splitlines()[-1] == "False"


def test_a_folder_of_ones_own_configurations_goes_anywhere_and_is_repeated(in_tmp, tiny, capsys):
    (in_tmp / "own" / "space").mkdir(parents=True)
    (in_tmp / "own" / "space" / "narrow.yaml").write_text("defaults:\n  - widths\n  - _self_\nround_to: 2\n")
    options = [*tiny, "space=narrow", "tracker=none", "run_dir=n"]
    assert main(["search", *options[:2], "--config-dir", "own", *options[2:]]) == 0
    assert "2" in str(json.loads((in_tmp / "n/space.json").read_text())["search"]["space.round_to"])
    shown = capsys.readouterr().out
    more = next(line for line in shown.splitlines() if line.startswith("more"))
    assert f"--config-dir {in_tmp}/own space=narrow" in more
    done = int(more.rpartition("n_trials=")[2])
    assert main([*shlex.split(more)[2:-1], f"n_trials={done // 2 + 1}"]) == 0
    assert main(["search", "resume=n", f"n_trials={done // 2 + 2}"]) == 1
    repeat = capsys.readouterr().err.partition("repeat: prunefront ")[2].strip()
    assert "--config-dir" in repeat and main(shlex.split(repeat)) == 0
    assert main(["finetune", "--config-dir", "own", "n", "finetune.epochs=1"]) == 0


def test_an_interrupted_search_says_how_to_reach_what_was_wanted(in_tmp, tiny, capsys):
    options = [text for text in tiny if not text.startswith("n_trials")]
    assert main(["search", *options, "n_trials=1000", "patience=3", "tracker=none", "run_dir=a"]) == 0
    assert "resume=a n_trials=1000" in capsys.readouterr().out


@pytest.mark.parametrize("command", ["search", "rounds"])
def test_ctrl_c_shows_what_was_found_and_ends_scripts(in_tmp, tiny, capsys, monkeypatch, command):
    plain, told = Loop.one, []

    def interrupted(loop):
        told.append(1)
        if len(told) == 3:
            raise KeyboardInterrupt
        return plain(loop)

    monkeypatch.setattr(Loop, "one", interrupted)
    assert main([command, *tiny, "tracker=none", "run_dir=a"]) == 130
    shown = capsys.readouterr()
    assert "interrupted; what is finished is kept" in shown.err
    assert command == "rounds" or "prunefront search resume=a" in shown.out
    assert not (in_tmp / "a" / "round2").exists()
    assert any(in_tmp.glob("a/**/result.json"))


@pytest.mark.parametrize("path", ["/proc/nowhere", "file/a"])
def test_what_cannot_be_written_is_an_error_without_a_traceback(in_tmp, tiny, capsys, path):
    (in_tmp / "file").touch()
    assert main(["search", *tiny, f"run_dir={path}"]) == 1
    assert "cannot be read or written" in (shown := capsys.readouterr().err) and "Traceback" not in shown


def test_the_version_and_near_misses_of_commands(capsys):
    assert main(["--version"]) == 0 and capsys.readouterr().out.strip() == "0.1.0"
    assert main(["serach"]) == 2 and "did you mean search?" in capsys.readouterr().err
    assert main(["worker", "runs/nope"]) == 1 and "runs/nope does not exist" in capsys.readouterr().err
