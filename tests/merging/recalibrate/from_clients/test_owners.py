"""Channels by who has them, and taken over one by one."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from c2m3_fl.merging.recalibrate.from_clients.owners import of_inputs, owner_sets, take_over
from c2m3_fl.merging.recalibrate.from_clients.plan import norm_behind
from c2m3_fl.merging.recalibrate.from_clients.sums import FitAnswer
from c2m3_fl.merging.recalibrate.ridge import Sums
from c2m3_fl.network.calibration import load_batches
from c2m3_fl.network.program import Walk, export_program


class Product(nn.Module):
    """A weight that is multiplied from the right."""

    def __init__(self):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(6, 4)), nn.Parameter(torch.randn(4))

    def forward(self, x):
        return torch.addmm(self.bias, x, self.weight)


IMAGES = torch.randn(5, 4, 6, 6, generator=torch.Generator().manual_seed(0))
ROWS = torch.randn(5, 6, generator=torch.Generator().manual_seed(0))
NETWORKS = {
    "convolution and batch norm": (nn.Sequential(nn.Conv2d(4, 8, 3, groups=2), nn.BatchNorm2d(8)), IMAGES),
    "batch norm": (nn.Sequential(nn.BatchNorm2d(4)), IMAGES),
    "transposed": (nn.Sequential(nn.ConvTranspose2d(4, 8, 2, groups=2)), IMAGES),
    "instance norm": (nn.Sequential(nn.InstanceNorm2d(4, affine=True)), IMAGES),
    "linear": (nn.Sequential(nn.Linear(6, 4)), ROWS),
    "product": (nn.Sequential(Product()), ROWS),
    "layer norm": (nn.Sequential(nn.LayerNorm((6, 6))), IMAGES),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_what_is_taken_over_is_these_channels_and_nothing_else(name):
    model, inputs = NETWORKS[name]
    model = model.eval()
    program = export_program(model, inputs)
    operator, (batch,) = program.operators[0], load_batches([inputs])
    params = {key: value.detach() for key, value in model.state_dict().items()}
    corrected = {key: 2 * value + 1 if value.is_floating_point() else value for key, value in params.items()}
    last = norm_behind(program, operator) or operator
    with torch.no_grad():
        before, after = (Walk(program, each, batch).output(last) for each in (params, corrected))
        axes = [axis - before.ndim if axis >= 0 else axis for axis in last.channel_axes(params)]
        shape = [before.shape[axis] for axis in axes]
        channels = torch.rand(torch.Size(shape).numel(), generator=torch.Generator().manual_seed(1)) < 0.5
        take_over(program, operator, params, corrected, channels)
        found = Walk(program, params, batch).output(last)
    mask = channels.reshape(*shape, *(1,) * (-1 - axes[-1]))
    torch.testing.assert_close(found, torch.where(mask, after, before))
    assert 0 < int(channels.sum()) < len(channels)


def test_inputs_that_do_not_count_are_inputs_that_are_zero():
    generator = torch.Generator().manual_seed(0)
    rows, residuals = torch.randn(1, 40, 6, generator=generator), torch.randn(1, 40, 3, generator=generator)
    live = torch.tensor([[1, 1, 0, 1, 0, 0]]).bool()
    found, expected = (
        FitAnswer(*[Sums.of(each, residuals)] * 3) for each in (rows, torch.where(live[:, None], rows, 0.0))
    )
    found = of_inputs(found, live)
    assert found.sum_held_out is None
    for name, value in vars(expected.sum_train).items():
        torch.testing.assert_close(getattr(found.sum_train, name), value)
        torch.testing.assert_close(getattr(found.held_out, name), value)


def test_channels_that_nobody_has_are_in_no_set():
    owned = torch.tensor([[1, 0, 1, 0, 1], [1, 0, 0, 0, 1], [0, 1, 1, 0, 0]]).bool()
    found = {tuple(clients): channels.tolist() for clients, channels in owner_sets(owned)}
    assert found == {(0, 1): [1, 0, 0, 0, 1], (2,): [0, 1, 0, 0, 0], (0, 2): [0, 0, 1, 0, 0]}
    assert not owner_sets(owned[:, 3:4])
