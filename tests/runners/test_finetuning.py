"""Fine-tuning: against plain torch, through kills and mistakes."""

import copy
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections import OrderedDict
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

import prunefront
from prunefront.runners.finetuning import loop
from prunefront.runners.finetuning.checkpoints import load_checkpoint, save_checkpoint
from prunefront.runners.finetuning.distillation import (
    Objective,
    distillation_loss,
    layers,
    uniform_cross_entropy,
)
from prunefront.runners.finetuning.engine import checkpoint_of
from prunefront.runners.finetuning.optimizers import make_optimizer
from prunefront.runners.tasks.base import Epoch, cross_entropy
from prunefront.search.scores import accuracy
from prunefront.spaces.errors import ConfigError, FinetuneError, StorageError
from prunefront.spaces.inputs import Inputs
from tests.processes import environment

Distill, Recipe = prunefront.Distill, prunefront.Recipe
#: Nothing rounded, nothing that a plain loop does not have.
PLAIN = Recipe(precision="float32", epochs=2, lr=0.1)
CLASSES, SAMPLES = 3, 96


def data(samples=SAMPLES):
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(samples, 2, 6, 6, generator=generator)
    return images, (images.mean(dim=(1, 2, 3)) * 20).long().clamp(-1, 1) + 1


def noisy(images, generator):
    return images + 0.1 * torch.randn(images.shape, generator=generator)


def training(seed):
    return Epoch(*data(), noisy, 16, seed)


@torch.no_grad()
def score(model):
    return -float(F.cross_entropy(model(data()[0]).float(), data()[1]))


class Net(nn.Module):
    """With BatchNorm and dropout, whose state and draws must survive a kill."""

    def __init__(self, width=8, classes=CLASSES, dropout=0.2):
        super().__init__()
        self.layers = nn.Sequential(*(Layer(2 if i == 0 else 4, width) for i in range(2)))
        self.dropout = nn.Dropout(dropout)
        self.linear = nn.Linear(4, classes)

    def forward(self, x):
        return self.linear(self.dropout(self.layers(x).mean(dim=(2, 3))))


class Layer(nn.Module):
    def __init__(self, inputs, width):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, 4, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(4)

    def forward(self, x):
        return F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))))


def net(seed=0, **options):
    torch.manual_seed(seed)
    return Net(**options).eval()


def tune(model, recipe=PLAIN, **options):
    return prunefront.finetune(
        model, **{"training": training, "loss": cross_entropy, "score": score, "recipe": recipe, **options}
    )


def same(first, second):
    states = first.state_dict(), second.state_dict()
    return all(torch.equal(a, b) for a, b in zip(*(state.values() for state in states), strict=True))


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_training_is_that_of_a_plain_loop(optimizer):
    model = net(dropout=0.0)
    recipe = replace(PLAIN, optimizer=optimizer, lr=0.01, warmup=0.0, clip_norm=0.5, label_smoothing=0.1)
    seeds = []
    found = tune(model, recipe, training=lambda seed: seeds.append(seed) or training(seed)).model
    reference = copy.deepcopy(model).train()
    matrices = [p for p in reference.parameters() if p.dim() > 1]
    others = [p for p in reference.parameters() if p.dim() == 1]
    groups = [{"params": matrices, "weight_decay": recipe.weight_decay}, {"params": others, "weight_decay": 0}]
    plain = (
        torch.optim.SGD(groups, lr=0.01, momentum=0.9, nesterov=True)
        if optimizer == "sgd"
        else torch.optim.AdamW(groups, lr=0.01)
    )
    batches = [batch for seed in seeds[-2:] for batch in training(seed)]
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(plain, len(batches))
    for images, labels in batches:
        loss = F.cross_entropy(reference(images), labels, label_smoothing=0.1)
        plain.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(reference.parameters(), 0.5)
        plain.step()
        schedule.step()
    for ours, theirs in zip(found.parameters(), reference.parameters(), strict=True):
        assert torch.allclose(ours, theirs, atol=1e-5)


@given(st.integers(1, 2000), st.floats(0, 0.9), st.floats(0, 1))
def test_the_rate_rises_to_its_highest_and_falls_to_its_end(total, warmup, final):
    recipe = Recipe(lr=0.1, warmup=warmup, final_lr=final)
    rates = [recipe.rate(step, total) for step in range(total)]
    turn = round(warmup * total)
    assert all(0 < rate <= 0.1 + 1e-9 for rate in rates)
    assert all(a < b + 1e-12 for a, b in pairwise(rates[:turn]))
    assert all(a >= b - 1e-12 for a, b in pairwise(rates[turn:]))
    assert recipe.rate(total, total) == pytest.approx(0.1 * final) or turn == total


