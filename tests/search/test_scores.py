"""Scores by sample, fidelity against its definition, and races that end early."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import prunefront
from prunefront.search.racing import race
from prunefront.search.scores import Fidelity, SampleScore, accuracy, parts_of
from prunefront.spaces.errors import ConfigError

X = torch.randn(400, 6, generator=torch.Generator().manual_seed(0))


def linear(seed: int, outputs: int = 5) -> nn.Linear:
    torch.manual_seed(seed)
    return nn.Linear(6, outputs)


def test_accuracy_is_the_share_of_right_answers_and_a_plain_function_of_a_model():
    model = linear(0)
    labels = model(X).argmax(1)
    labels[:100] = (labels[:100] + 1) % 5
    assert accuracy(X, labels, batch_size=130)(model) == pytest.approx(0.75)


def test_fidelity_is_minus_the_divergence_from_the_dense_probabilities():
    dense, other = linear(0), linear(1)
    p, q = dense(X).softmax(1), other(X).softmax(1)
    expected = -(p * (p / q).log()).sum(1).mean().item()
    assert Fidelity(dense, [X[:150], X[150:]])(other) == pytest.approx(expected, rel=1e-5)
    assert Fidelity(dense, [X])(dense) == pytest.approx(0, abs=1e-6)


def test_fidelity_of_other_outputs_is_the_relative_squared_error():
    dense, other = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3)
    x = torch.randn(8, 3, 6, 6)
    wanted, found = dense(x), other(x)
    expected = -F.mse_loss(found, wanted).item() / wanted.var(unbiased=False).item()
    score = Fidelity(dense, [x])
    assert score.measures == ["mse"] and score(other) == pytest.approx(expected, rel=1e-5)


def test_fidelity_of_language_models_is_a_mean_over_positions():
    class Language(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.out = nn.Embedding(11, 8), nn.Linear(8, 11)

        def forward(self, input_ids):
            return {"logits": self.out(self.embed(input_ids))}

    dense, other = Language(), Language()
    batch = {"input_ids": torch.randint(11, (4, 7))}
    p, q = (model(**batch)["logits"].log_softmax(-1) for model in (dense, other))
    expected = -F.kl_div(q, p, reduction="none", log_target=True).sum(-1).mean().item()
    assert Fidelity(dense, [batch])(other) == pytest.approx(expected, rel=1e-5)


def test_parts_hold_every_sample_once_and_start_with_a_tenth():
    batches = [(X[:300], torch.arange(300)), (X[300:], torch.arange(300, 400))]
    parts = parts_of(batches, None)
    assert len(parts[0][1]) == 40
    assert sorted(torch.cat([labels for _, labels in parts]).tolist()) == list(range(400))
    assert all(torch.equal(images, X[labels]) for images, labels in parts)
    assert sum(len(labels) for _, labels in parts_of(batches, 250)) == 250


def test_batches_of_different_shapes_stay_as_they_are():
    batches = [torch.randn(4, 3), torch.randn(4, 5), torch.randn(4, 3)]
    assert [part.shape for part in parts_of(batches, 8)] == [(4, 3), (4, 5)]


class Counting(SampleScore):
    """Values that a candidate brings along; counts the samples that were asked for."""

    def __init__(self, size: int) -> None:
        super().__init__(parts_of([torch.arange(size)], None), lambda output, _: output)
        self.asked = 0

    def values(self, model, part):
        self.asked += len(self.batches[part])
        return model.quality[self.batches[part].numpy()]


def candidate(quality) -> nn.Module:
    model = nn.Module()
    model.quality = quality
    return model


def test_a_clear_loser_costs_a_tenth_and_its_score_is_estimated_from_the_rival():
    noise = np.random.default_rng(0).normal(size=1000)
    score = Counting(1000)
    best = race(candidate(noise), score, None)
    score.asked = 0
    worse = candidate(noise - 0.5 + 0.1 * np.random.default_rng(1).normal(size=1000))
    raced = race(worse, score, best.values)
    assert score.asked == 100 and not raced.is_complete
    assert raced.score == pytest.approx(worse.quality.mean(), abs=0.05)


def test_a_near_tie_is_scored_in_full():
    noise = np.random.default_rng(0).normal(size=1000)
    score = Counting(1000)
    best = race(candidate(noise), score, None)
    other = candidate(noise + 0.1 * np.random.default_rng(1).normal(size=1000) + 0.001)
    raced = race(other, score, best.values)
    assert raced.is_complete and raced.score == pytest.approx(other.quality.mean())


def test_parts_are_no_larger_than_the_largest_batch():
    assert [len(part) for part in parts_of(list(X.split(64)), None)] == [40, 64, 64, 64, 64, 64, 40]


def test_a_score_of_the_mean_ranks_whole_and_given_up_candidates_on_one_scale():
    noise = np.random.default_rng(0).normal(size=1000)
    score = Counting(1000)
    score.of_mean = lambda mean: -float(np.exp(-mean))
    best = race(candidate(noise), score, None)
    assert best.score == pytest.approx(-np.exp(-noise.mean())) == score(candidate(noise))
    worse = race(candidate(noise - 0.5), score, best.values)
    assert not worse.is_complete and worse.score == pytest.approx(-np.exp(-noise.mean() + 0.5))


def test_bad_scores_are_refused():
    with pytest.raises(ConfigError, match="no batches"):
        SampleScore([], lambda output, _: output)
    with pytest.raises(ConfigError, match="kl, mse"):
        Fidelity(linear(0), [X], measure="cosine")
    with pytest.raises(ValueError, match="shape"):
        Fidelity(linear(0), [X])(linear(0, outputs=4))
    with pytest.raises(ValueError, match="not finite"):
        race(candidate(np.full(10, np.nan)), Counting(10), None)
    with pytest.raises(ValueError, match="one number a sample"):
        SampleScore([X], lambda output, _: output.mean())(linear(0))
    assert prunefront.Fidelity is Fidelity


def test_a_single_output_is_no_class_and_is_compared_by_its_error():
    dense, other = linear(0, outputs=1), linear(1, outputs=1)
    score = Fidelity(dense, [X])
    assert score.measures == ["mse"] and score(other) < -0.1
    with pytest.raises(ConfigError, match="there is one output: take mse"):
        Fidelity(dense, [X], measure="kl")


def test_the_classes_of_dense_predictions_are_the_second_dimension():
    class Segments(nn.Module):
        def __init__(self, bias: float) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.out = nn.Conv2d(3, 4, 1)
            with torch.no_grad():
                self.out.bias[0] += bias

        def forward(self, x):
            return {"logits": self.out(x)}

    x = torch.randn(4, 3, 6, 5)
    dense, other = Segments(0.0), Segments(50.0)  # every pixel becomes class 0
    p, q = (model(x)["logits"].log_softmax(1) for model in (dense, other))
    expected = -F.kl_div(q, p, reduction="none", log_target=True).sum(1).mean().item()
    assert Fidelity(dense, [x])(other) == pytest.approx(expected, rel=1e-5) and expected < -1
    assert -1e-6 < Fidelity(dense, [x])(dense) <= 0


def test_all_outputs_with_numbers_for_every_sample_count():
    class Two(nn.Module):
        def __init__(self, one: int, other: int) -> None:
            super().__init__()
            self.one, self.other = linear(one), linear(other, outputs=1)

        def forward(self, x):
            return {"one": self.one(x), "other": self.other(x), "best": self.one(x).argmax(1), "norm": x.norm()}

    score = Fidelity(Two(0, 0), [X])
    assert score.measures == ["kl", "mse"]
    alone = Fidelity(linear(0), [X])(linear(1)), Fidelity(linear(0, 1), [X])(linear(1, 1))
    assert score(Two(1, 0)) == pytest.approx(alone[0]) and score(Two(0, 1)) == pytest.approx(alone[1])
    assert score(Two(1, 1)) == pytest.approx(sum(alone))


def test_batches_that_the_model_rejects_are_told_with_what_decides_its_arguments():
    with pytest.raises(ConfigError, match=r"shapes \[\(400, 6\), \(400,\)\].*SampleScore\(arguments=\.\.\.\)"):
        Fidelity(linear(0), [(X, torch.zeros(400))], arguments=2)


def test_forwards_that_draw_random_numbers_draw_the_same_ones():
    class Sampling(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = linear(0)

        def forward(self, x):
            return self.layer(x + torch.randn_like(x))

    model, score = Sampling().eval(), Fidelity(Sampling().eval(), [X[:50], X[50:100]])
    torch.manual_seed(3)
    before = torch.get_rng_state()
    assert score(model) == score(model) == 0
    assert torch.equal(torch.get_rng_state(), before)


def test_labels_in_a_mapping_are_not_given_to_the_model():
    batches = [{"input": X, "label": linear(0)(X).argmax(1)}]
    score = SampleScore(batches, lambda output, batch: (output.argmax(1) == batch["label"]).float())
    assert score(linear(0)) == 1 and Fidelity(linear(0), batches)(linear(0)) == 0
