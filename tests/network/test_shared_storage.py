"""Which entries tensors share in memory, axis by axis: against the addresses of all entries."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from c2m3_fl.network.shared_storage import Overlap, overlaps, sharing

BASE = torch.arange(96.0).view(8, 12)
VIEWS = {
    "same": BASE,
    "transpose": BASE.t(),
    "rows": BASE[2:5],
    "columns": BASE[:, 3:7],
    "every other column, turned": BASE[:, 1::2].t(),
    "block": BASE[2:5, 3:7],
    "row": BASE[3],
    "column": BASE[:, 4],
    "entry": BASE[3:4, 5:6],
    "three dimensions": BASE.view(8, 1, 12).transpose(0, 2),
}


def common(found: Overlap, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """The entries that an overlap names, of either tensor."""
    assert found.axes is not None
    grid = np.meshgrid(*(np.arange(len(own)) for _, own, _, _ in found.axes), indexing="ij")
    left, right = (torch.zeros(x.ndim, grid[0].size, dtype=torch.long) for x in (first, second))
    for number, (dim, own, other, places) in zip(grid, found.axes, strict=True):
        for index, axis, coordinates in ((left, dim, own), (right, other, places)):
            if axis >= 0:
                index[axis] = torch.from_numpy(coordinates[number.ravel()])
    return first[tuple(left)], second[tuple(right)]


@pytest.mark.parametrize("name", VIEWS)
@pytest.mark.parametrize("turned", [False, True])
def test_views_share_the_entries_that_their_axes_name(name: str, turned: bool) -> None:
    pair = (
        {"view": VIEWS[name].view_as(VIEWS[name]), "base": BASE} if turned else {"base": BASE, "view": VIEWS[name][:]}
    )
    (found,) = overlaps(pair)
    first, second = common(found, pair[found.first], pair[found.second])
    assert torch.equal(first, second)
    assert len(first) == VIEWS[name].numel()


def test_windows_that_overlap_in_part_share_that_part() -> None:
    pair = {"low": BASE[:5, :8], "high": BASE[3:, 2:]}
    (found,) = overlaps(pair)
    first, second = common(found, pair["low"], pair["high"])
    assert torch.equal(first, second)
    assert len(first) == 2 * 6


@pytest.mark.parametrize("view", [BASE.view(12, 8), BASE.flatten(), BASE.view(-1)[5:29].view(2, 12)])
def test_entries_that_no_axes_express_are_said_to_be_shared(view: Tensor) -> None:
    (found,) = overlaps({"base": BASE, "view": view})
    assert found.axes is None


def test_tensors_beside_each_other_in_one_memory_share_nothing() -> None:
    assert not overlaps({"left": BASE[:, :5], "right": BASE[:, 5:], "copy": BASE.clone()})
    assert not overlaps({"up": BASE[:3], "down": BASE[3:]})
    assert not overlaps({"even": BASE.view(-1)[::2], "odd": BASE.view(-1)[1::2]})


def test_one_object_under_two_names_is_left_out() -> None:
    assert not overlaps({"one": BASE, "other": BASE})
    assert not overlaps({"empty": torch.empty(0), "none": torch.empty(0, 3)})


def test_parameters_that_share_are_named() -> None:
    network = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 4), nn.Linear(4, 4))
    network[1].weight.data = network[0].weight.data.t()
    assert sharing(network) == {"0.weight", "1.weight"}
