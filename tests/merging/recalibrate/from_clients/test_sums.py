"""A client's sums about fitted operators."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from c2m3_fl.merging.recalibrate.from_clients.plan import Role
from c2m3_fl.merging.recalibrate.from_clients.sums import Drawing, measure
from c2m3_fl.network.calibration_set import CalibrationSet

NETWORKS = {
    "convolution": nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Conv2d(4, 6, 2, groups=2)),
    "linear": nn.Sequential(nn.Flatten(), nn.Linear(50, 6), nn.ReLU(), nn.Linear(6, 3)),
}


@pytest.mark.parametrize("sketch", [0, 8])
@pytest.mark.parametrize("network", NETWORKS)
def test_the_division_into_batches_changes_no_sum(network, sketch):
    """A last batch of one image holds nothing out, or nothing else."""
    model = NETWORKS[network].double()
    images = torch.randn(21, 2, 5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    own = {name: value + 0.1 for name, value in model.state_dict().items()}

    def answer(*sizes):
        data = CalibrationSet.of(model, list(torch.split(images, sizes)))
        roles = {1: Role.FIT}
        sketches = {1: sketch} if sketch else None
        return measure(data.programs, data.batches, model.state_dict(), own, roles, Drawing(10**6, 5, 0), sketches)

    (whole,), (parted,) = answer(21).values(), answer(20, 1).values()
    # the mixtures of a sketch are drawn batch by batch: what does not depend on the draw is that of all rows
    names = ("count", "x", "r") if sketch else ("count", "x", "r", "xx", "xr", "rr")
    assert type(parted) is type(whole)
    for side in ("train", "held_out"):
        one, other = getattr(whole, side), getattr(parted, side)
        assert other.count > 0
        for name in names:
            torch.testing.assert_close(getattr(other, name), getattr(one, name))