def test_norms_and_biases_do_not_decay():
    model = net()
    groups = make_optimizer(model.parameters(), Recipe()).param_groups
    decayed = {id(p) for group in groups if group["weight_decay"] for p in group["params"]}
    names = {name for name, parameter in model.named_parameters() if id(parameter) in decayed}
    assert names == {f"layers.{i}.conv{j}.weight" for i in (0, 1) for j in (1, 2)} | {"linear.weight"}


def test_the_users_model_teacher_and_random_numbers_are_left_alone():
    model, teacher = net(), net(1)
    kept = copy.deepcopy(model), copy.deepcopy(teacher)
    torch.manual_seed(5)
    np.random.seed(5)
    expected = torch.rand(3), np.random.rand(3)
    torch.manual_seed(5)
    np.random.seed(5)
    found = tune(model, replace(PLAIN, distill=Distill(0.5, hidden=0.1)), teacher=teacher).model
    assert torch.equal(torch.rand(3), expected[0]) and np.array_equal(np.random.rand(3), expected[1])
    assert same(model, kept[0]) and same(teacher, kept[1]) and not same(model, found)
    assert not teacher.training and not found.training
    assert not any(module._forward_hooks for m in (teacher, found) for module in m.modules())


@pytest.mark.parametrize("ema", [0.0, 0.9])
def test_batch_norm_statistics_are_those_of_the_final_weights(ema):
    images = data()[0]  # in two batches, as they are
    halves = list(zip(images.split(48), data()[1].split(48), strict=True))
    found = tune(net(), replace(PLAIN, ema=ema, epochs=5), training=halves).model
    seen = []
    bn = found.layers[1].bn1
    handle = bn.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    bn_before = found.layers[0].bn1
    with torch.no_grad():
        first = [found.layers[0].conv1(half) for half in images.split(48)]
        found.eval()(images)
    handle.remove()
    # Of the first layer: its inputs do not depend on other statistics.
    assert torch.allclose(bn_before.running_mean, torch.stack([x.mean((0, 2, 3)) for x in first]).mean(0), atol=1e-5)
    assert torch.allclose(bn_before.running_var, torch.stack([x.var((0, 2, 3)) for x in first]).mean(0), rtol=1e-3)
    # Of a later one: near what it really sees.
    assert torch.allclose(bn.running_mean, seen[0].mean((0, 2, 3)), atol=0.05)
    assert torch.allclose(bn.running_var, seen[0].var((0, 2, 3)), rtol=0.2)


def test_the_average_is_that_of_the_weights():
    recipe = replace(PLAIN, ema=0.5, epochs=1, final_lr=1.0, warmup=0.0)  # one rate, wherever a run ends
    average = tune(net(), recipe).model.linear.weight
    expected = net().linear.weight
    for step in range(1, 7):
        weight = tune(net(), replace(recipe, ema=0.0, steps=step)).model.linear.weight
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * weight
    assert torch.allclose(average, expected, atol=1e-6)


def test_label_smoothing_is_torchs():
    logits, labels = torch.randn(7, 5), torch.randint(5, (7,))
    ours = 0.8 * F.cross_entropy(logits, labels) + 0.2 * uniform_cross_entropy(logits)
    assert torch.allclose(ours, F.cross_entropy(logits, labels, label_smoothing=0.2))


def test_distillation_is_the_divergence_of_softened_outputs():
    mine, theirs = torch.randn(4, 3, 5), torch.randn(4, 3, 5)
    p, q = (torch.softmax(x / 2, -1) for x in (theirs, mine))
    expected = 4 * (p * (p / q).log()).sum(-1).mean()
    assert torch.allclose(distillation_loss(mine, theirs, Distill(1, 2.0)), expected, atol=1e-6)
    assert distillation_loss(mine, mine, Distill(1, 2.0)).abs() < 1e-6


def test_a_model_learns_its_teachers_outputs_without_labels():
    teacher, images = net(1), data()[0]
    recipe = replace(PLAIN, epochs=20, lr=0.05, distill=Distill(1.0, 2.0))

    @torch.no_grad()
    def distance(model):
        return -float(F.mse_loss(model(images), teacher(images)))

    untaught = net(dropout=0.0)
    found = tune(untaught, recipe, teacher=teacher, loss=lambda output, batch: output.sum() * 0, score=distance)
    assert found.metrics["score"] > distance(untaught) / 4


