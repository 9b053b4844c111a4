"""Dynamic batch loading against its formula, and through kills; padding that counts nowhere."""

import math
import signal
from collections import Counter

import pytest
import torch
from torch.nn import functional as F

from prunefront.runners.finetuning import Distill, Domains, Recipe, finetune
from prunefront.runners.finetuning.distillation import distillation_loss, hidden_loss, uniform_cross_entropy
from prunefront.runners.finetuning.domains import DynamicLoading, domain_losses
from prunefront.runners.tasks.hf_causal_lm import hf_causal_lm, next_token_loss
from prunefront.runners.tasks.texts import Packed
from prunefront.spaces.errors import ConfigError, FinetuneError

pytest.importorskip("transformers")

TINY = {"model_type": "llama", "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1,
        "num_attention_heads": 2, "attention_dropout": 0.1}  # fmt: skip
MIXED = Recipe("adamw", 1e-2, steps=30, evaluate_steps=10, precision="float32", domains=Domains(every=4))


def packed(**sizes):
    """Sequences of one number each: the domain's hundred, and the row."""
    rows = {n: (100 * i + torch.arange(size))[:, None].repeat(1, 4) for i, (n, size) in enumerate(sizes.items())}
    return Packed(rows, batch_size=10, extra={}, others=rows)


def loading(data, **reference):
    return DynamicLoading(data, Domains(every=1), reference, seed=0)


def test_weights_grow_by_the_exponential_of_the_excess_loss():
    made = loading(packed(web=60, books=20), web=2.0, books=3.0)
    assert made.weights == {"web": 0.75, "books": 0.25}
    made.update(1, {"web": 2.5, "books": 2.0})  # books is better than asked: it is not punished
    web = 0.75 * math.exp(0.5)
    assert made.weights["web"] == pytest.approx(web / (web + 0.25)) and sum(made.weights.values()) == pytest.approx(1)
    made.update(2, {"web": 2.5, "books": 4.0})
    web, books = made.history[0]["weights"]["web"] * math.exp(0.5), made.history[0]["weights"]["books"] * math.exp(1.0)
    assert made.weights["books"] == pytest.approx(books / (web + books))
    with pytest.raises(FinetuneError, match="step 3"):
        made.update(3, {"web": math.nan, "books": 1.0})


def test_rows_are_drawn_by_weight_and_all_come_before_one_comes_again():
    made = loading(packed(web=30, books=10), web=0.0, books=0.0)
    made.weights = {"web": 0.2, "books": 0.8}
    rows = [int(row[0]) for step in range(300) for row in made.batch(step)["input_ids"]]
    assert sum(row >= 100 for row in rows) / len(rows) == pytest.approx(0.8, abs=0.03)
    for first, size in ((0, 30), (100, 10)):
        own = [row for row in rows if first <= row < first + 100]
        counts = Counter(own)
        assert len(counts) == size and max(counts.values()) - min(counts.values()) <= 1
        assert sorted(own[:size]) == list(range(first, first + size)) != own[:size]


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    folder = tmp_path_factory.mktemp("domains")
    (folder / "a.txt").write_text("abcdefgh" * 200)
    (folder / "b.txt").write_text("".join(chr(97 + i * i % 23) for i in range(800)))
    train = {"letters": str(folder / "a.txt"), "squares": str(folder / "b.txt")}
    return hf_causal_lm(config=TINY, train=train, sequence_length=16, batch_size=8, score="log_likelihood")


def tune(task, recipe=MIXED, **options):
    given = {"training": task.training, "loss": task.loss, "score": task.score, **options}
    return finetune(task.make_model(), recipe=recipe, **given)


