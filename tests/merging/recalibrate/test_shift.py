"""The shift of calibration data, where BatchNorm's buffers show it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from c2m3_fl.merging.recalibrate.setting import prepare
from c2m3_fl.merging.recalibrate.shift import shift

INPUTS = 3 + 2 * torch.randn(400, 6, generator=torch.Generator().manual_seed(0))


def after(batches: int, momentum: float | None) -> nn.Module:
    """A network whose buffers saw the inputs so many times, and whose weights did not move."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8, momentum=momentum), nn.ReLU(), nn.Linear(8, 3))
    model.train()
    with torch.no_grad():
        for _ in range(batches):
            model(INPUTS)
    return model.eval()


def measured(model: nn.Module, inputs: Tensor) -> float:
    params = model.state_dict()
    found = shift(prepare(model, params, [params], [inputs]))
    assert found is not None
    return found


@pytest.mark.parametrize("momentum", [0.01, 0.1, 0.5, None])
@pytest.mark.parametrize("batches", [1, 8, 200])
def test_the_initial_values_that_are_left_in_running_statistics_are_no_shift(
    batches: int, momentum: float | None
) -> None:
    model = after(batches, momentum)
    assert measured(model, INPUTS) < 0.01  # the buffers' variance is the unbiased one
    assert measured(model, 16 * INPUTS) > 2.5  # the logarithm of 16 is 2.77
    assert measured(model, INPUTS + 10) > 1


def test_statistics_that_did_not_begin_at_zero_and_one_are_used_as_they_are() -> None:
    model = after(200, 0.1)
    expected, params = measured(model, INPUTS), model.state_dict()
    params["1.num_batches_tracked"].zero_()  # the counter was lost, as in files of older versions
    assert measured(model, INPUTS) == pytest.approx(expected, abs=1e-6)
    params["1.num_batches_tracked"].fill_(1)
    params["1.running_var"][0] = 0.5  # after one batch from 1 it is at least 0.9
    assert measured(model, INPUTS) < 0.5
