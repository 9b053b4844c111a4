"""Latency models and budgets, on targets whose times are computed: what is right is known."""

import json
from itertools import pairwise

import numpy as np
import pytest
import torch
from rich.console import Console
from torch import nn

import prunefront
from prunefront.runners.display import latency_view
from prunefront.search import pace
from prunefront.search.fitting import spread_plans
from prunefront.search.latency import LatencyModel, Measured, Measurements
from prunefront.search.measurement import Settings
from prunefront.search.shapes import inputs_at
from prunefront.search.timing import Timing
from prunefront.spaces.errors import BudgetError, ConfigError, SearchError, TargetError
from prunefront.spaces.inputs import Inputs

INPUTS = torch.randn(1, 3, 12, 12)
DATA = torch.randn(16, 3, 12, 12, generator=torch.Generator().manual_seed(1))


def make_model() -> nn.Module:
    torch.manual_seed(0)
    widths = (3, 16, 24, 32, 16)
    convolutions = [nn.Conv2d(a, b, 3, padding=1) for a, b in pairwise(widths)]
    layers = [part for convolution in convolutions for part in (convolution, nn.ReLU())]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(16 * 144, 4)).eval()


class ComputedTarget:
    """Every layer takes its own time a MAC, in steps of two outputs, and some time whatever its width."""

    def __init__(self, noise: float = 0.0, fails_below: int = 0) -> None:
        self.noise, self.fails_below, self.measured = noise, fails_below, 0
        self.description = {"target": "computed", "noise": noise}
        self.rng = np.random.default_rng(0)

    def seconds(self, model: nn.Module) -> float:
        total = 1e-3
        for number, layer in enumerate(m for m in model.modules() if isinstance(m, nn.Conv2d)):
            if layer.out_channels < self.fails_below:
                raise TargetError(f"kernels of width {layer.out_channels} hang")
            total += (1 + number) * 2e-8 * 1296 * layer.in_channels * (2 * np.ceil(layer.out_channels / 2))
        return float(total)

    def times(self, models, inputs, settings):
        self.measured += len(models)
        drawn = 1 + self.noise * self.rng.standard_normal((len(models), 15))
        return [(self.seconds(m) * row).tolist() for m, row in zip(models, drawn, strict=True)], {"load": 0.0}


@pytest.fixture(scope="module")
def space() -> prunefront.Space:
    return prunefront.discover(make_model(), INPUTS)


def test_predictions_are_near_on_plans_that_were_not_measured(space):
    target = ComputedTarget()
    model = Timing(target, error=0.0, most=48).model(space, prunefront_inputs())
    widths = spread_plans(space, 64, seed=5)
    plans = [space.plan(dict(zip(space.dimensions, row.tolist(), strict=True))) for row in widths]
    truth = np.array([target.seconds(space.slice(plan)) for plan in plans]) / target.seconds(make_model())
    predicted = model.ratios(widths)
    by_macs = space.cost_batch(widths)[:, 0] / space.dense_cost.macs
    error, plain = (float(np.abs(found / truth - 1).mean()) for found in (predicted, by_macs))
    assert error < 0.05 and error < plain / 2
    assert model.error == pytest.approx(error, abs=0.03) and model.tau > 0.9
    assert model.dense_ms == pytest.approx(1e3 * target.seconds(make_model()))


def prunefront_inputs() -> Inputs:
    return Inputs.of(INPUTS)


class UnevenTarget(ComputedTarget):
    """Convolutions of widths that are no multiples of four take twice as long."""

    def seconds(self, model: nn.Module) -> float:
        convolutions = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
        times = [
            m.in_channels * m.out_channels * (1 + (m.in_channels % 4 + m.out_channels % 4 > 0)) for m in convolutions
        ]
        return 1e-3 + 1e-6 * sum(times)