def test_the_dense_model_sets_the_losses_to_reach(task):
    dense = task.make_model()
    with torch.no_grad():
        dense.lm_head.weight.zero_()  # all 256 tokens alike
    found = tune(task, teacher=dense).metrics["domains"]
    assert found["reference"] == pytest.approx(dict.fromkeys(["letters", "squares"], math.log(256)), rel=1e-5)
    assert [update["step"] for update in found["history"]] == [4, 8, 12, 16, 20, 24, 28]
    given = tune(task, Recipe(**{**vars(MIXED), "domains": Domains(4, {"letters": 5.5, "squares": 1.0})}))
    weights = [update["weights"]["squares"] for update in given.metrics["domains"]["history"]]
    assert weights[-1] > weights[0] > 1 / 3 and given.metrics["domains"]["drawn"]["squares"] > 30 * 8 / 2


def test_losses_of_domains_are_those_of_their_own_text(task):
    model = task.make_model()
    found = domain_losses(model, task.training.probes, next_token_loss, None)
    for name, rows in task.training.others.items():
        with torch.no_grad():
            ids = rows.long()
            assert found[name] == pytest.approx(model(input_ids=ids, labels=ids).loss.item(), rel=1e-2)


def test_an_interrupted_mixture_ends_with_the_same_bits(task, tmp_path):
    reference = {"letters": 1.0, "squares": 2.0}
    recipe = Recipe(**{**vars(MIXED), "domains": Domains(4, reference)})
    calls = []

    def interrupting(output, batch):
        calls.append(1)
        if len(calls) in (16, 50):  # between updates, and with probes counted
            signal.raise_signal(signal.SIGINT)
        return next_token_loss(output, batch)

    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            tune(task, recipe, loss=interrupting, run_dir=tmp_path / "a")
    resumed, whole = tune(task, recipe, run_dir=tmp_path / "a"), tune(task, recipe)
    assert resumed.metrics["domains"] == whole.metrics["domains"]
    assert resumed.metrics["curve"] == whole.metrics["curve"]
    assert all(torch.equal(a, b) for a, b in zip(resumed.model.parameters(), whole.model.parameters(), strict=True))


def test_mistakes_with_domains(task, tmp_path):
    single = Packed({"text": torch.zeros(20, 16, dtype=torch.int32)}, 4, {})
    with pytest.raises(ConfigError, match=r"only one; name them: task.train.web"):
        tune(task, training=single, teacher=task.make_model())
    with pytest.raises(ConfigError, match="dense model as teacher"):
        tune(task)
    with pytest.raises(ConfigError, match=r"losses of letters; the domains are letters, squares"):
        tune(task, Recipe(**{**vars(MIXED), "domains": Domains(4, {"letters": 1.0})}))
    other = Packed(task.training.domains, 8, {}, {"text": torch.zeros(4, 16, dtype=torch.int32)})
    with pytest.raises(ConfigError, match=r"task.search has no letters, squares"):
        tune(task, training=other, teacher=task.make_model())
    with pytest.raises(ConfigError, match="at least 0"):
        Domains(every=-1)


def test_padding_counts_in_no_loss():
    mine, theirs = torch.randn(3, 5, 7), torch.randn(3, 5, 7)
    text = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [1, 0, 0, 0, 0]])
    expected = sum(
        F.kl_div(mine[i, j].log_softmax(-1), theirs[i, j].softmax(-1), reduction="sum").item()
        for i, j in text.nonzero().tolist()
    ) / int(text.sum())
    plain = Distill(weight=0.5, temperature=1.0)
    found = distillation_loss(mine, theirs, plain, text)
    smooth, hidden = uniform_cross_entropy(mine, text), hidden_loss({"a": mine}, {"a": theirs}, text)
    assert found.item() == pytest.approx(expected, rel=1e-4)
    mine[text == 0], theirs[text == 0] = 1e3 * torch.randn(6, 7), 1e3 * torch.randn(6, 7)
    assert distillation_loss(mine, theirs, plain, text) == found
    assert uniform_cross_entropy(mine, text) == smooth and hidden_loss({"a": mine}, {"a": theirs}, text) == hidden
    classes = torch.randn(3, 7)
    assert distillation_loss(classes, classes + 1, plain, text) == pytest.approx(0, abs=1e-6)