def test_hidden_states_of_pruned_layers_come_nearer_to_the_teachers():
    teacher, images = net(1, width=8), data()[0]
    student = net(0, width=5, dropout=0.0)

    def distance(model):
        with torch.no_grad():
            return -float(F.mse_loss(model.layers[0](images), teacher.layers[0](images)))

    recipe = replace(PLAIN, epochs=10, distill=Distill(hidden=5.0))
    alone = tune(student, replace(recipe, distill=Distill()), score=distance)
    taught = tune(student, recipe, teacher=teacher, score=distance)
    assert taught.metrics["score"] > alone.metrics["score"] / 1.5


def test_layers_are_the_outermost_modules_that_are_no_stack():
    assert set(layers(net())) == {"layers.0", "layers.1"}
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=20, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=8
    )
    names = set(layers(transformers.BertForSequenceClassification(config)))
    assert {"bert.encoder.layer.0", "bert.encoder.layer.1"} <= names and "bert.encoder" not in names


def test_hugging_face_models_bring_their_loss_and_learn_from_logits():
    transformers = pytest.importorskip("transformers")
    options = {"vocab_size": 20, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2}
    options |= {"pad_token_id": 0}
    torch.manual_seed(0)
    student, teacher = (
        transformers.LlamaForCausalLM(transformers.LlamaConfig(hidden_size=8, intermediate_size=size, **options))
        for size in (8, 16)
    )
    tokens = torch.randint(20, (8, 6))
    recipe = Recipe(optimizer="adamw", lr=1e-2, steps=12, distill=Distill(0.5, 1.0, hidden=0.1))
    batches = [{"input_ids": tokens, "labels": tokens}]
    found = prunefront.finetune(student.eval(), training=batches, recipe=recipe, teacher=teacher.eval())
    losses = [point["loss"] for point in found.metrics["curve"]]
    assert losses[-1] < losses[0] and not hasattr(found.model, "hooks")


def test_training_in_bfloat16_learns_and_keeps_weights_in_float32():
    found = tune(net(), replace(PLAIN, precision="bfloat16", epochs=4))
    assert found.metrics["score"] > score(net()) and found.model.linear.weight.dtype == torch.float32


def test_it_stops_early_with_the_best():
    scores = iter([0.1, 0.5, 0.3, 0.2, 0.9, 0.9])
    kept = []

    def falling(model):
        kept.append(copy.deepcopy(model))
        return next(scores)

    found = tune(net(), replace(PLAIN, epochs=6, patience=2), score=falling)
    assert [e["score"] for e in found.metrics["evaluations"]] == [0.1, 0.5, 0.3, 0.2]
    assert found.metrics["score"] == 0.5 and found.metrics["steps"] == 24 and same(found.model, kept[1])


def test_the_saved_model_loads_and_passes_the_check(tmp_path):
    from prunefront.runners.check import check_model

    images, labels = data()
    found = tune(net(), run_dir=tmp_path / "a", test=accuracy(images, labels))
    loaded = prunefront.load(tmp_path / "a")
    assert torch.allclose(loaded(images), found.model(images), atol=1e-5)
    assert len(list(check_model(tmp_path / "a"))) == 4
    metrics = json.loads((tmp_path / "a" / "metrics.json").read_text())
    assert {"score", "test", "macs", "params", "curve", "evaluations", "seconds", "recipe"} <= set(metrics)
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    again = tune(net(), run_dir=tmp_path / "a", callbacks=[lambda progress: pytest.fail("trained again")])
    assert again.metrics["score"] == found.metrics["score"]
    with pytest.raises(FinetuneError, match=r"finetune.lr 0.1, not 0.2"):
        tune(net(), replace(PLAIN, lr=0.2), run_dir=tmp_path / "a")
    assert tune(net(), replace(PLAIN, lr=0.2), run_dir=tmp_path / "a", restart=True).metrics["recipe"]["lr"] == 0.2


