"""Parameters that are tied through their memory keep their tie under permutations and in a merge."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from c2m3_fl import merge
from tests.symmetry.checks import check, reasons
from tests.symmetry.families import noise


def transposed(net: nn.Sequential) -> None:
    net[4].weight.data = net[2].weight.data.t()


def same_memory(net: nn.Sequential) -> None:
    net[0].bias.data = net[4].bias.data


def bias_slice(net: nn.Sequential) -> None:
    net[4].bias.data = net[2].bias.data[2:7]


def bias_is_a_column(net: nn.Sequential) -> None:
    net[2].bias.data = net[2].weight.data[:, 2]


def neighbours(net: nn.Sequential) -> None:
    """Not tied at all: two windows of one memory."""
    memory = torch.randn(8, 12)
    net[2].weight.data, net[4].weight.data = memory[:, :5], memory[:, 5:10].t()


def reshaped(net: nn.Sequential) -> None:
    net[4].weight.data = net[2].weight.data.view(5, 8)


def tied(tie: Callable[[nn.Sequential], None], narrow: int = 5, wide: int = 8) -> nn.Sequential:
    """Layers of widths 4, `narrow`, `wide`, `narrow`, 2."""
    net = nn.Sequential(
        nn.Linear(4, narrow), nn.ReLU(), nn.Linear(narrow, wide), nn.ReLU(), nn.Linear(wide, narrow), nn.Tanh(),
        nn.Linear(narrow, 2),
    )  # fmt: skip
    tie(net)
    return net


# How the layers are tied, and the sizes of the groups of layers 0, 2 and 4.
TIES = {
    transposed: (5, 8),  # rows of one are columns of the other: the outer layers share their units
    same_memory: (5, 8),
    bias_slice: (5, 3, 5),  # three units of layer 2 are free; five are those of layer 4
    bias_is_a_column: (4, 8, 5),  # column 2 of layer 2 is told from the others
    neighbours: (5, 8, 5),
}


@pytest.mark.parametrize("tie", TIES, ids=lambda tie: tie.__name__)
def test_units_of_parameters_that_share_memory_are_tied(tie: Callable[[nn.Sequential], None]) -> None:
    check(lambda: tied(tie), noise(3, 4), *TIES[tie])


def test_entries_that_no_axes_express_pin_both_parameters_by_name() -> None:
    spec = check(lambda: tied(reshaped), noise(3, 4))
    assert "shares memory with '4.weight'" in reasons(spec, "2.weight")
    assert "shares memory with '2.weight'" in reasons(spec, "4.weight")


def test_a_parameter_that_an_attribute_shares_is_pinned() -> None:
    """The attribute is a constant of the graph; in truth it changes with the parameter."""

    class Held(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.o = nn.Linear(4, 6), nn.Linear(6, 5), nn.Linear(6, 2)
            self.back = self.b.weight.data.t()

        def forward(self, x: Tensor) -> Tensor:
            return self.o(nn.functional.linear(self.b(self.a(x)).relu(), self.back.to(x)).tanh())

    spec = check(Held, noise(3, 4))
    assert "shares memory with 'back'" in reasons(spec, "b.weight")


@pytest.mark.parametrize("recalibrate", ["none", "repair", "refit"])
def test_a_merge_keeps_the_tie(recalibrate: str) -> None:
    inputs = noise(40, 4)
    nodes = []
    for seed in range(3):
        torch.manual_seed(seed)
        nodes.append(tied(transposed).state_dict())
    network = tied(transposed)
    merged = merge(network, nodes, calibration=[inputs], recalibrate=recalibrate).state_dict
    assert torch.equal(merged["4.weight"], merged["2.weight"].t())
    loose = tied(lambda net: None)
    loose.load_state_dict(merged)
    network.load_state_dict(merged)
    torch.testing.assert_close(network(inputs), loose(inputs))
