"""Recurrent cells, and states that start from zeros: one group per layer of units."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from tests.symmetry.checks import check, reasons
from tests.symmetry.families import Lambda, noise


class Cells(nn.Module):
    """A cell of any kind over a sequence, from a state of zeros."""

    def __init__(self, kind: type[nn.Module], width: int = 6) -> None:
        super().__init__()
        self.cell, self.o, self.width = kind(4, width), nn.Linear(width, 2), width

    def forward(self, x: Tensor) -> Tensor:
        hidden = memory = x.new_zeros(x.shape[0], self.width)
        for step in x.unbind(1):
            if isinstance(self.cell, nn.LSTMCell):
                hidden, memory = self.cell(step, (hidden, memory))
            else:
                hidden = self.cell(step, hidden)
        return self.o(hidden)


class Joined(nn.Module):
    """Inputs and the state, zeros at first, side by side: a plain unit, or gates that are split."""

    def __init__(self, gates: int, width: int = 6, *, state_first: bool = False, image: bool = False) -> None:
        super().__init__()
        self.gates, self.width, self.state_first = gates, width, state_first
        self.a = nn.Conv2d(4 + width, gates * width, 3, padding=1) if image else nn.Linear(4 + width, gates * width)
        self.o = nn.Conv2d(width, 2, 1) if image else nn.Linear(width, 2)

    def forward(self, x: Tensor) -> Tensor:
        hidden = memory = torch.zeros(x.shape[0], self.width, *x.shape[3:])
        for step in x.unbind(1):
            both = self.a(torch.cat([hidden, step] if self.state_first else [step, hidden], 1))
            if self.gates == 1:
                hidden = both.tanh()
                continue
            i, f, o, g = both.chunk(4, 1)
            memory = f.sigmoid() * memory + i.sigmoid() * g.tanh()
            hidden = o.sigmoid() * memory.tanh()
        return self.o(hidden)


NETWORKS = {
    "LSTMCell": (lambda: Cells(nn.LSTMCell), noise(3, 4, 4)),
    "GRUCell": (lambda: Cells(nn.GRUCell), noise(3, 4, 4)),
    "RNNCell": (lambda: Cells(nn.RNNCell), noise(3, 4, 4)),
    "cat": (lambda: Joined(1), noise(3, 4, 4)),
    "cat, state first": (lambda: Joined(1, state_first=True), noise(3, 4, 4)),
    "LSTM by hand": (lambda: Joined(4), noise(3, 4, 4)),
    "convolutional LSTM": (lambda: Joined(4, image=True), noise(2, 3, 4, 3, 3)),
    "default state": (
        lambda: Lambda(lambda net, x: net.o(net.a(x[:, 1], net.a(x[:, 0]))), a=nn.GRUCell(4, 6), o=nn.Linear(6, 2)),
        noise(3, 2, 4),
    ),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_the_units_of_a_state_are_one_group(name: str) -> None:
    spec = check(*NETWORKS[name], 6)
    assert {"combined with ordered content"} <= reasons(spec, next(iter(spec.tensors)))  # the inputs' columns


def test_cells_in_layers_have_units_of_their_own() -> None:
    """Each cell's inputs are the units of the one below, which its own state does not share."""

    class Stack(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.low, self.high, self.o = nn.LSTMCell(4, 6), nn.GRUCell(6, 5), nn.Linear(5, 2)

        def forward(self, x: Tensor) -> Tensor:
            low, high = None, None
            for step in x.unbind(1):
                low = self.low(step, low)
                high = self.high(low[0], high)
            return self.o(high)

    check(Stack, noise(3, 3, 4), 6, 5)


def test_zeros_beside_inputs_do_not_tie_what_follows() -> None:
    """Columns that read zeros only may be exchanged with one another, not with those that read inputs."""
    build = lambda: Lambda(lambda net, x: net.a(torch.cat([x, torch.zeros(3, 5)], 1)), a=nn.Linear(9, 2))  # noqa: E731  # short
    check(build, noise(3, 4), 5)