RECIPES = {
    "sgd": Recipe(precision="float32", epochs=30, ema=0.9, patience=100, evaluate_steps=7, clip_norm=1.0),
    "adamw": Recipe(optimizer="adamw", lr=1e-3, epochs=30, distill=Distill(0.5, hidden=0.1)),
}
SCRIPT = """
import sys, time
from dataclasses import replace
import torch
from tests.runners.test_finetuning import RECIPES, net, tune
torch.set_num_threads(1)
recipe = replace(RECIPES[sys.argv[1]], checkpoint_min=0.0)
teacher = net(1) if recipe.distill else None
tune(net(), recipe, teacher=teacher, run_dir=sys.argv[2], callbacks=[lambda progress: time.sleep(0.02)])
"""


@pytest.mark.parametrize("name", RECIPES)
def test_a_killed_training_ends_as_one_that_was_not(tmp_path, name):
    killed = tmp_path / "killed"
    for least in (20, 75):  # killed twice, not at the end of an epoch
        with subprocess.Popen([sys.executable, "-c", SCRIPT, name, str(killed)], env=environment()) as process:
            deadline = time.monotonic() + 120
            while not _saved_step(killed) >= least:
                assert process.poll() is None and time.monotonic() < deadline
                time.sleep(0.01)
            process.send_signal(signal.SIGKILL)
        assert not killed.exists()
        assert 20 <= _saved_step(killed) < 180
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        teacher = net(1) if RECIPES[name].distill else None
        resumed = tune(net(), RECIPES[name], teacher=teacher, run_dir=killed)
        whole = tune(net(), RECIPES[name], teacher=teacher)
    finally:
        torch.set_num_threads(threads)
    assert same(resumed.model, whole.model)
    for key in ("curve", "evaluations", "score", "steps"):
        assert resumed.metrics[key] == whole.metrics[key]
    assert not checkpoint_of(killed).exists()


def _saved_step(folder):
    path = checkpoint_of(folder)
    return load_checkpoint(path)[1]["step"] if path.exists() else -1


def test_loaders_with_draws_of_their_own_go_on_in_the_middle_of_an_epoch(tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "POINTS", 4)  # one more part of the state: the mean loss between two points
    images, labels = data()

    class Augmented(torch.utils.data.Dataset):
        def __len__(self):
            return len(images)

        def __getitem__(self, index):
            return images[index] + 0.1 * torch.randn(()) + 0.1 * np.random.randn(), labels[index]

    def loader():
        return torch.utils.data.DataLoader(Augmented(), 16, shuffle=True)

    calls = []

    def interrupted(output, batch):
        calls.append(1)
        if len(calls) == 9:
            signal.raise_signal(signal.SIGINT)
        return cross_entropy(output, batch)

    recipe = replace(PLAIN, epochs=3)
    with pytest.raises(KeyboardInterrupt):
        tune(net(), recipe, training=loader(), loss=interrupted, run_dir=tmp_path / "a")
    assert _saved_step(tmp_path / "a") == 9
    resumed = tune(net(), recipe, training=loader(), run_dir=tmp_path / "a")
    whole = tune(net(), recipe, training=loader())
    assert same(resumed.model, whole.model) and resumed.metrics["curve"] == whole.metrics["curve"]
    assert [point["step"] for point in whole.metrics["curve"]] == [4, 8, 12, 16, 18]


def test_the_last_good_checkpoint_is_kept_when_the_loss_is_not_a_number(tmp_path):
    calls = []

    def breaking(output, batch):
        calls.append(1)
        return cross_entropy(output, batch) * (math.nan if len(calls) == 9 else 1.0)

    recipe = replace(PLAIN, checkpoint_min=0.0)
    with pytest.raises(FinetuneError, match=r"loss is nan at step 9 of 12; the checkpoint of step 8 is kept in"):
        tune(net(), recipe, loss=breaking, run_dir=tmp_path / "a")
    tensors, numbers = load_checkpoint(checkpoint_of(tmp_path / "a"))
    assert numbers["step"] == 8 and all(bool(tensor.isfinite().all()) for tensor in tensors.values())


def test_a_checkpoint_of_another_model_or_recipe_is_refused(tmp_path):
    def interrupt(progress):
        signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        tune(net(), run_dir=tmp_path / "a", callbacks=[interrupt])
    with pytest.raises(FinetuneError, match="another plan or other weights"):
        tune(net(1), run_dir=tmp_path / "a")
    with pytest.raises(FinetuneError, match=r"finetune.distill.weight 0.0, not 0.5"):
        tune(net(), replace(PLAIN, distill=Distill(0.5)), teacher=net(1), run_dir=tmp_path / "a")
    with pytest.raises(FinetuneError, match="batches 6, not 5"):
        tune(net(), run_dir=tmp_path / "a", training=lambda seed: list(training(seed))[:5])
    path = checkpoint_of(tmp_path / "a")
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(StorageError, match="damaged"):
        tune(net(), run_dir=tmp_path / "a")


