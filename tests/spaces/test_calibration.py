"""Recalibrated statistics equal those computed by hand; too little data is refused."""

import pytest
import torch
from torch import nn

from prunefront.spaces.calibration import Calibration, check_calibration, recalibrate
from prunefront.spaces.errors import CalibrationError


def test_statistics_are_the_average_over_the_batches():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5))
    batches = [torch.randn(64, 3, 8, 8) for _ in range(2)]
    recalibrate(model, Calibration([(batch, torch.zeros(64)) for batch in batches]))
    with torch.no_grad():
        outputs = [model[0](batch) for batch in batches]
    mean = torch.stack([output.mean((0, 2, 3)) for output in outputs]).mean(0)
    variance = torch.stack([output.var((0, 2, 3)) for output in outputs]).mean(0)
    torch.testing.assert_close(model[1].running_mean, mean)
    torch.testing.assert_close(model[1].running_var, variance)
    assert model.training and model[1].training and model[1].momentum == 0.1


@pytest.mark.parametrize("calibration", [None, [], [torch.randn(8, 3)], [{"x": 1}]])
def test_missing_or_small_data_is_an_error(calibration):
    with pytest.raises(CalibrationError):
        model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
        check_calibration(model, None if calibration is None else Calibration(calibration))


def test_a_generator_is_refused_since_it_would_be_empty_for_the_second_candidate():
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    with pytest.raises(CalibrationError, match="generator"):
        check_calibration(model, Calibration(torch.randn(64, 3) for _ in range(4)))


def test_models_without_batch_norm_need_none():
    check_calibration(nn.Linear(3, 3), None)


def test_statistics_are_those_of_all_samples():
    """A small last batch counts as little as it is."""
    torch.manual_seed(0)
    model, x = nn.BatchNorm1d(4), torch.randn(130, 4)
    recalibrate(model, Calibration([x[:128], 5 + x[128:]]))
    whole = torch.cat([x[:128], 5 + x[128:]])
    torch.testing.assert_close(model.running_mean, whole.mean(0))
