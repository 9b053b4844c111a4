"""Every target that this machine can run passes the same contract; ssh is a real server on loopback."""

import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from prunefront.runners.targets import CommandTarget, OnnxTarget, SshTarget, TorchTarget, exporting, process
from prunefront.runners.targets import ssh as ssh_module
from prunefront.runners.targets.command import milliseconds_in
from prunefront.runners.targets.local import torch_threads
from prunefront.runners.targets.process import read_answer, run_in_group
from prunefront.runners.targets.ssh import _quoted
from prunefront.search import protocol
from prunefront.search.measurement import Settings, measure, summary
from prunefront.search.protocol import conditions, interval, time_side_by_side
from prunefront.search.timing import Timing
from prunefront.spaces import discover
from prunefront.spaces.errors import TargetError
from prunefront.spaces.inputs import Inputs
from tests.services import missing

QUICK = Settings(tolerance=0.2, limit_s=1.5, warm_up_s=0.02, least_rounds=4)
TIMER = """
import statistics, sys, time, numpy, onnxruntime
options = onnxruntime.SessionOptions()
options.intra_op_num_threads = 1
session = onnxruntime.InferenceSession(sys.argv[1], options)
arrays = numpy.load(sys.argv[2])
feed = {value.name: arrays[value.name] for value in session.get_inputs()}
times = []
for _ in range(100):
    start = time.perf_counter()
    session.run(None, feed)
    times.append(1000 * (time.perf_counter() - start))
print("median", len(times), "runs", statistics.median(times))
"""


class Net(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, width, 3, padding=1), nn.Conv2d(width, 8, 3)

    def forward(self, x, scale=None):
        x = self.second(torch.relu(self.first(x))).mean((2, 3))
        return x if scale is None else x * scale


INPUTS = (torch.randn(2, 3, 32, 32),)


def board(folder: Path, *more: str, **options) -> SshTarget:
    return SshTarget(host="board", python=sys.executable, ssh_options=["-F", str(folder / "config"), *more], **options)


@pytest.fixture(params=["torch", "torch bfloat16", "torch channels_last", "onnxruntime", "openvino", "command", "ssh"])
def target(request, tmp_path):
    if request.param == "openvino" and importlib.util.find_spec("openvino") is None:
        missing("openvino")
    if request.param == "ssh":
        return board(request.getfixturevalue("sshd"))
    if request.param == "command":
        (tmp_path / "timer.py").write_text(TIMER)
        return CommandTarget([sys.executable, str(tmp_path / "timer.py"), "{model}", "{inputs}"])
    return {
        "torch": lambda: TorchTarget(threads=1),
        "torch bfloat16": lambda: TorchTarget(precision="bfloat16"),
        "torch channels_last": lambda: TorchTarget(channels_last=True),
        "onnxruntime": lambda: OnnxTarget("onnxruntime", threads=1),
        "openvino": lambda: OnnxTarget("openvino", threads=1),
    }[request.param]()


def test_every_target_tells_a_large_model_from_a_small_one(target):
    large, small = Net(96).train(), Net(4)
    before = {name: tensor.clone() for name, tensor in large.state_dict().items()}
    found = measure(small, INPUTS, target, reference=large, settings=QUICK)
    assert 0 < found.low_ms <= found.median_ms <= found.high_ms
    assert found.ratio_low <= found.ratio <= found.ratio_high and found.ratio < 0.8 and found.differs
    assert {"cpu", "cores", "load", "seconds"} <= set(found.conditions)
    assert json.loads(json.dumps(found.to_json()))["runs"] == found.runs >= 4
    assert json.dumps(dict(target.description))
    assert large.training and large.first.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in large.state_dict().items())
    assert large.first.weight.is_contiguous()


def test_keyword_inputs_reach_the_exported_model_by_name():
    inputs = {"x": INPUTS[0], "scale": torch.tensor([3.0])}
    assert measure(Net(4), inputs, OnnxTarget(threads=1), settings=QUICK).median_ms > 0


def test_a_model_without_a_reference_is_its_own():
    found = measure([Net(8), Net(64)], INPUTS, TorchTarget(threads=1), settings=QUICK)
    assert found[0].ratio == 1 and found[1].ratio > 1