def test_a_checkpoint_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "a.safetensors"
    save_checkpoint(path, {"x": torch.ones(2)}, {"step": 1})

    def full(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError, match="no space left"):
        save_checkpoint(path, {"x": torch.zeros(2)}, {"step": 2})
    tensors, numbers = load_checkpoint(path)
    assert numbers["step"] == 1 and tensors["x"].tolist() == [1, 1] and list(tmp_path.iterdir()) == [path]


def no_memory(output, batch):
    raise RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you tried")


FLAT = nn.Sequential(nn.Flatten(), nn.Linear(72, CLASSES))


@pytest.mark.parametrize(
    ("options", "recipe", "error", "expected"),
    [
        ({"loss": no_memory}, {}, FinetuneError, "lower the batch size"),
        ({"loss": lambda output, batch: output}, {}, FinetuneError, "one number"),
        ({"loss": None}, {}, FinetuneError, "has no loss"),
        ({"training": []}, {}, FinetuneError, "no batches"),
        ({"training": iter([data()])}, {}, ConfigError, "generator"),
        ({"training": [(torch.zeros(4, 9), torch.zeros(4))]}, {}, FinetuneError, "rejects its example inputs"),
        ({"teacher": net(classes=4)}, {"distill": Distill(0.5)}, FinetuneError, "logits of one shape"),
        (
            {"teacher": nn.Sequential(nn.Flatten(), nn.Linear(72, 3))},
            {"distill": Distill(hidden=1)},
            FinetuneError,
            "no layer",
        ),
        ({}, {"distill": Distill(0.5)}, ConfigError, "pass teacher="),
        ({"teacher": net(1)}, {}, ConfigError, "nothing to learn"),
        ({"score": None}, {"patience": 2}, ConfigError, "patience"),
        ({"score": lambda model: math.nan}, {}, FinetuneError, "cannot be scored"),
    ],
)
def test_mistakes(options, recipe, error, expected):
    with pytest.raises(error, match=expected):
        tune(net(), replace(PLAIN, **recipe), **options)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"optimizer": "lion"}, "one of sgd, adamw"),
        ({"precision": "float16"}, "one of bfloat16, float32"),
        ({"lr": 0.0}, "finetune.lr"),
        ({"ema": 1.0}, "finetune.ema"),
        ({"steps": 0}, "finetune.steps"),
    ],
)
def test_recipes_refuse_what_makes_no_sense(values, expected):
    with pytest.raises(ConfigError, match=expected):
        Recipe(**values)
    with pytest.raises(ConfigError, match=r"distill.weight"):
        Distill(weight=2.0)


def test_training_inside_autocast_is_refused():
    with torch.autocast("cpu", dtype=torch.bfloat16), pytest.raises(ConfigError, match="autocast"):
        tune(net())


def test_outputs_of_hugging_face_are_mappings():
    output = OrderedDict(logits=torch.zeros(2, 3), past_key_values=None)
    from prunefront.runners.finetuning.distillation import logits_of

    assert logits_of(output).shape == (2, 3) and logits_of(torch.zeros(2, 3, 4, 5)).shape == (2, 4, 5, 3)


