"""Units that slices, views, indices or masks treat unlike are told apart by the rules; the others stay a group."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from c2m3_fl.network.calibration import as_inputs
from c2m3_fl.symmetry.discover import prove
from c2m3_fl.symmetry.proof import Prover
from tests.symmetry.checks import check, reasons
from tests.symmetry.families import Lambda, noise, tokens

PLACES = torch.tensor([0, 3, 5])
MASK = torch.arange(12) < 5


def writes(function: Callable[[Tensor], object]) -> Callable[[Tensor], Tensor]:
    """A function that writes into its argument, on a copy."""

    def written(x: Tensor) -> Tensor:
        x = x * 1
        function(x)
        return x

    return written


def put(key: object, value: Callable[[Tensor], Tensor | float]) -> Callable[[Tensor], Tensor]:
    """Write into the columns that `key` names."""
    return writes(lambda h: h.__setitem__((slice(None), key), value(h)))


def halves(h: Tensor) -> Tensor:
    return torch.cat([h[:, :6].relu(), h[:, 6:].tanh()], 1)


# A function of 12 hidden units, and the sizes of the groups that are left.
UNLIKE: dict[str, tuple[Callable[[Tensor], Tensor], tuple[int, ...]]] = {
    "halves": (halves, (6, 6)),
    "three parts": (lambda h: torch.cat([h[:, :2].relu(), h[:, 2:7].tanh(), h[:, 7:]], 1), (2, 5, 5)),
    "interleaved": (lambda h: torch.stack([h[:, :6].relu(), h[:, 6:].tanh()], -1).flatten(1), (6, 6)),
    "zeros": (put(slice(3), lambda h: 0.0), (3, 9)),
    "zeros in place": (writes(lambda h: h[:, :3].zero_()), (3, 9)),
    "every other": (writes(lambda h: h[:, ::2].relu_()), (6, 6)),
    "run": (writes(lambda h: h.narrow(1, 0, 4).tanh_()), (4, 8)),
    "row of a view": (writes(lambda h: h.view(-1, 3, 4)[:, 1].mul_(2)), (8, 4)),
    "index": (put(PLACES, lambda h: h[:, PLACES].relu()), (3, 9)),
    "index set to zero": (put(PLACES, lambda h: 0.0), (3, 9)),
    "index filled": (lambda h: h.index_fill(1, PLACES, 0.0), (3, 9)),
    "index copied": (lambda h: h.index_copy(1, PLACES, h[:, PLACES].relu()), (3, 9)),
    "index added": (lambda h: h.index_add(1, PLACES, h[:, PLACES].relu()), (3, 9)),
    "repeated": (lambda h: h + h[:, torch.tensor([0, 0, 1, 1])].sum(1, keepdim=True), (2, 10)),
    "mask": (put(MASK, lambda h: 0.0), (5, 7)),
    "mask as a factor": (lambda h: h.tanh() * MASK, (5, 7)),
    "mask that chooses": (lambda h: torch.where(MASK, h.relu(), h.tanh()), (5, 7)),
    "scales in steps": (lambda h: h.tanh() * (torch.arange(12) // 4 + 1), (4, 4, 4)),
}


@pytest.mark.parametrize("name", UNLIKE)
def test_units_treated_unlike_are_told_apart(name: str) -> None:
    function, sizes = UNLIKE[name]
    build = lambda: Lambda(lambda net, x: net.o(function(net.a(x))), a=nn.Linear(4, 12), o=nn.Linear(12, 2))  # noqa: E731  # short
    check(build, noise(3, 4), *sizes)


def both(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda h: torch.cat([function(h[:, :5]), function(h[:, 5:])], 1)


# The same, with parts that are cut, treated alike and joined again.
ALIKE: dict[str, tuple[Callable[[Tensor], Tensor], tuple[int, ...]]] = {
    "parts": (both(torch.relu), (12,)),
    "parts through two functions": (both(lambda part: 2 * part.tanh().neg()), (12,)),
    "parts exchanged": (lambda h: torch.cat([h[:, 6:], h[:, :6]], 1).relu(), (12,)),
    "every other": (lambda h: torch.cat([h[:, ::2].tanh(), h[:, 1::2].tanh()], 1), (12,)),
    "chunks": (lambda h: torch.cat([part.relu() for part in h.chunk(3, 1)], 1), (12,)),
    "one by one": (lambda h: torch.stack([h[:, unit].tanh() for unit in range(12)], 1), (12,)),
    "unbound": (lambda h: torch.stack([unit.sigmoid() for unit in h.unbind(1)], 1), (12,)),
    "units first": (lambda h: torch.stack([h[:, unit].tanh() for unit in range(12)]).t(), (12,)),
    "two of three alike": (lambda h: torch.cat([h[:, :3].relu(), h[:, 3:7].tanh(), h[:, 7:].relu()], 1), (8, 4)),
    "alike beside something else": (lambda h: torch.cat([both(torch.relu)(h), h[:, :1]], 1)[:, :12], (11,)),
    "unlike by a number": (lambda h: torch.cat([h[:, :6].clamp(max=1), h[:, 6:].clamp(max=2)], 1), (6, 6)),
    "a part twice": (lambda h: torch.cat([h[:, :6].relu(), h[:, :6].relu()], 1), (6, 6)),
}


@pytest.mark.parametrize("name", ALIKE)
def test_parts_that_are_treated_alike_are_not_told_apart(name: str) -> None:
    function, sizes = ALIKE[name]
    build = lambda: Lambda(lambda net, x: net.o(function(net.a(x))), a=nn.Linear(4, 12), o=nn.Linear(12, 2))  # noqa: E731  # short
    spec = check(build, noise(3, 4), *sizes)
    assert prove(spec, Prover(build(), as_inputs(noise(3, 4)))).groups == spec.groups


def test_units_that_a_loop_picks_are_pinned_with_that_reason() -> None:
    def loop(net: nn.Module, x: Tensor) -> Tensor:
        h: Tensor = net.a(x)
        return net.o(torch.stack([h[:, unit].tanh() * net.scale[unit] for unit in range(6)]).sum(0)[:, None])

    network = Lambda(loop, a=nn.Linear(4, 6), o=nn.Linear(1, 2))
    network.scale = nn.Parameter(torch.randn(6))
    assert reasons(check(lambda: network, noise(3, 4)), "a.bias") == {"picked by its place"}


def test_they_are_told_apart_behind_a_gate_that_is_closed() -> None:
    """The numbers alone cannot: the branch is multiplied by a parameter of one element that is zero."""

    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.skip, self.a, self.o = nn.Linear(4, 2), nn.Linear(4, 12), nn.Linear(12, 2)
            self.gate = nn.Parameter(torch.zeros(1))

        def forward(self, x: Tensor) -> Tensor:
            return self.skip(x) + self.gate * self.o(halves(self.a(x)))

    check(Gated, noise(3, 4), 6, 6)


def test_channels_that_are_shifted_in_time_are_told_from_those_that_stay() -> None:
    """Two of eight channels see the frame before, two the frame after."""

    def shifted(net: nn.Module, x: Tensor) -> Tensor:
        y = net.a(x).relu()
        out = torch.zeros_like(y)
        out[:, :-1, :2] = y[:, 1:, :2]
        out[:, 1:, 2:4] = y[:, :-1, 2:4]
        out[:, :, 4:] = y[:, :, 4:]
        return net.o(out.mean(1))

    check(lambda: Lambda(shifted, a=nn.Linear(3, 8), o=nn.Linear(8, 2)), noise(2, 5, 3), 2, 2, 4)


def test_rows_of_a_table_that_these_inputs_do_not_reach_stay() -> None:
    """Longer sequences would read them in order."""

    class Positions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.places = nn.Parameter(torch.randn(9, 6))
            self.words, self.o = nn.Embedding(7, 6), nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.o((self.words(x) + self.places[: x.shape[1]]).tanh().mean(1))

    spec = check(Positions, tokens(2, 5, size=7), 6)
    assert "not read with these inputs" in reasons(spec, "places")