def test_time_side_by_side_stops_in_time_and_pairs_rounds():
    start = time.perf_counter()
    samples, _ = time_side_by_side([lambda: 0.1, lambda: 0.2], limit_s=60)
    assert time.perf_counter() - start < 5 and len(samples[0]) == len(samples[1]) >= 12
    assert [set(values) for values in samples] == [{0.1}, {0.2}]
    noisy = iter(range(1, 10**6))
    start = time.perf_counter()
    time_side_by_side([lambda: float(next(noisy) % 7 + 1)], tolerance=1e-6, limit_s=0.2, warm_up_s=0)
    assert time.perf_counter() - start < 1


@pytest.mark.parametrize("is_always_busy", [False, True])
def test_rounds_beside_other_work_are_left_out_where_there_are_others(monkeypatch, is_always_busy):
    started = time.perf_counter()

    def is_busy() -> bool:  # at first both processors, then none
        return is_always_busy or time.perf_counter() - started < 0.6

    def run() -> float:
        return 5.0 if is_busy() else 1.0

    def others() -> float:
        passed = time.perf_counter() - started
        return 2 * (passed if is_always_busy else min(passed, 0.6))

    monkeypatch.setattr(protocol, "_others_s", others)
    samples, facts = time_side_by_side([run], limit_s=1.5)
    if is_always_busy:
        assert set(samples[0]) == {5.0} and facts["load"] > 1 and facts["rounds_left_out"] == 0
    else:
        assert samples[0].count(5.0) < 0.2 * len(samples[0])  # the end of the disturbance, within one window
        assert facts["load"] <= protocol.BUSY and facts["rounds_left_out"] > 0


def test_the_work_of_others_is_seen_and_that_of_ones_own_is_not():
    def burn(seconds: float) -> None:
        end = time.perf_counter() + seconds
        while time.perf_counter() < end:
            pass

    watch = protocol.Watch()
    burn(0.5)
    alone = watch.load
    if alone is None:
        pytest.skip("this system does not count processor time in /proc/stat")
    other = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        time.sleep(0.3)
        watch = protocol.Watch()
        time.sleep(0.5)
        assert watch.load > alone + 0.3 or watch.load > 0.8 * os.cpu_count()
    finally:
        other.kill()
        other.wait()


def test_intervals_hold_the_median_as_often_as_they_say():
    generator = torch.Generator().manual_seed(0)
    draws = torch.distributions.LogNormal(0.0, 1.0)
    torch.manual_seed(0)
    covered = [low <= 1.0 <= high for low, _, high in (interval(draws.sample((25,)).tolist()) for _ in range(400))]
    assert 0.92 <= sum(covered) / len(covered) <= 1.0 and generator


def test_doubts_are_told():
    quiet, busy = {"load": 0.0}, {"load": 1.2}
    same = [1.0, 1.1, 0.9, 1.05, 0.95] * 4
    shifted = same[::-1]
    assert "inside the noise" in summary(shifted, same, quiet).warnings[0]
    assert "quiet machine" in summary([2.0] * 20, same, busy).warnings[0]
    assert not summary([2.0] * 20, same, quiet).warnings and summary([2.0] * 20, same, quiet).differs
    assert summary(same * 4, same * 4, quiet).p90_ms and summary(same, same, quiet).p90_ms is None
    assert conditions()["cores"]


class Unexportable(nn.Module):
    def forward(self, x):
        return torch.special.modified_bessel_i0(torch.special.zeta(x, x))  # ONNX has neither


class Branching(nn.Module):
    def forward(self, x):
        return x * (float(x.abs().max().item()) if x.sum().item() > 0 else 2.0)


def test_what_a_target_cannot_do_is_told_with_what_to_do(tmp_path):
    with pytest.raises(TargetError, match="cannot be exported"):
        measure(Unexportable(), INPUTS, OnnxTarget(), settings=QUICK)
    with pytest.raises(TargetError, match="unknown runtime"):
        OnnxTarget("onnxrunntime")
    with pytest.raises(TargetError, match="not in bfloat16"):
        OnnxTarget(precision="bfloat16")
    with pytest.raises(TargetError, match="unknown precision"):
        TorchTarget(precision="int3")
    if not torch.cuda.is_available():
        with pytest.raises(TargetError, match="sees no CUDA device"):
            TorchTarget(device="cuda")
    try:
        import tensorrt  # noqa: F401
    except ImportError:
        with pytest.raises(TargetError, match="needs the runtime"):
            measure(Net(4), INPUTS, OnnxTarget("tensorrt"), settings=QUICK)