def test_slow_kernels_of_uneven_widths_are_learnt(space):
    target = UnevenTarget()
    model = Timing(target, error=0.0, most=64).model(space, prunefront_inputs())
    widths = spread_plans(space, 64, seed=5)
    even = space.round_widths(np.ceil(widths / 4) * 4.0)
    for rows in (widths, even):
        plans = [space.plan(dict(zip(space.dimensions, row, strict=True))) for row in rows.tolist()]
        truth = np.array([target.seconds(space.slice(plan)) for plan in plans]) / target.seconds(make_model())
        assert float(np.abs(model.ratios(rows) / truth - 1).mean()) < 0.06


class SpellTarget(ComputedTarget):
    """In slow spells the dense model takes 8 % longer, and all others a third."""

    def __init__(self, spells: set[int]) -> None:
        super().__init__(noise=0.003)
        self.spells, self.calls = spells, 0

    def times(self, models, inputs, settings):
        samples, facts = super().times(models, inputs, settings)
        self.calls += 1
        if self.calls in self.spells:
            samples = [[s * (1.08 if number == 0 else 1.33) for s in row] for number, row in enumerate(samples)]
        return samples, facts


@pytest.mark.parametrize("spells", [{1, 2}, {3, 4, 5, 9}], ids=["at first", "later"])
def test_what_is_measured_while_the_machine_is_slow_is_left_out_or_measured_again(space, spells, monkeypatch):
    monkeypatch.setattr(pace, "PAUSE_S", 0.0)
    target = SpellTarget(spells)
    timing = Timing(target, error=0.0, most=48)
    model = timing.model(space, prunefront_inputs())
    dense = target.seconds(make_model())
    for plan in model.measured:
        made = space.slice(space.plan(dict(zip(space.dimensions, plan.widths, strict=True))))
        assert plan.ratio == pytest.approx(target.seconds(made) / dense, rel=0.02)
    assert len(model.measured) == (40 if 1 in spells else 48)
    target.spells = {target.calls + 1}
    found = timing.verify(space.model, space.slice(space.uniform(0.5)), prunefront_inputs())
    assert found.ratio == pytest.approx(target.seconds(space.slice(space.uniform(0.5))) / dense, rel=0.01)


def test_coarse_measurements_wait_for_no_pace_that_they_cannot_tell(space, monkeypatch):
    monkeypatch.setattr(pace, "PAUSE_S", 0.0)
    target = SpellTarget({3, 4, 5, 9})
    model = Timing(target, error=0.0, most=48, settings=Settings(tolerance=0.1)).model(space, prunefront_inputs())
    assert target.calls == 48 / 4 and len(model.measured) == 48
    again = Measurements.from_json(model.known.to_json(), len(space.dimensions))
    assert again.steady == model.measured  # as workers read it


def test_a_machine_that_stays_slower_is_taken_as_it_is_and_said_to_be(space, monkeypatch, caplog):
    monkeypatch.setattr(pace, "PAUSE_S", 0.0)
    monkeypatch.setattr(pace, "PATIENCE_S", 0.0)
    target = SpellTarget(set(range(9, 10**6)))
    model = Timing(target, error=0.0, most=48).model(space, prunefront_inputs())
    assert "has become slower: the dense model takes 8% longer" in caplog.text
    assert len(model.known.measured) == 48 and len(model.measured) >= 12


def test_plans_fill_the_space(space):
    widths = spread_plans(space, 64, seed=0)
    assert len({tuple(row) for row in widths.tolist()}) > 60
    shares = widths / space.sizes
    assert (shares.min(0) < 0.3).all() and (shares.max(0) > 0.9).all()


def test_measuring_stops_when_the_error_is_small_and_is_never_done_twice(space, tmp_path):
    target = ComputedTarget()
    timing = Timing(target, error=0.5, cache=tmp_path / "cache")
    first = timing.model(space, prunefront_inputs())
    # Eight that were predicted before they were measured, and the dense model with every four.
    assert len(first.measured) == 16 + 8 and target.measured == 24 + 6
    assert first.error_ahead is not None and first.error_ahead < 0.5
    again = timing.model(space, prunefront_inputs())
    assert target.measured == 30 and again.measured == first.measured and again.dense_ms == first.dense_ms
    assert len(timing.model(space, prunefront_inputs(), refresh=True).measured) == 24 and target.measured == 60
    more = Timing(target, error=0.0, most=32, cache=tmp_path / "cache").model(space, prunefront_inputs())
    assert len(more.measured) == 32 and target.measured == 60 + 8 + 2
    (kept,) = (tmp_path / "cache").iterdir()
    kept.write_text(json.dumps({"measured": [[[1, 2], 0.5, 1.0, None]], "failed": []}))
    assert len(timing.model(space, prunefront_inputs()).measured) == 24


