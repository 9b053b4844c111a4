"""On a GPU: spaces, candidates and searches as on the processor; latency; trainings. Skipped without one."""

import copy
import gc
import json
import signal
import subprocess
import sys
import time
import weakref

import pytest
import torch
from optuna.trial import TrialState
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

import prunefront
from prunefront.runners.cli import main
from prunefront.runners.devices import placed
from prunefront.runners.exporting.huggingface import export_huggingface
from prunefront.runners.finetuning.checkpoints import load_checkpoint
from prunefront.runners.finetuning.engine import checkpoint_of
from prunefront.runners.targets import OnnxTarget, TorchTarget
from prunefront.runners.targets.local import TimedOnCuda
from prunefront.runners.tasks.digits import DigitsNet, digits
from prunefront.search.liveness import WORKER
from prunefront.search.measurement import Settings, measure
from prunefront.search.scores import SampleScore, accuracy
from prunefront.search.study import read_study
from prunefront.spaces.criteria import CRITERIA
from prunefront.spaces.devices import CPU
from prunefront.spaces.inputs import Inputs
from prunefront.spaces.proof import outputs_of
from tests.models import build

if not torch.cuda.is_available():
    pytest.skip("needs a GPU", allow_module_level=True)

QUICK = Settings(tolerance=0.05, limit_s=2.0)
TINY = ["task.width=8", "task.epochs=2", "n_trials=8", "sampler=random", "tracker=none"]
ARCHITECTURES = (
    "resnet18",
    "mobilenet_v3_large",
    "swin_t",
    "bert",
    "llama",
    "t5",
    "mixtral",
    "nn.TransformerEncoder",
    "unet",
)


