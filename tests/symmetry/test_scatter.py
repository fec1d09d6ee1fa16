"""Messages along the edges of a graph: nodes keep their places, channels are free."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from tests.symmetry.checks import check
from tests.symmetry.families import Lambda, noise

Gather = Callable[[Tensor, Tensor, Tensor], Tensor]
EDGES = (torch.tensor([0, 1, 2, 3, 4, 0]), torch.tensor([1, 2, 3, 4, 0, 2]))

GATHERS: dict[str, Gather] = {
    "index_add": lambda zeros, messages, to: zeros.index_add(0, to, messages),
    "index_add in place": lambda zeros, messages, to: zeros.index_add_(0, to, messages),
    "index_put": lambda zeros, messages, to: zeros.index_put((to,), messages, accumulate=True),
    "scatter_add": lambda zeros, messages, to: zeros.scatter_add(0, to[:, None].expand_as(messages), messages),
    "scatter": lambda zeros, messages, to: zeros.scatter(0, to[:, None].expand_as(messages), messages),
    "scatter_reduce": lambda zeros, messages, to: zeros.scatter_reduce(
        0, to[:, None].expand_as(messages), messages, "amax", include_self=False
    ),
}


class Messages(nn.Module):
    """Messages from pairs of nodes, added to nodes; edges are inputs or constants of the network."""

    def __init__(self, gather: Gather, *, constant: bool) -> None:
        super().__init__()
        self.gather = gather
        self.a, self.b, self.c, self.o = nn.Linear(4, 6), nn.Linear(12, 6), nn.Linear(6, 5), nn.Linear(5, 2)
        if constant:
            self.register_buffer("sources", EDGES[0])
            self.register_buffer("targets", EDGES[1])

    def forward(self, x: Tensor, *edges: Tensor) -> Tensor:
        sources, targets = edges or (self.sources, self.targets)
        h = self.a(x).relu()
        messages = self.b(torch.cat([h[sources], h[targets]], 1)).relu()
        return self.o(self.c(h + self.gather(torch.zeros_like(h), messages, targets)).tanh())


@pytest.mark.parametrize("name", GATHERS)
@pytest.mark.parametrize("constant", [False, True])
def test_channels_of_messages_are_those_of_the_nodes(name: str, constant: bool) -> None:
    inputs = noise(5, 4) if constant else (noise(5, 4), *EDGES)
    check(lambda: Messages(GATHERS[name], constant=constant), inputs, 6, 5)


class GraphAttention(nn.Module):
    """Attention over the edges of every node, with a softmax by scatter."""

    def __init__(self, heads: int = 2, size: int = 3) -> None:
        super().__init__()
        self.heads, self.size = heads, size
        self.w, self.o = nn.Linear(4, heads * size), nn.Linear(heads * size, 2)
        self.left, self.right = (nn.Linear(size, 1, bias=False) for _ in range(2))

    def forward(self, x: Tensor, sources: Tensor, targets: Tensor) -> Tensor:
        nodes = len(x)
        z = self.w(x).view(nodes, self.heads, self.size)
        scores = (self.left(z)[sources] + self.right(z)[targets]).squeeze(-1).tanh().exp()
        place = targets[:, None].expand_as(scores)
        total = torch.zeros(nodes, self.heads, dtype=x.dtype).scatter_add(0, place, scores)
        messages = (scores / total[targets]).unsqueeze(-1) * z[sources]
        out = torch.zeros(nodes, self.heads, self.size, dtype=x.dtype).index_add(0, targets, messages)
        return self.o(out.flatten(1))


def test_heads_of_attention_along_edges_are_units() -> None:
    """Both projections of scores are shared by the heads, so all heads share one inner order."""
    check(GraphAttention, (noise(5, 4), *EDGES), 2, 3)


def test_pooling_of_nodes_by_graph_keeps_channels_free() -> None:
    def pooled(net: nn.Module, x: Tensor, graph: Tensor) -> Tensor:
        h = net.a(x).relu()
        return net.o(torch.zeros(2, 6, dtype=x.dtype).index_add(0, graph, h))

    build = lambda: Lambda(pooled, a=nn.Linear(4, 6), o=nn.Linear(6, 2))  # noqa: E731  # short
    check(build, (noise(5, 4), torch.tensor([0, 0, 1, 1, 1])), 6)