def test_a_plan_on_which_the_target_fails_is_left_out(space, caplog):
    target = ComputedTarget(fails_below=4)
    model = Timing(target, error=0.0, most=32).model(space, prunefront_inputs())
    assert 8 <= len(model.measured) < 32 and "hang" in caplog.text
    with pytest.raises(TargetError, match="hang"):
        Timing(ComputedTarget(fails_below=99)).model(space, prunefront_inputs())


def test_reasons_of_failures_are_kept_and_failed_plans_are_not_tried_again(space, tmp_path):
    target = ComputedTarget(fails_below=4)
    timing = Timing(target, error=0.0, most=16, cache=tmp_path)
    first = timing.model(space, prunefront_inputs())
    assert first.known.failed and all("hang" in plan.reason for plan in first.known.failed)
    assert all(min(plan.widths) < 4 for plan in first.known.failed)
    measured = target.measured
    again = timing.model(space, prunefront_inputs())
    assert target.measured == measured and again.known == first.known
    described = json.loads(json.dumps(first.to_json()))["failed"]
    assert described == [[list(plan.widths), plan.reason] for plan in first.known.failed]
    console = Console(width=200)
    with console.capture() as shown:
        console.print(latency_view(first, target.description))
    assert "more cannot be measured: kernels of width 1 hang" in shown.get() and "refresh=true" in shown.get()
    timing.model(space, prunefront_inputs(), refresh=True)
    assert target.measured > measured


class DyingTarget(ComputedTarget):
    def times(self, models, inputs, settings):
        if self.measured >= 10:
            raise TargetError("the machine is gone")
        return super().times(models, inputs, settings)


def test_nothing_that_was_measured_is_lost_when_the_target_is(space, tmp_path):
    with pytest.raises(TargetError, match="is gone"):
        Timing(DyingTarget(), cache=tmp_path).model(space, prunefront_inputs())
    target = ComputedTarget()
    assert len(Timing(target, error=0.5, cache=tmp_path).model(space, prunefront_inputs()).measured) == 24
    assert target.measured == 16 + 4  # the other sixteen, and the dense model with every four


def test_too_few_measurements_are_told_with_what_to_do(space):
    with pytest.raises(TargetError, match=r"of 3 measured candidates only 3 .* 4 are needed; .* raise latency.most"):
        Timing(ComputedTarget(), most=3).model(space, prunefront_inputs())


def test_few_candidates_that_can_be_measured_are_told_with_the_reason(space):
    with pytest.raises(TargetError, match=r"of \d+ candidates only \d could be measured.*hang"):
        Timing(ComputedTarget(fails_below=16), most=16).model(space, prunefront_inputs())


def near_share(model: LatencyModel, limit: float) -> float:
    return float(np.mean([abs(plan.ratio / limit - 1) <= 0.1 for plan in model.measured]))


def test_a_budget_draws_measured_plans_and_its_error_is_told(space, tmp_path):
    timing = Timing(ComputedTarget(noise=0.002), error=0.0, most=48, cache=tmp_path)
    model = timing.model(space, prunefront_inputs(), budget={"latency": "50%"})
    everywhere = Timing(ComputedTarget(noise=0.002), error=0.0, most=48).model(space, prunefront_inputs())
    assert len(model.measured) == 48
    assert near_share(model, 0.5) > 0.25 > near_share(everywhere, 0.5)
    assert model.error_near < 0.05 and everywhere.error_near is None
    # Another budget: the plans that are known are far from it, and one round more is measured.
    other = timing.model(space, prunefront_inputs(), budget={"latency": "80%"})
    assert 48 <= len(other.measured) <= 56 and other.measured[:48] == model.measured
    assert near_share(other, 0.8) > near_share(model, 0.8)