def test_models_for_tensorrt_have_the_types_that_they_shall_compute_in(tmp_path):
    import onnxruntime

    model, inputs = Net(8).eval(), Inputs.of(INPUTS)
    with exporting.exported([model], inputs, traced=True, dtype=torch.float16) as paths:
        session = onnxruntime.InferenceSession(paths[0], providers=["CPUExecutionProvider"])
    assert {value.type for value in session.get_inputs()} == {"tensor(float16)"}
    arrays = exporting.named_arrays(exporting.in_type(inputs, torch.float16))
    outputs = session.run(None, {value.name: arrays[value.name] for value in session.get_inputs()})
    assert outputs[0].dtype == "float16" and model.first.weight.dtype == torch.float32
    exporting.check_outputs(model, inputs, outputs, "float16", "onnxruntime")


def test_a_branch_that_data_decide_is_traced_as_the_inputs_take_it():
    assert measure(Branching(), INPUTS, OnnxTarget(threads=1), settings=QUICK).median_ms > 0


def test_what_the_tracing_exporter_cannot_do_or_does_wrong_is_exported_again(monkeypatch):
    real, dynamo = exporting.torch.onnx.export, []

    def exporter(fails):
        def export(model, *arguments, **options):
            dynamo.append(options["dynamo"])
            if not options["dynamo"]:
                if fails:
                    raise RuntimeError("cannot trace")
                model = exporting.OfTensors(Net(8), Inputs.of(INPUTS))  # other weights
            real(model, *arguments, **options)

        return export

    for fails in (True, False):
        dynamo.clear()
        monkeypatch.setattr(exporting.torch.onnx, "export", exporter(fails))
        assert measure(Net(8), INPUTS, OnnxTarget(threads=1), settings=QUICK).median_ms > 0
        assert dynamo == [False, True]
        assert measure(Net(8), INPUTS, CommandTarget(["sh", "-c", "echo 1 # {model}"]), settings=QUICK).median_ms == 1
        assert dynamo == [False, True] * 2


def test_outputs_that_differ_are_refused_also_over_ssh(sshd, monkeypatch):
    monkeypatch.setattr(exporting, "OfTensors", lambda model, inputs: Net(16).eval())  # other weights in every export
    for target in (OnnxTarget(threads=1), board(sshd)):
        with pytest.raises(TargetError, match="differ from torch's"):
            measure(Net(16), INPUTS, target, settings=QUICK)


ANSWER = "print('prunefront {{{}}}') or sys.exit()"
BROKEN = """
import os, signal, subprocess, sys, time

def load(runtime, path, inputs, **options):
    if os.path.getsize(path) < {smallest}:
        {action}
    from runtimes_that_work import load
    return load(runtime, path, inputs, **options)
"""


@pytest.fixture
def broken_below(tmp_path, monkeypatch):
    """A runtime that does ``action`` on files of less than so many bytes."""

    def install(smallest: int, action: str) -> None:
        scripts = {path.name: path for path in process.SCRIPTS}
        (tmp_path / "runtimes_that_work.py").write_bytes(scripts["runtimes.py"].read_bytes())
        (tmp_path / "runtimes.py").write_text(BROKEN.format(smallest=smallest, action=action))
        ours = [scripts["protocol.py"], scripts["remote.py"], *tmp_path.glob("runtimes*.py")]
        monkeypatch.setattr(process, "SCRIPTS", ours)

    return install


