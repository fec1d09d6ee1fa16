"""Nodes that drifted from one network, looked at one by one: whether they moved little, and their inner products.

Of the network that all nodes started from everything is computed once; of every node, when it comes, how far each unit
drifted (`identity_proof`), and the products of its drift with those of the nodes before it. The agreement, the
consensus and the outliers of nodes of which none has to move follow from the products alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from c2m3_fl.core.identity_proof import distances, reach, still_around
from c2m3_fl.core.mapped import inner
from c2m3_fl.core.parts import ROW, Layout, Parts
from c2m3_fl.core.spec import Params, PermutationSpec

MOST = 100  # nodes whose products with each other are kept
_AT_A_TIME = 1 << 18  # elements of all nodes, so that temporaries stay in cache
_ROOM = 1 << 22  # distances that are kept, beside one for every parameter
_HOPELESS = 10.5  # reaches: one and a half distances to the nearest unit


@dataclass(frozen=True, eq=False)
class Products:
    """Inner products of nodes and of their drifts, in float64, tensor by tensor.

    Attributes
    ----------
    names : tuple of str
        The matched tensors.
    drifts : Tensor, shape (tensors, nodes, nodes)
        Products of the nodes' differences from the network that they started from.
    along : Tensor, shape (tensors, nodes)
        Products of those differences with that network.
    start : Tensor, shape (tensors,)
        Squared norms of that network.
    """

    names: tuple[str, ...]
    drifts: Tensor
    along: Tensor
    start: Tensor

    @property
    def nodes(self) -> Tensor:
        """Products of the nodes themselves, shape (tensors, nodes, nodes)."""
        return self.drifts + self.along[:, :, None] + self.along[:, None, :] + self.start[:, None, None]


class Drifts:
    """The nodes that came so far, next to the network that all of them started from.

    Parameters
    ----------
    spec : PermutationSpec
        The symmetries of the network, without rotations.
    start : mapping of str to Tensor
        The network; not mutated.
    """

    def __init__(self, spec: PermutationSpec, start: Params) -> None:
        self.hopeful = True  # whether no node has moved so far that the proof must fail
        self._layout = Layout(spec, start)
        self._start = self._layout.parts(start)
        large = {name: value.to(self._layout.dtype).contiguous() for name, value in self._start.large.items()}
        self._start = Parts(self._start.small, large)
        self._apart: dict[str, Tensor] = {}  # not of groups that are too wide for their matrix to be kept
        self._reach: dict[str, Tensor] = {}
        room = _ROOM + sum(value.numel() for value in large.values())
        for name, apart in distances(spec, start):
            self._reach[name] = reach(apart)
            if apart.numel() <= room:
                self._apart[name] = apart
                room -= apart.numel()
        squares = [inner(value, value) for value in map(partial(self._layout.tensor, self._start), self.names)]
        self._squares = torch.tensor(squares, dtype=torch.float64)  # squared norms of the start's tensors
        self._sum = self._zeros()
        self._given: list[Params] = []
        self._nodes: list[Parts] = []
        self._numbers: dict[tuple[int, ...], int] = {}
        self._weights: list[float] = []
        self._lengths: list[dict[str, Tensor]] = []
        self._rows: list[Tensor] = []  # shape (tensors, nodes): its products with those up to itself, and the start
        self._scratch = torch.empty(0, dtype=self._layout.dtype, device=self._layout.device)

    @property
    def names(self) -> tuple[str, ...]:
        """The matched tensors."""
        return self._layout.names

    def _zeros(self) -> Parts:
        large = {name: torch.zeros_like(value) for name, value in self._start.large.items()}
        return Parts(torch.zeros_like(self._start.small), large)

    def add(self, node: Params, weight: float) -> int:
        """Take in one more node, and multiply it with those before it; its number, from 0.

        Parameters
        ----------
        node : mapping of str to Tensor
            A state dict that fits the spec, with finite values; kept, and not mutated.
        weight : float
            Its averaging weight, on any scale, positive.
        """
        parts = self._layout.parts(node)
        lengths = self._layout.lengths(parts, self._start, self._sum, weight)
        far = (bool((lengths[name] > _HOPELESS * reach).any()) for name, reach in self._reach.items())
        self.hopeful = self.hopeful and not any(far)
        self._numbers[self._identity(node)] = len(self._nodes)
        self._given.append(node)
        self._nodes.append(parts)
        self._weights.append(weight)
        self._lengths.append(lengths)
        nodes = self._nodes if self.complete else self._nodes[-1:]
        self._rows.append(self._products(nodes))
        return len(self._nodes) - 1

    def number_of(self, node: Params) -> int | None:
        """The number of a node that was added: of the same tensors; None for others."""
        return self._numbers.get(self._identity(node))

    def _identity(self, node: Params) -> tuple[int, ...]:
        return tuple(id(node[name]) for name in self.names)

    def still(self, numbers: Sequence[int], weights: Sequence[float], *, apart: bool = False) -> bool:
        """Whether the identity is stationary for these nodes, and for the start next to their mean.

        Parameters
        ----------
        numbers : sequence of int
            The nodes.
        weights : sequence of float
            Their averaging weights.
        apart : bool
            Whether each node is matched with nothing but the start, by equal weights.
        """
        if not self.hopeful:
            return False
        known = [self._lengths[number] for number in numbers]
        rest = [name for name in self._reach if not self._within_reach(name, numbers)]
        if not rest or not all(name in self._apart for name in rest):
            return not rest
        if apart:
            return all(self._still_halfway(rest, lengths) for lengths in known)
        mean = self._mean(numbers, weights)
        moved = self._layout.lengths(mean, self._start)
        if not self._still_halfway(rest, moved):
            return False
        if len(numbers) == 1:
            return True
        share = torch.tensor(list(weights), dtype=torch.float64)
        share = share / share.sum()
        around = [self._layout.lengths(self._nodes[number], mean) for number in numbers]
        lengths = {name: torch.stack([each[name] for each in around]) for name in rest}
        return all(still_around(self._apart[name], moved[name], lengths[name], share) for name in rest)

    def _mean(self, numbers: Sequence[int], weights: Sequence[float]) -> Parts:
        """The weighted mean of some nodes: from the sum where that is of these nodes and weights."""
        given = sorted(zip(numbers, weights, strict=True)) == list(enumerate(self._weights))
        return self._around(self._sum if given else self._total(numbers, weights), weights)

    def _total(self, numbers: Sequence[int], weights: Sequence[float]) -> Parts:
        """The weighted sum of drifts, added in this order."""
        sums = self._zeros()
        for number, weight in zip(numbers, weights, strict=True):
            self._layout.lengths(self._nodes[number], self._start, sums, weight)
        return sums

    def _around(self, sums: Parts, weights: Sequence[float]) -> Parts:
        """The start plus a sum of drifts by the sum of their weights."""
        scale = 1 / math.fsum(weights)
        large = {name: torch.add(value, sums.large[name], alpha=scale) for name, value in self._start.large.items()}
        return Parts(torch.add(self._start.small, sums.small, alpha=scale), large)

    def agreement(self, numbers: Sequence[int], weights: Sequence[float], *, apart: bool = False) -> float:
        """The agreement ``sum_{i<j} w_i w_j <W_i, W_j>`` of some nodes as they are, for weights of any scale.

        Parameters
        ----------
        numbers, weights, apart
            See `still`: apart, it is the sum over the nodes of what each one has with the start.
        """
        share = torch.tensor(list(weights), dtype=torch.float64)
        share = share / share.sum()
        if apart:
            along = torch.stack([self._rows[number][:, -1].sum() for number in numbers])
            return float((along + self._squares.sum()).sum()) / 4
        if self.complete:
            return 0.5 * float(share @ self.products(numbers).nodes.sum(0).fill_diagonal_(0) @ share)
        mean = self._around(self._total(numbers, weights), weights)  # in this order, whatever that of arrival
        values = [mean.small, *mean.large.values()]
        return 0.5 * (
            sum(inner(value, value) for value in values) - float(share.square() @ self.norms(numbers).square())
        )

    def norms(self, numbers: Sequence[int]) -> Tensor:
        """Norms of some nodes, in float64, shape (nodes,)."""
        sums = torch.stack([self._rows[number][:, -2:].sum(0) for number in numbers])
        return (sums[:, 0] + 2 * sums[:, 1] + self._squares.sum()).clamp(min=0).sqrt()

    def _within_reach(self, group: str, numbers: Sequence[int]) -> bool:
        """Whether a group's units stay within reach, or where they are: units of the start may coincide."""
        lengths = [self._lengths[number][group] for number in numbers]
        if all(bool((length < self._reach[group]).all()) for length in lengths):
            return True
        if any(bool(length.any()) for length in lengths):
            return False
        carriers = self._layout.carriers(group)
        start, nodes = self._start, [self._nodes[number] for number in numbers]
        of = self._layout.tensor
        return all(torch.equal(of(node, n).to(of(start, n)), of(start, n)) for node in nodes for n in carriers)

    def _still_halfway(self, groups: Sequence[str], lengths: Mapping[str, Tensor]) -> bool:
        """Whether the bound holds for the start and one other network: their mean is half-way."""
        half = torch.full((2,), 0.5, dtype=torch.float64)
        halves = {name: lengths[name] / 2 for name in groups}
        return all(still_around(self._apart[name], each, each.expand(2, -1), half) for name, each in halves.items())

    @property
    def complete(self) -> bool:
        """Whether the products of all nodes are known: there are few, and none has moved far."""
        return self.hopeful and len(self._nodes) <= MOST

    def _products(self, nodes: Sequence[Parts]) -> Tensor:
        """Products of the last drift with all of them and with the start, shape (tensors, nodes + 1).

        A product does not depend on which other nodes there are.
        """
        rows = torch.empty(len(self.names), len(nodes) + 1, dtype=torch.float64)
        places = {name: place for place, name in enumerate(self.names)}
        small = torch.stack([*(node.small for node in nodes), self._start.small])
        small[:-1] -= self._start.small
        small *= small[-2].clone()
        rows[[places[name] for name in self._layout.small]] = small.sum(2, dtype=torch.float64).T.cpu()
        for name, start in self._start.large.items():
            flat = [node.large[name].reshape(-1) for node in nodes]
            rows[places[name]] = self._products_of(flat, start.view(-1))
        return rows

    def _products_of(self, values: Sequence[Tensor], start: Tensor) -> Tensor:
        """The same of one tensor, stretch by stretch."""
        count, width = len(values) + 1, max(ROW, _AT_A_TIME // len(values) // ROW * ROW)
        if self._scratch.numel() < (count + 1) * width:
            self._scratch = self._scratch.new_empty((count + 1) * width)
        total = torch.zeros(count, dtype=torch.float64)
        blocks = start.new_empty(count, len(start) // ROW)
        for low in range(0, len(start), width):
            length = min(width, len(start) - low)
            cut, whole = slice(low, low + length), length // ROW
            part = self._scratch[: count * length].view(count, length)
            own = self._scratch[count * length : (count + 1) * length]
            torch.stack([value[cut].to(self._layout.dtype) for value in (*values, start)], out=part)
            part[:-1].sub_(part[-1])
            part.mul_(own.copy_(part[-2]))
            rows = part[:, : whole * ROW].view(count, whole, ROW)
            torch.sum(rows, 2, out=blocks[:, low // ROW : low // ROW + whole])
            total += part[:, whole * ROW :].sum(1, dtype=torch.float64).cpu()
        return total + blocks.sum(1, dtype=torch.float64).cpu()

    def products(self, numbers: Sequence[int]) -> Products:
        """The products of some of the nodes, where they are complete.

        Parameters
        ----------
        numbers : sequence of int
            Which ones, in the order that is wanted.
        """
        rows = self._rows
        drifts = [torch.stack([rows[max(i, j)][:, min(i, j)] for j in numbers], 1) for i in numbers]
        along = torch.stack([rows[i][:, -1] for i in numbers], 1)
        return Products(self.names, torch.stack(drifts, 1), along, self._squares)