class PixelTarget(ComputedTarget):
    """Time is in proportion to the number of pixels."""

    def times(self, models, inputs, settings):
        self.shapes = [tuple(tensor.shape) for tensor in inputs.tensors()]
        samples, conditions = super().times(models, inputs, settings)
        pixels = inputs.tensors()[0].numel() / INPUTS.numel()
        return [[pixels * value for value in row] for row in samples], conditions


class AnySize(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 16, 3), nn.Linear(16, 4)

    def forward(self, image, weight):
        return self.last((self.first(image) * weight[:, None, None, None]).mean((2, 3)))


def test_latency_of_several_shapes_is_their_sum():
    model, inputs, target = AnySize().eval(), {"image": INPUTS, "weight": torch.tensor([2.0])}, PixelTarget()
    once = prunefront.measure(model, inputs, target)
    assert once.conditions["shapes_ms"] == {"1x3x12x12": pytest.approx(once.median_ms)}
    two = prunefront.measure(model, inputs, target, batch_size=2, input_shapes=[[1, 3, 12, 12], [1, 3, 24, 24]])
    assert target.shapes == [(2, 3, 24, 24), (2,)]
    assert two.median_ms == pytest.approx(2 * (1 + 4) * once.median_ms)
    assert two.conditions["shapes_ms"]["2x3x24x24"] == pytest.approx(8 * once.median_ms)


def test_shapes_are_part_of_what_is_kept_and_wrong_ones_are_told_before_anything_is_measured(tmp_path):
    model, inputs, target = AnySize().eval(), {"image": INPUTS, "weight": torch.tensor([2.0])}, PixelTarget()
    space = prunefront.discover(model, inputs)
    for options in ({}, {"batch_size": 2}, {"input_shapes": [[1, 3, 12, 12], [1, 3, 20, 20]]}):
        found = Timing(target, error=1.0, cache=tmp_path, most=8, **options).model(space, Inputs.of(inputs))
    assert len(list(tmp_path.iterdir())) == 3 and found.dense_ms > 0
    before = target.measured
    for options, expected in (
        ({"input_shapes": [[3, 12, 12]]}, "expected 4 positive whole numbers"),
        ({"batch_size": 0}, "expected 4 positive"),
        ({"input_shapes": [[1, 4, 12, 12]]}, "cannot run on inputs of shape 1x4x12x12"),
    ):
        timing = Timing(target, **options)
        with pytest.raises(ConfigError, match=expected):
            timing.model(space, Inputs.of(inputs))
        with pytest.raises(ConfigError, match=expected):
            prunefront.search(model, inputs, score=float, budget={"macs": "50%"}, timing=timing, run_dir=tmp_path)
    assert target.measured == before


def test_values_of_resized_inputs_are_valid():
    ids = torch.arange(6).reshape(1, 6)
    (found,) = inputs_at(Inputs.of({"ids": ids, "mask": torch.ones(1, 6), "scale": torch.ones(6)}), 2, [[1, 8]])
    assert found.kwargs["ids"].tolist() == [[0, 1, 2, 3, 4, 5, 0, 1]] * 2
    assert found.kwargs["mask"].shape == (2, 8) and found.kwargs["scale"].shape == (6,)


def test_a_model_needs_measured_plans(space):
    with pytest.raises(prunefront.PrunefrontError, match="at least 4"):
        LatencyModel(space, Measurements((Measured((1, 1, 1, 1), 0.5, 1.0),)))


def fidelity(dense: nn.Module):
    def score(model: nn.Module) -> float:
        with torch.no_grad():
            return -float((model(DATA) - dense(DATA)).abs().mean())

    return score


def search(tmp_path, target, budget, **options):
    model = make_model()
    settings = {"score": fidelity(model), "n_trials": 8, "sampler": "random", "run_dir": tmp_path, **options}
    return prunefront.search(model, INPUTS, budget=budget, timing=Timing(target, most=48, error=0.02), **settings)