@pytest.mark.parametrize(
    ("action", "expected"),
    [
        ("os.kill(os.getpid(), signal.SIGSEGV)", "killed by SIGSEGV"),
        ("sys.exit('no memory')", "status 1: no memory"),
        (ANSWER.format('"samples": [[0.1]]'), "cannot be read"),
        (ANSWER.format('"samples": [[0]], "outputs": [[]], "conditions": {}'), "not whole"),
        ("raise ValueError('bad kernel')", "ValueError: bad kernel"),
    ],
)
def test_a_process_that_crashes_is_an_error_of_the_target(broken_below, action, expected):
    broken_below(10**9, action)
    with pytest.raises(TargetError, match=expected):
        measure(Net(4), INPUTS, OnnxTarget(), settings=QUICK)


def test_a_process_that_hangs_is_killed_with_its_children(broken_below, tmp_path):
    marker = tmp_path / "child"
    broken_below(10**9, f"open({str(marker)!r}, 'w').write(str(subprocess.Popen(['sleep', '60']).pid)); time.sleep(60)")
    start = time.perf_counter()
    with pytest.raises(TargetError, match="was killed; raise target"):
        measure(Net(4), INPUTS, OnnxTarget(timeout_s=2), settings=QUICK)
    assert time.perf_counter() - start < 20
    child = Path(f"/proc/{marker.read_text()}/stat")
    for _ in range(50):  # until init has buried it
        if not child.exists() or child.read_text().split()[2] == "Z":
            break
        time.sleep(0.05)
    else:
        pytest.fail("the child is alive")


def test_a_candidate_that_crashes_is_left_out_and_the_others_are_measured(broken_below):
    model = nn.Sequential(nn.Conv2d(3, 64, 3, padding=1), nn.ReLU(), nn.Conv2d(64, 64, 3)).eval()
    space = discover(model, INPUTS)
    timing = Timing(OnnxTarget(threads=1), settings=QUICK)
    broken_below(20_000, "os.kill(os.getpid(), signal.SIGSEGV)")
    outcomes, dense_ms = timing.measured(space, Inputs.of(INPUTS), [space.uniform(0.5), space.uniform(0.95)])
    assert isinstance(outcomes[0], float) and "SIGSEGV" in outcomes[1] and dense_ms > 0


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        ([sys.executable, "-c", "print('fast')", "{model}"], "no positive number"),
        ([sys.executable, "-c", "raise SystemExit('broken')", "{model}"], "status 1.*broken"),
        ([sys.executable, "-c", "import time; time.sleep(60)", "{model}"], "longer than"),
        (["no-such-program", "{model}"], "cannot be started"),
    ],
)
def test_commands_that_fail_are_told(command, expected):
    with pytest.raises(TargetError, match=expected):
        measure(Net(4), INPUTS, CommandTarget(command, timeout_s=2), settings=QUICK)


def test_a_command_needs_the_model():
    with pytest.raises(TargetError, match=r"\{model\}"):
        CommandTarget(["benchmark"])


def test_ssh_leaves_nothing_behind_and_tells_what_is_missing(sshd, tmp_path):
    there = ["-o", f"SetEnv=TMPDIR={tmp_path}"]
    with pytest.raises(TargetError, match=r"No module named.*install it there"):
        measure(Net(4), INPUTS, board(sshd, *there, runtime="tensorrt"), settings=QUICK)
    assert measure(Net(4), INPUTS, board(sshd, *there), settings=QUICK).conditions["host"] == "board"
    assert not list(tmp_path.glob("tmp*"))  # the folder of mktemp


def test_ssh_refuses_wrong_host_keys_and_unreachable_hosts(sshd, monkeypatch):
    known = (sshd / "known").read_text()
    try:
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", sshd / "other"], check=True)
        other = (sshd / "other.pub").read_text().split()[:2]
        (sshd / "known").write_text(f"{known.split()[0]} {' '.join(other)}\n")
        with pytest.raises(TargetError, match="verification failed"):
            measure(Net(4), INPUTS, board(sshd), settings=QUICK)
    finally:
        (sshd / "known").write_text(known)
    with pytest.raises(TargetError, match=r"ssh nowhere\.invalid"):
        measure(Net(4), INPUTS, SshTarget(host="nowhere.invalid", connect_timeout_s=2), settings=QUICK)
    with pytest.raises(TargetError, match="must be a host"):
        SshTarget(host="-oProxyCommand=true")


