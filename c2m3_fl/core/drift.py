"""Nodes that drifted from one network, looked at one by one: whether they moved little, and their inner products.

Of the network that all nodes started from everything is computed once; of every node, when it comes, how far each unit
drifted (`identity_proof`), and the products of its drift with those of the nodes before it. The agreement, the
consensus and the outliers of nodes of which none has to move follow from the products alone. Nodes that come faster
than they are multiplied are multiplied together (`Drifts.multiply`), each pair as if it came alone.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from c2m3_fl.core.identity_proof import distances, reach, still_around
from c2m3_fl.core.mapped import inner
from c2m3_fl.core.multiplier import Multiplier
from c2m3_fl.core.parts import Layout, Parts
from c2m3_fl.core.spec import Params, PermutationSpec

MOST = 100  # nodes whose products with each other are kept
WAITING = 16  # nodes that are multiplied together: all nodes are read once for them
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
        found = self.drifts + self.along[:, :, None]
        return found.add_(self.along[:, None, :]).add_(self.start[:, None, None])


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
        self._numbers: dict[int | bytes, int] = {}
        self._weights: list[float] = []
        self._beyond: list[frozenset[str]] = []  # the groups of which some unit is not within reach
        self._nodes: list[Parts] = []  # these and their lengths are only kept while the products are complete
        self._lengths: list[Tensor] = []  # shape (units,)
        self._rows: list[Tensor] = []  # shape (tensors, nodes): its products with those up to itself, and the start
        self._multiplier = Multiplier(self._layout, self._start)

    @property
    def names(self) -> tuple[str, ...]:
        """The matched tensors."""
        return self._layout.names

    def _zeros(self) -> Parts:
        large = {name: torch.zeros_like(value) for name, value in self._start.large.items()}
        return Parts(torch.zeros_like(self._start.small), large)

    def add(self, node: Params, weight: float) -> int:
        """Take in one more node; its number, from 0.

        Parameters
        ----------
        node : mapping of str to Tensor
            A state dict that fits the spec, with finite values; kept, and not mutated.
        weight : float
            Its averaging weight, on any scale, positive.
        """
        held = {name: node[name] for name in self.names}
        parts = self._layout.parts(held)
        lengths = self._layout.lengths(parts, self._start, self._sum, weight)
        of, reaches = self._layout.of_group, self._reach.items()
        beyond = frozenset(name for name, reach in reaches if not bool((of(lengths, name) < reach).all()))
        far = (name for name in beyond if bool((of(lengths, name) > _HOPELESS * self._reach[name]).any()))
        self.hopeful = self.hopeful and not any(far)
        self._numbers[id(node)] = self._numbers[_memory(held)] = len(self._given)
        self._given.append(node)
        self._weights.append(weight)
        self._beyond.append(beyond)
        if self.complete:
            self._nodes.append(parts)
            self._lengths.append(lengths)
        else:  # of every node no more is kept than its products with itself and with the start
            self._rows = [row if row.shape[1] == 2 else row[:, -2:].clone() for row in self._rows]
            self._nodes, self._lengths = [], []
        if not self.complete or len(self._nodes) - len(self._rows) >= WAITING:
            self.multiply()
        return len(self._given) - 1

    def multiply(self) -> None:
        """Multiply the nodes that wait for it with each other and with those before them.

        Whatever needs the products does it first; when nothing else is to be done, it may be done earlier.
        """
        first, count = len(self._rows), len(self._given)
        for low in range(first, count, WAITING) if self._nodes else ():
            self._rows += self._multiplier.rows(self._nodes[: low + WAITING], low)
        for number in () if self._nodes else range(first, count):
            self._rows += self._multiplier.rows([self._node(number)], 0)

    def _node(self, number: int) -> Parts:
        return self._nodes[number] if self._nodes else self._layout.parts(self._given[number])

    def _drifted(self, number: int) -> Tensor:
        """How far the units of a node drifted, shape (units,)."""
        return self._lengths[number] if self._nodes else self._layout.lengths(self._node(number), self._start)

    def number_of(self, node: Params) -> int | None:
        """The number of a node that was added: the same, or of tensors in the same memory; None for others."""
        number = self._numbers.get(id(node))
        return self._numbers.get(_memory({name: node[name] for name in self.names})) if number is None else number

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
        rest = [name for name in self._reach if not self._within_reach(name, numbers)]
        if not rest or not all(name in self._apart for name in rest):
            return not rest
        if apart:
            return all(self._still_halfway(rest, self._drifted(number)) for number in numbers)
        mean = self._mean(numbers, weights)
        moved = self._layout.lengths(mean, self._start)
        if not self._still_halfway(rest, moved):
            return False
        if len(numbers) == 1:
            return True
        share = torch.tensor(list(weights), dtype=torch.float64)
        share = share / share.sum()
        lengths = torch.stack([self._layout.lengths(self._node(number), mean) for number in numbers])
        of = self._layout.of_group
        return all(still_around(self._apart[name], of(moved, name), of(lengths, name), share) for name in rest)

    def _mean(self, numbers: Sequence[int], weights: Sequence[float]) -> Parts:
        """The weighted mean of some nodes: from the sum where that is of these nodes and weights."""
        given = sorted(zip(numbers, weights, strict=True)) == list(enumerate(self._weights))
        return self._around(self._sum if given else self._total(numbers, weights), weights)

    def _total(self, numbers: Sequence[int], weights: Sequence[float]) -> Parts:
        """The weighted sum of drifts, added in this order."""
        sums = self._zeros()
        for number, weight in zip(numbers, weights, strict=True):
            self._layout.lengths(self._node(number), self._start, sums, weight)
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
        self.multiply()
        if apart:
            along = torch.stack([self._rows[number][:, -1].sum() for number in numbers])
            return float((along + self._squares.sum()).sum()) / 4
        if self.complete:
            return 0.5 * float(share @ self.products(numbers).nodes.sum(0).fill_diagonal_(0) @ share)
        mean = self._around(self._total(numbers, weights), weights)  # in this order, whatever that of arrival
        values = [self._layout.rows(mean), *mean.large.values()]
        return 0.5 * (
            sum(inner(value, value) for value in values) - float(share.square() @ self.norms(numbers).square())
        )

    def norms(self, numbers: Sequence[int]) -> Tensor:
        """Norms of some nodes, in float64, shape (nodes,)."""
        self.multiply()
        sums = torch.stack([self._rows[number][:, -2:].sum(0) for number in numbers])
        return (sums[:, 0] + 2 * sums[:, 1] + self._squares.sum()).clamp(min=0).sqrt()

    def _within_reach(self, group: str, numbers: Sequence[int]) -> bool:
        """Whether a group's units stay within reach, or where they are: units of the start may coincide."""
        if not any(group in self._beyond[number] for number in numbers):
            return True
        if any(bool(self._layout.of_group(self._drifted(number), group).any()) for number in numbers):
            return False
        carriers = self._layout.carriers(group)
        start, nodes = self._start, map(self._node, numbers)
        of = self._layout.tensor
        return all(torch.equal(of(node, n).to(of(start, n)), of(start, n)) for node in nodes for n in carriers)

    def _still_halfway(self, groups: Sequence[str], lengths: Tensor) -> bool:
        """Whether the bound holds for the start and one other network: their mean is half-way."""
        half = torch.full((2,), 0.5, dtype=torch.float64)
        halves = {name: self._layout.of_group(lengths, name) / 2 for name in groups}
        return all(still_around(self._apart[name], each, each.expand(2, -1), half) for name, each in halves.items())

    @property
    def complete(self) -> bool:
        """Whether the products of all nodes are known: there are few, and none has moved far."""
        return self.hopeful and len(self._given) <= MOST

    def products(self, numbers: Sequence[int]) -> Products:
        """The products of some of the nodes, where they are complete.

        Parameters
        ----------
        numbers : sequence of int
            Which ones, in the order that is wanted.
        """
        self.multiply()
        drifts = torch.empty(len(self.names), len(numbers), len(numbers), dtype=torch.float64)
        order = torch.tensor(numbers)
        for place, number in enumerate(numbers):
            earlier = order <= number
            own = self._rows[number][:, order[earlier]]
            drifts[:, place, earlier] = own
            drifts[:, earlier, place] = own
        along = torch.stack([self._rows[number][:, -1] for number in numbers], 1)
        return Products(self.names, drifts, along, self._squares)


def _memory(tensors: Mapping[str, Tensor]) -> bytes:
    """Where tensors are, which tells them from others that are alive."""
    return struct.pack(f"{len(tensors)}Q", *(value.data_ptr() for value in tensors.values()))