@pytest.fixture(autouse=True)
def exact():
    """Without the rounding of TensorFloat-32, which is torch's choice for convolutions."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = before


def net() -> nn.Module:
    torch.manual_seed(0)
    return DigitsNet(8).eval()


def batches(count: int = 4) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(128, 1, 8, 8, generator=generator), torch.randint(10, (128,), generator=generator))
        for _ in range(count)
    ]


def loss(output, batch):
    return F.cross_entropy(output, batch[1])


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_spaces_are_those_of_the_processor_and_candidates_equal_their_masks(name):
    torch.manual_seed(0)
    model, example_inputs = build(name)
    here = prunefront.discover(model, example_inputs)
    there = prunefront.discover(copy.deepcopy(model).cuda(), example_inputs)
    assert [(group.name, group.size, group.kind) for group in there.groups] == [
        (group.name, group.size, group.kind) for group in here.groups
    ]
    assert (there.dense_cost.macs, there.dense_cost.params) == (here.dense_cost.macs, here.dense_cost.params)
    exact = [group.name for group in there.groups if group.exact]
    plan = there.plan({n: width for n, width in there.uniform(0.5).widths.items() if n in exact})
    inputs = Inputs.of(example_inputs).to("cuda")
    inputs = inputs.map(lambda leaf: leaf.double() if torch.is_tensor(leaf) and leaf.is_floating_point() else leaf)
    candidate, masked = there.apply(plan).double(), there.mask(plan).double()
    assert all(tensor.is_cuda for tensor in candidate.state_dict().values())
    if name != "mixtral":  # what is masked must be routed as the candidate routes: see the zoo's test
        for actual, expected in zip(outputs_of(candidate, inputs), outputs_of(masked, inputs), strict=True):
            assert (actual - expected).abs().max() <= 1e-9 * expected.abs().max()


@pytest.mark.parametrize("criterion", sorted(set(CRITERIA) - {"head_gradient"}))
@pytest.mark.parametrize("compensation", ["bn", "least_squares", "sequential"])
def test_repaired_candidates_are_those_of_the_processor(criterion, compensation):
    found = []
    for model, calibration in ((net(), batches()), (net().cuda(), DataLoader(batches(), batch_size=None))):
        space = prunefront.discover(
            model,
            batches()[0][0][:1],
            calibration=calibration,
            loss=loss,
            criterion=criterion,
            compensation=compensation,
        )
        plan = space.uniform(0.5)
        found.append((plan.widths, space.apply(plan).cpu().eval()))
    assert found[0][0] == found[1][0]
    if criterion == "random":
        return
    images = batches()[1][0]
    with torch.no_grad():
        expected, actual = (model(images) for _, model in found)
    assert (actual - expected).abs().max() < 0.02 * expected.abs().max()


@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
def test_a_search_from_python_takes_data_on_the_processor(tmp_path, autocast):
    images, labels = (torch.cat(parts) for parts in zip(*batches(), strict=True))
    result = prunefront.search(
        net().cuda(),
        images[:1],
        score=accuracy(images, labels),
        test=lambda model: float(next(model.parameters()).is_cuda),
        budget={"macs": "50%"},
        calibration=batches(),
        n_trials=12,
        autocast=autocast,
        run_dir=tmp_path,
    )
    assert result.best.metrics["test"] == 1.0 and not list(tmp_path.glob("*.tmp"))
    loaded = prunefront.load(tmp_path)
    assert next(loaded.parameters()).device.type == "cpu" and loaded(images[:2]).shape == (2, 10)
    assert not json.loads((tmp_path / "front" / result.best.name / "plan.json").read_text())["needs_dense_model"]
    assert json.loads((tmp_path / "result.json").read_text())["machine"]["gpu"]


def test_a_language_model_of_the_gpu_becomes_a_standard_checkpoint(tmp_path):
    torch.manual_seed(0)
    model, inputs = build("llama")
    space = prunefront.discover(model.cuda().eval(), inputs, uniform=True)
    folder = export_huggingface(space.apply(space.uniform(0.5)), tmp_path / "checkpoint", inputs)
    assert (folder / "model.safetensors").exists()


def test_a_task_is_placed_with_what_its_model_is_given():
    task = placed(digits(width=4, epochs=1), "cuda")
    model = task.make_model()
    assert next(model.parameters()).is_cuda and isinstance(task.score, SampleScore) and 0 <= task.score(model) <= 1
    assert placed(task, None) is task and task.device == "cuda" and digits(width=4, epochs=1).device == CPU


def test_processes_of_one_search_take_devices_in_turn(tmp_path, capfd):
    run = tmp_path / "run"
    assert main(["search", *TINY, "n_trials=600", f"run_dir={run}", "devices=[cuda:0,cuda:0,cpu]"]) == 0
    assert (run / "report.html").exists() and not (run / "workers" / "3.log").exists()
    logs = [(run / "workers" / f"{number}.log").read_text() for number in (1, 2)]
    trials = read_study(run).get_trials()
    assert len({trial.user_attrs[WORKER]["pid"] for trial in trials}) == 3, logs
    assert sum(trial.state == TrialState.COMPLETE for trial in trials) >= 600
    assert main(["search", f"resume={run}", "n_trials=604", "devices=[cuda]"]) == 0
    assert main(["worker", str(run), "devices=[cuda:0]"]) == 0
    assert main(["finetune", str(run), "device=cuda", "finetune.epochs=2", "finetune.distill.weight=0.5"]) == 0
    assert main(["load-check", str(run)]) == 0
    capfd.readouterr()


def test_rounds_search_and_train_on_the_gpu(tmp_path):
    quick = ["rounds=2", "n_trials=4", "finetune.epochs=1", "device=cuda"]
    assert main(["rounds", *TINY[:2], "tracker=none", *quick, f"run_dir={tmp_path / 'run'}"]) == 0


@pytest.mark.parametrize("target", [["target=torch", "target.device=cuda"], ["target=onnxruntime"]])
def test_latency_is_measured_wherever_the_search_runs(tmp_path, target, capsys):
    latency = ["latency.most=16", "latency.measurement_s=0.5", f"latency.cache={tmp_path}"]
    assert main(["measure", "task.width=32", TINY[1], *target, *latency, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["target"]["target"] == target[0].partition("=")[2]
    for device in ("cuda", "cpu"):
        run = tmp_path / device
        overrides = [*TINY[:2], "tracker=none", "n_trials=4", "mode=front", f"run_dir={run}"]
        assert main(["search", *overrides, *target, *latency, f"devices=[{device}]"]) == 0
        front = json.loads((run / "result.json").read_text())["front"]
        assert front and all(row["latency_ms"] > 0 and row["latency_ratio"] > 0 for row in front)


class Wide(nn.Module):
    def __init__(self, width: int, asks: bool = False) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(8, width, 3), nn.ReLU(), nn.Conv2d(width, 8, 3))
        self.asks = asks

    def forward(self, x):
        if self.asks and float(x.sum()) == 0.5:  # waits for the device
            return x
        return self.layers(x)


@pytest.mark.parametrize(
    "options", [{}, {"precision": "float16"}, {"precision": "bfloat16", "channels_last": True}, {"compile": True}]
)
@pytest.mark.parametrize("asks", [False, True])
def test_the_torch_target_tells_a_large_model_from_a_small_one(options, asks):
    inputs = torch.randn(32, 8, 56, 56)
    large, small = Wide(1024, asks).eval(), Wide(16, asks).eval()
    found = measure(small, inputs, TorchTarget("cuda", **options), reference=large, settings=QUICK)
    assert 0 < found.low_ms <= found.median_ms <= found.high_ms and found.ratio < 0.7
    assert found.conditions["gpu"] == torch.cuda.get_device_name()
    assert next(large.parameters()).device.type == "cpu"  # a copy was measured
    # An independent clock: many runs between two synchronisations.
    if not options and not asks:
        model, x = copy.deepcopy(large).cuda(), inputs.cuda()
        with torch.inference_mode():
            for _ in range(3):
                model(x)
            torch.cuda.synchronize()
            start = time.perf_counter()
            for _ in range(50):
                model(x)
            torch.cuda.synchronize()
        per_run = (time.perf_counter() - start) / 50 * 1e3
        dense_ms = found.median_ms / found.ratio
        assert dense_ms == pytest.approx(per_run, rel=0.15)


def test_what_a_graph_reads_is_not_freed():
    """A replay of freed memory times nothing, or fails."""
    model, x = Wide(16).cuda().eval(), torch.randn(1, 8, 16, 16).cuda()
    held = weakref.ref(model)
    with torch.inference_mode():
        timed = TimedOnCuda(lambda model=model: model(x))
    del model
    gc.collect()
    assert held() is not None and timed() > 0


def test_models_on_the_gpu_are_measured_by_runtimes_of_the_processor():
    model = Wide(32).eval().cuda()
    assert measure(model, torch.randn(1, 8, 16, 16), OnnxTarget(threads=1), settings=QUICK).median_ms > 0
    assert measure(model, torch.randn(1, 8, 16, 16).cuda(), TorchTarget(threads=1), settings=QUICK).median_ms > 0


TRAINING = """
import sys, torch, prunefront
from tests.test_gpu import batches, loss, net
torch.backends.cudnn.deterministic = True
recipe = prunefront.Recipe(steps=150, ema=0.9, evaluate_steps=50, checkpoint_min=1 / 600, precision=sys.argv[2])
prunefront.finetune(net().cuda(), training=batches(), loss=loss, recipe=recipe, run_dir=sys.argv[1],
                    example_inputs=batches()[0][0][:1])
"""


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_killed_training_goes_on(tmp_path, precision):
    command = [sys.executable, "-c", TRAINING, str(tmp_path / "killed"), precision]
    checkpoint = checkpoint_of(tmp_path / "killed")
    with subprocess.Popen(command) as process:
        deadline = time.monotonic() + 60
        while not checkpoint.exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
    assert checkpoint.exists() and not (tmp_path / "killed").exists() and load_checkpoint(checkpoint)
    for name in ("killed", "whole"):
        subprocess.run([*command[:3], str(tmp_path / name), precision], check=True)
    killed, whole = (prunefront.load(tmp_path / name) for name in ("killed", "whole"))
    for key, expected in whole.state_dict().items():
        assert torch.allclose(killed.state_dict()[key].float(), expected.float(), rtol=1e-3, atol=1e-4), key