def test_a_cut_connection_is_tried_again_and_then_reported(sshd, monkeypatch):
    attempts = []
    real = ssh_module.run_in_group

    def cut(command, *others):
        attempts.append(command)
        return real([*command[:-1], "kill -9 $PPID; sleep 5"], *others)  # the server's own process

    monkeypatch.setattr(ssh_module, "run_in_group", cut)
    with pytest.raises(TargetError, match="ssh board fails"):
        measure(Net(4), INPUTS, board(sshd), settings=QUICK)
    assert len(attempts) == ssh_module.ATTEMPTS
    attempts.clear()

    def cut_once(command, *others):
        return cut(command, *others) if not attempts else real(command, *others)

    monkeypatch.setattr(ssh_module, "run_in_group", cut_once)
    assert measure(Net(4), INPUTS, board(sshd), settings=QUICK).median_ms > 0 and len(attempts) == 1


@pytest.mark.parametrize(
    ("line", "milliseconds"),
    [
        ("5.2", 5.2),
        (".5 ms", 0.5),
        ("p50 3.75ms", 3.75),
        ("took 1.5e1 ms.", 15.0),
        ("\x1b[32m5.2 ms\x1b[0m", 5.2),
        ("mean 4.0, p90 6.5,", 6.5),
    ],
)
def test_milliseconds_of_a_line(line, milliseconds):
    assert milliseconds_in(line) == milliseconds


@pytest.mark.parametrize("line", ["3,7 ms", "1,234.5 ms", "5e400", "1.2.3", "4_500", "-3", "0.0", "fast", "nan", ""])
def test_what_could_be_another_number_is_refused(line):
    with pytest.raises(TargetError, match="no positive number"):
        milliseconds_in(line)


def test_a_program_that_fails_is_not_said_to_have_printed_nothing():
    command = [sys.executable, "-c", "print(5.0); raise SystemExit('no such board')", "{model}"]
    with pytest.raises(TargetError, match="ended with status 1: no such board"):
        measure(Net(4), INPUTS, CommandTarget(command), settings=QUICK)


def test_a_file_that_cannot_be_run_is_told(tmp_path):
    (tmp_path / "timer").write_text("echo 5")
    with pytest.raises(TargetError, match="cannot be started"):
        measure(Net(4), INPUTS, CommandTarget([str(tmp_path / "timer"), "{model}"]), settings=QUICK)


def test_children_that_a_command_leaves_behind_are_ended():
    started = time.monotonic()
    ended = run_in_group(["sh", "-c", "sleep 30 & echo $!"], timeout_s=20)
    assert time.monotonic() - started < 10
    child = int(ended.stdout)
    for _ in range(100):
        if not Path(f"/proc/{child}").exists() or "Z" in Path(f"/proc/{child}/stat").read_text().split()[2]:
            return
        time.sleep(0.05)
    raise AssertionError("the child is still there")


def test_boards_behind_other_ports_and_settings_are_other_targets():
    one, other = (SshTarget(host="root@localhost", ssh_options=["-p", port]) for port in ("2222", "2223"))
    assert one.description != other.description
    assert SshTarget(host="a", python="b").description != SshTarget(host="a").description
    with torch_threads(1):
        single = TorchTarget().description
    assert single == TorchTarget(threads=1).description != TorchTarget(threads=2).description


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TorchTarget(threads=-1), "threads must be positive"),
        (lambda: OnnxTarget(threads=0), "threads must be positive"),
        (lambda: OnnxTarget(device="cuda:0"), "is cpu or cuda"),
        (lambda: OnnxTarget("openvino", device="cuda"), "is cpu or gpu"),
    ],
)
def test_targets_that_cannot_be(make, message):
    with pytest.raises(TargetError, match=message):
        make()


def test_an_answer_without_arrays_is_told():
    answer = json.dumps({"samples": [[1.0]], "outputs": [[""]], "conditions": {}})
    ended = subprocess.CompletedProcess([], 0, f"prunefront {answer}".encode(), b"")
    with pytest.raises(TargetError, match="cannot be read"):
        read_answer(ended, 1, "board", "")


def test_the_home_of_the_other_machine():
    assert _quoted("~/v env/bin/python") == "\"$HOME\"/'v env/bin/python'" and _quoted("python3") == "python3"
