"""Look-ups, ranks and routing: an index carries units, or points into them; only its numbers reveal an order."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from c2m3_fl import permutation_spec
from tests.symmetry.checks import check, reasons
from tests.symmetry.families import Inputs, Lambda, noise, tokens

Function = Callable[..., Tensor]
LAST = torch.tensor([4, 2, 3])


def layers(function: Function, **widths: tuple[int, int]) -> Callable[[], nn.Module]:
    return lambda: Lambda(function, **{name: nn.Linear(*sizes) for name, sizes in widths.items()})


def bag(mode: str) -> Callable[[], nn.Module]:
    return lambda: Lambda(
        lambda net, *x: net.o(net.a(*x).relu()), a=nn.EmbeddingBag(9, 6, mode=mode), o=nn.Linear(6, 2)
    )


def sparse(net: nn.Module, x: Tensor) -> Tensor:
    """The three largest units, the others zero."""
    h = net.a(x).relu()
    values, places = h.topk(3, -1)
    return net.o(torch.zeros_like(h).scatter(-1, places, values))


def above(net: nn.Module, x: Tensor) -> Tensor:
    h = net.a(x)
    return net.o(torch.where(h >= h.topk(3, -1).values[:, -1:], h, 0.0))


def moved(net: nn.Module, x: Tensor) -> Tensor:
    """An image at the places that a small network predicts for it."""
    grid = functional.affine_grid(net.o(x.mean((2, 3))).view(-1, 2, 3), list(x.shape), align_corners=False)
    return functional.grid_sample(net.a(x), grid, align_corners=False).relu().sum((2, 3)) @ net.h.weight


def sampled(net: nn.Module, x: Tensor) -> Tensor:
    """Values at the places that units predict, a place per unit."""
    grid = net.a(x.mean((2, 3))).view(-1, 6, 1, 2).tanh()
    return net.o(functional.grid_sample(x, grid, align_corners=False).flatten(1))


HIDDEN = {"a": (4, 6), "o": (6, 2)}
NETWORKS: dict[str, tuple[Callable[[], nn.Module], Inputs, tuple[int, ...]]] = {
    "last of each": (
        layers(lambda net, x, last: net.o(net.a(x).relu()[torch.arange(3), last]), **HIDDEN),
        (noise(3, 5, 4), LAST), (6,),
    ),
    "end of each text": (
        lambda: Lambda(
            lambda net, x: net.o(net.a(x)[torch.arange(3), x.argmax(-1)]), a=nn.Embedding(9, 6), o=nn.Linear(6, 2)
        ),
        tokens(3, 5), (6,),
    ),
    "gather": (
        layers(
            lambda net, x, last: net.o(net.a(x).relu().gather(1, last[:, None, None].expand(-1, 1, 6)).squeeze(1)),
            **HIDDEN,
        ),
        (noise(3, 5, 4), LAST), (6,),
    ),
    "maximum of pairs": (
        layers(lambda net, x: net.o(torch.max(net.a(x).relu().view(-1, 6, 2), 2)[0]), a=(4, 12), o=(6, 2)),
        noise(3, 4), (6, 12),
    ),
    "maximum over units": (
        layers(lambda net, x: net.o(torch.max(net.a(x), 1)[0][:, None]), a=(4, 6), o=(1, 2)), noise(3, 4), (6,),
    ),
    "maximum over points": (
        layers(lambda net, x: net.o(torch.max(net.a(x).relu(), 1)[0]), **HIDDEN), noise(3, 5, 4), (6,),
    ),
    "median over points": (
        layers(lambda net, x: net.o(net.a(x).relu().median(1).values), **HIDDEN), noise(3, 5, 4), (6,),
    ),
    "largest units in order": (
        layers(lambda net, x: net.o(net.a(x).relu().topk(3, -1).values), a=(4, 6), o=(3, 2)), noise(3, 4), (6,),
    ),
    "sorted units": (layers(lambda net, x: net.o(net.a(x).sort(-1).values), **HIDDEN), noise(3, 4), (6,)),
    "sparse units": (layers(sparse, **HIDDEN), noise(3, 4), (6,)),
    "units above a rank": (layers(above, **HIDDEN), noise(3, 4), (6,)),
    "bags": (bag("mean"), (tokens(7), torch.tensor([0, 3])), (6,)),
    "bags of one length": (bag("max"), (tokens(3, 4),), (6,)),
    "units as an index": (
        lambda: Lambda(
            lambda net, x: net.o(net.e((net.a(x) > 0).long()).flatten(1)),
            a=nn.Linear(4, 6), e=nn.Embedding(2, 3), o=nn.Linear(18, 2),
        ),
        noise(9, 4), (6, 3),
    ),
    "places of an image": (
        lambda: Lambda(
            moved, a=nn.Conv2d(2, 5, 3, padding=1), o=nn.Sequential(nn.Linear(2, 7), nn.ReLU(), nn.Linear(7, 6)),
            h=nn.Linear(2, 5),
        ),
        noise(2, 2, 4, 4), (5, 7),
    ),
    "a place per unit": (layers(sampled, a=(2, 12), o=(12, 2)), noise(2, 2, 6, 6), (6,)),
    "nearest code": (
        lambda: Lambda(
            lambda net, x: net.o(net.c(torch.cdist(net.a(x), net.c.weight).argmin(-1))),
            a=nn.Linear(4, 6), c=nn.Embedding(8, 6), o=nn.Linear(6, 2),
        ),
        noise(9, 4), (6, 8),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", NETWORKS)
def test_units_are_free_where_only_their_places_are_looked_up(name: str) -> None:
    build, inputs, sizes = NETWORKS[name]
    check(build, inputs, *sizes)


@pytest.mark.parametrize(
    "read",
    [
        lambda h: torch.max(h, 1)[1][:, None].to(h),
        lambda h: (h.argmax(1, keepdim=True) < 3).to(h),
        lambda h: torch.gather(torch.arange(6.0).to(h).expand_as(h), 1, h.topk(1, 1).indices),
    ],
)
def test_units_whose_index_is_read_as_a_number_stay(read: Callable[[Tensor], Tensor]) -> None:
    spec = check(layers(lambda net, x: net.o(read(net.a(x))), a=(4, 6), o=(1, 2)), noise(3, 4))
    assert reasons(spec, "a.weight") & {"its index is read as a number", "combined with ordered content"}


class Experts(nn.Module):
    """Stacked experts, two of five for each input; routing in different words."""

    def __init__(self, routing: str) -> None:
        super().__init__()
        self.routing = routing
        self.a, self.router, self.o = nn.Linear(4, 6), nn.Linear(6, 5), nn.Linear(6, 2)
        self.up, self.shift, self.down = (nn.Parameter(torch.randn(shape)) for shape in ((5, 6, 4), (5, 4), (5, 4, 6)))

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x).tanh()
        weights, chosen = self.router(x).softmax(-1).topk(2, -1)
        if self.routing == "rows":
            y = torch.einsum("nd,nkdh->nkh", x, self.up[chosen]) + self.shift[chosen]
            y = torch.einsum("nkh,nkhd->nkd", y.relu(), self.down[chosen])
            return self.o(x + (weights.unsqueeze(-1) * y).sum(1))
        if self.routing == "scatter":
            gates = torch.zeros(len(x), 5, dtype=x.dtype).scatter(1, chosen, weights)
        elif self.routing == "one_hot":
            gates = (functional.one_hot(chosen, 5) * weights.unsqueeze(-1)).sum(1)
        else:
            gates = ((chosen.unsqueeze(-1) == torch.arange(5)) * weights.unsqueeze(-1)).sum(1)
        y = torch.einsum("nd,edh->neh", x, self.up) + self.shift
        y = torch.einsum("neh,ehd->ned", y.relu(), self.down)
        return self.o(x + (gates.unsqueeze(-1) * y).sum(1))


@pytest.mark.parametrize("routing", ["rows", "scatter", "one_hot", "compare"])
def test_experts_that_a_router_picks_are_units(routing: str) -> None:
    check(lambda: Experts(routing), noise(3, 4), 4, 6, 5)  # hidden units in one order, stream, experts


def test_experts_that_run_in_the_order_of_their_numbers_stay_and_all_else_moves() -> None:
    """Rows are sorted by expert, each run is multiplied by its expert's matrix, and the rows are sorted back."""

    class Sorted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.router, self.o = nn.Linear(4, 8), nn.Linear(8, 3), nn.Linear(8, 2)
            self.up, self.down = nn.Parameter(torch.randn(3, 8, 12)), nn.Parameter(torch.randn(3, 12, 8))

        def forward(self, x: Tensor) -> Tensor:
            x = self.a(x).tanh()
            weight, expert = self.router(x).softmax(-1).max(-1)
            order = torch.argsort(expert)
            ends = (expert.unsqueeze(-1) <= torch.arange(3)).sum(0, dtype=torch.int32)
            y = functional.grouped_mm(x[order], self.up, offs=ends).relu()
            y = functional.grouped_mm(y, self.down, offs=ends)
            return self.o(x + (y * weight[order].unsqueeze(-1))[torch.argsort(order)])

    spec = check(Sorted, noise(16, 4), 12, 8)
    proven = permutation_spec(Sorted(), noise(16, 4))  # in double precision, which the operator itself does not have
    assert proven.groups == spec.groups
    assert reasons(spec, "router.weight") == {"its index is read as a number"}
    assert "experts run in their order" in reasons(spec, "up")