@pytest.mark.parametrize("budget", ["60%", "4ms", "4000 us", "0.004s"])
def test_the_front_is_measured_and_holds_the_budget(tmp_path, budget):
    target = ComputedTarget(noise=0.002)
    result = search(tmp_path, target, {"latency": budget})
    dense_ms = 1e3 * target.seconds(make_model())
    limit = 0.6 * dense_ms if budget == "60%" else 4.0
    assert result.objective == "latency_ms"
    for entry in result.front:
        metrics = entry.metrics
        assert metrics["latency_ratio_high"] * dense_ms <= limit * 1.01
        assert metrics["latency_predicted_ms"] == pytest.approx(metrics["latency_ms"], rel=0.2)
        assert 1e3 * target.seconds(entry.model()) == pytest.approx(metrics["latency_ms"], rel=0.01)
    assert result.best.metrics["latency_ms"] > 0.8 * limit
    trials = [t.user_attrs["costs"]["latency_ms"] for t in result.study.trials]
    assert max(trials) <= limit * 1.01
    described = json.loads((tmp_path / "result.json").read_text())
    assert described["dense"]["latency_ms"] == pytest.approx(dense_ms, rel=0.01)


def test_latency_goes_with_other_budgets_and_with_a_front(tmp_path):
    result = search(tmp_path / "a", ComputedTarget(), {"macs": "70%", "latency": "50%"})
    assert result.objective == "macs" and all(e.metrics["latency_ratio"] <= 0.5 for e in result.front)
    result = search(tmp_path / "b", ComputedTarget(), {"latency": "90%"}, mode="front", n_trials=20)
    latencies = [entry.metrics["latency_ms"] for entry in result.front]
    assert latencies == sorted(latencies) and result.objective == "latency_ms"


def test_a_front_is_measured_for_any_budget(tmp_path):
    result = search(tmp_path, ComputedTarget(), {"macs": "50%"})
    assert all("latency_ms" in e.metrics and "latency_predicted_ms" not in e.metrics for e in result.front)


class LyingTarget(ComputedTarget):
    """Single measurements, as those of the front are, come out far slower."""

    def times(self, models, inputs, settings):
        samples, conditions = super().times(models, inputs, settings)
        if len(models) == 2:
            samples[1] = [2 * value for value in samples[1]]
        return samples, conditions


def test_members_that_miss_the_budget_are_replaced_and_in_the_end_told(tmp_path):
    with pytest.raises(SearchError, match="holds the latency budget when it is measured"):
        search(tmp_path, LyingTarget(), {"latency": "60%"})


def test_impossible_and_unreadable_budgets(tmp_path):
    with pytest.raises(BudgetError, match="smallest candidate in this space takes"):
        search(tmp_path, ComputedTarget(), {"latency": "1%"})
    for bad in ("5", "5furlongs", "fast", "-3ms", "0ms"):
        with pytest.raises(BudgetError):
            search(tmp_path, ComputedTarget(), {"latency": bad})
    with pytest.raises(ConfigError, match="needs timing="):
        prunefront.search(make_model(), INPUTS, score=lambda m: 0.0, budget={"latency": "5ms"}, run_dir=tmp_path)


class SlowTarget(ComputedTarget):
    """Every measurement finds the machine at another pace."""

    def times(self, models, inputs, settings):
        samples, facts = super().times(models, inputs, settings)
        pace = 1 + 0.02 * (self.measured % 7)
        return [[pace * sample for sample in row] for row in samples], facts


def test_milliseconds_of_a_front_are_those_of_one_pace(tmp_path):
    result = search(tmp_path, SlowTarget(), {"latency": "90%"}, mode="front", n_trials=10)
    dense = json.loads((tmp_path / "result.json").read_text())["dense"]["latency_ms"]
    for entry in result.front:
        saved = json.loads((entry.path / "metrics.json").read_text())
        assert entry.metrics["latency_ms"] == pytest.approx(dense * entry.metrics["latency_ratio"])
        assert saved["latency_ms"] == entry.metrics["latency_ms"] <= saved["latency_high_ms"]