@pytest.mark.parametrize("options", [{}, {"ema": 0.5}], ids=["plain", "ema"])
def test_half_precision_weights_take_steps_that_are_too_small_for_them(options, tmp_path):
    """Steps of a hundredth of what bfloat16 can tell apart add up, and go on after an interruption."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 3)).to(torch.bfloat16)
    batches = [(torch.ones(4, 2, dtype=torch.bfloat16), torch.zeros(4, dtype=torch.long))]
    recipe = Recipe(optimizer="adamw", lr=2e-5, warmup=0, final_lr=1, weight_decay=0, epochs=200, **options)
    given = {"training": batches, "loss": lambda out, batch: nn.functional.cross_entropy(out.float(), batch[1])}
    found = prunefront.finetune(model, recipe=recipe, **given)
    assert found.model[0].weight.dtype == torch.bfloat16
    moved = (found.model[2].weight.float() - model[2].weight.float()).abs().max()
    assert moved > 2e-3

    def interrupted(progress):
        if progress.step == 100:
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        prunefront.finetune(model, recipe=recipe, run_dir=tmp_path / "a", callbacks=[interrupted], **given)
    again = prunefront.finetune(model, recipe=recipe, run_dir=tmp_path / "a", **given)
    assert all(torch.equal(a, b) for a, b in zip(again.model.parameters(), found.model.parameters(), strict=True))


class Stack(nn.Module):
    def __init__(self, blocks):
        super().__init__()
        self.blocks, self.head = nn.ModuleList(blocks), nn.Linear(8, 3)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class Residual(nn.Module):
    def __init__(self, size):
        super().__init__()
        self.up, self.down = nn.Linear(8, 8), nn.Linear(8, 8)
        with torch.no_grad():
            self.down.weight.mul_(size)
            self.down.bias.mul_(size)

    def forward(self, x):
        return x + self.down(torch.relu(self.up(x)))


def test_hidden_states_are_those_of_the_layers_that_stayed():
    """Without its first two blocks, which do nothing, the student computes what the teacher does."""
    torch.manual_seed(0)
    teacher = nn.Sequential(nn.Linear(4, 8), Stack([Residual(0), Residual(0), Residual(5), Residual(5)])).eval()
    x = torch.randn(6, 4)
    space = prunefront.discover(teacher, x, kinds=["block"])
    (group,) = space.groups
    student = space.slice(prunefront.spaces.Plan.of({group.name: [2, 3]}))
    with Objective(student, None, Recipe(distill=Distill(1.0, hidden=1.0)), teacher) as objective:
        assert float(objective(Inputs.of(x), x)) < 1e-6


def test_the_average_of_the_weights_has_no_hooks_left():
    found = tune(net(), replace(PLAIN, ema=0.9, distill=Distill(hidden=1.0)), teacher=net(3))
    assert not any(module._forward_hooks for module in found.model.modules())


@pytest.mark.parametrize("shape", [(6, 1), (6,)])
def test_one_number_a_sample_has_no_classes(shape):
    model, x = nn.Sequential(nn.Linear(2, 1), nn.Flatten(*((0, 1) if len(shape) == 1 else (1, -1)))), torch.randn(6, 2)
    for recipe in (Recipe(epochs=1, label_smoothing=0.1), Recipe(epochs=1, distill=Distill(0.5))):
        teacher = nn.Linear(2, 1) if recipe.distill else None
        with pytest.raises(FinetuneError, match="one number a sample"):
            prunefront.finetune(
                model, training=[(x, x)], loss=lambda out, batch: out.mean(), recipe=recipe, teacher=teacher
            )


def test_a_teacher_alone_needs_no_labels():
    x = torch.randn(6, 4)
    recipe = Recipe(epochs=3, distill=Distill(1.0))
    found = prunefront.finetune(nn.Linear(4, 3), training=[x], recipe=recipe, teacher=nn.Linear(4, 3))
    assert found.metrics["curve"][-1]["loss"] > 0


def test_a_failing_score_costs_no_training(tmp_path):
    def failing(model):
        raise RuntimeError("the score's own mistake")

    seen = []
    options = {"run_dir": tmp_path / "a", "callbacks": [lambda progress: seen.append(progress.step)]}
    for _ in range(2):
        with pytest.raises(FinetuneError, match="own mistake"):
            tune(net(), replace(PLAIN, epochs=1), score=failing, **options)
    trained = len(seen)
    found = tune(net(), replace(PLAIN, epochs=1), score=lambda model: 1.0, **options)
    assert len(seen) == trained + 1 and found.metrics["score"] == 1.0  # the score alone


def test_restarting_keeps_what_is_not_ours(tmp_path):
    tune(net(), run_dir=tmp_path / "a")
    (tmp_path / "a" / "mine.txt").write_text("mine")
    with pytest.raises(ConfigError):
        tune(net(), Recipe(patience=2), score=None, run_dir=tmp_path / "a", restart=True)
    assert (tmp_path / "a" / "metrics.json").exists()
    tune(net(), run_dir=tmp_path / "a", restart=True)
    assert (tmp_path / "a" / "mine.txt").read_text() == "mine"


def test_scores_that_a_finished_training_lacks_are_added(tmp_path):
    found = tune(net(), score=None, run_dir=tmp_path / "a")
    assert "test" not in found.metrics
    again = tune(net(), score=None, test=lambda model: 0.5, run_dir=tmp_path / "a")
    assert again.metrics["test"] == 0.5
    assert tune(net(), score=None, run_dir=tmp_path / "a").metrics["test"] == 0.5


def test_another_teacher_is_another_training(tmp_path):
    recipe = replace(PLAIN, epochs=1, distill=Distill(0.5))
    tune(net(), recipe, teacher=net(3), run_dir=tmp_path / "a")
    with pytest.raises(FinetuneError, match="made with teacher"):
        tune(net(), recipe, teacher=net(4), run_dir=tmp_path / "a")


def test_several_inputs_and_labels_in_a_mapping():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(3, 2)

        def forward(self, x, y):
            return self.layer(x * y)

    x, y, labels = torch.randn(6, 3), torch.randn(6, 3), torch.zeros(6, dtype=torch.long)

    def loss(output, batch):
        return nn.functional.cross_entropy(output, batch["label"] if isinstance(batch, dict) else batch[2])

    one = {"loss": loss, "recipe": Recipe(epochs=1)}
    prunefront.finetune(Two(), training=[(x, y, labels)], example_inputs=(x[:1], y[:1]), **one)
    prunefront.finetune(Two(), training=[{"x": x, "y": y, "label": labels}], **one)


def test_a_loader_without_an_end_is_read_as_far_as_training_goes():
    class Endless:
        def __iter__(self):
            while True:
                yield torch.ones(4, 2), torch.zeros(4, dtype=torch.long)

    loss = lambda output, batch: nn.functional.cross_entropy(output, batch[1])  # noqa: E731
    found = prunefront.finetune(nn.Linear(2, 3), training=Endless(), loss=loss, recipe=Recipe(steps=5))
    assert found.metrics["steps"] == 5


def test_frozen_statistics_stay():
    class Frozen(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.norm, self.head = nn.Linear(2, 4), nn.BatchNorm1d(4), nn.Linear(4, 3)
            self.norm.running_mean.fill_(7)

        def train(self, mode=True):
            super().train(mode)
            self.norm.eval()
            return self

        def forward(self, x):
            return self.head(self.norm(self.layer(x)))

    batches = [(torch.randn(8, 2), torch.zeros(8, dtype=torch.long))]
    loss = lambda output, batch: nn.functional.cross_entropy(output, batch[1])  # noqa: E731
    found = prunefront.finetune(Frozen(), training=batches, loss=loss, recipe=Recipe(epochs=2, lr=1e-6))
    assert torch.equal(found.model.norm.running_mean, torch.full((4,), 7.0))


def test_the_modes_of_the_user_s_model_stay():
    model = nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4), nn.Dropout(), nn.Linear(4, 3)).train()
    model[1].eval()
    batches = [(torch.randn(8, 2), torch.zeros(8, dtype=torch.long))]
    loss = lambda output, batch: nn.functional.cross_entropy(output, batch[1])  # noqa: E731
    prunefront.finetune(model, training=batches, loss=loss, recipe=Recipe(epochs=1))
    assert [module.training for module in model.modules()] == [True, True, False, True, True]


def test_a_last_batch_of_one_is_explained():
    model = nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4), nn.Linear(4, 3))
    batches = [(torch.randn(n, 2), torch.zeros(n, dtype=torch.long)) for n in (4, 1)]
    loss = lambda output, batch: nn.functional.cross_entropy(output, batch[1])  # noqa: E731
    with pytest.raises(FinetuneError, match="drop_last=True"):
        prunefront.finetune(model, training=batches, loss=loss, recipe=Recipe(epochs=2))


def test_images_and_volumes_in_one_model():
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.flat, self.deep, self.head = nn.Conv2d(1, 2, 3), nn.Conv3d(1, 2, 3), nn.Linear(4, 3)

        def forward(self, x):
            return self.head(
                torch.cat(
                    [self.flat(x).mean((2, 3)), self.deep(x[:, :, None].repeat(1, 1, 3, 1, 1)).mean((2, 3, 4))], 1
                )
            )

    batches = [(torch.randn(4, 1, 5, 5), torch.zeros(4, dtype=torch.long))]
    loss = lambda output, batch: nn.functional.cross_entropy(output, batch[1])  # noqa: E731
    assert prunefront.finetune(Both(), training=batches, loss=loss, recipe=Recipe(epochs=1)).metrics["steps"] == 1
