"""On another device networks of different widths are merged as on the CPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from c2m3_fl.merging import Refit, merge

pytestmark = pytest.mark.slow  # the stand-in takes half a minute for a merge

INPUTS = torch.randn(60, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def network(width: int) -> nn.Module:
    torch.manual_seed(width)
    return nn.Sequential(nn.Linear(6, width), nn.ReLU(), nn.Linear(width, 5)).double().eval()


@pytest.mark.parametrize("width", [1, network(4)], ids=["of a node", "between"])
def test_units_of_a_narrower_result_are_chosen_and_refitted_alike(width: Any, device: torch.device) -> None:
    models = [network(8), network(3), network(6)]
    nodes = [model.state_dict() for model in models]
    options: dict[str, Any] = {"models": models, "calibration": [INPUTS], "recalibrate": Refit(scores=True)}
    expected = merge(state_dicts=nodes, width=width, **options).state_dict
    found = merge(state_dicts=nodes, width=width, device=device, **options).state_dict
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=1e-8)
