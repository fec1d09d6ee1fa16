"""Nodes that drifted from one network, looked at one by one: whether they moved little, and their inner products.

Of the network that all nodes started from everything is computed once; of every node, when it comes, how far each unit
drifted (`identity_proof`), and the products of its drift with those of the nodes before it. The agreement, the
consensus and the outliers of nodes of which none has to move follow from the products alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from c2m3_fl.core.identity_proof import Placed, add_squares, distances, reach, still_around
from c2m3_fl.core.mapped import inner
from c2m3_fl.core.spec import Params, PermutationSpec
from c2m3_fl.core.terms import densify, matched_names, working_dtype

MOST = 100  # nodes whose products with each other are kept
_ROW = 1024  # products that are added up in the working dtype before the sum goes on in float64
_AT_A_TIME = 1 << 18  # elements of all nodes, so that temporaries stay in cache
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
        self.spec = spec
        self.names = tuple(matched_names(spec, [start]))
        self.hopeful = True  # whether no node has moved so far that the proof must fail
        self._dtype = working_dtype([start], self.names)
        self._start = {name: start[name].detach().to(self._dtype).contiguous() for name in self.names}
        self._apart = distances(spec, start)
        self._reach = {name: reach(apart) for name, apart in self._apart.items()}
        self._placed = {name: self._segments(name) for name in self.names}
        squares = [inner(value, value) for value in self._start.values()]
        self._squares = torch.tensor(squares, dtype=torch.float64)  # squared norms of the start's tensors
        self._sum = {name: torch.zeros_like(value) for name, value in self._start.items()}
        self._nodes: list[Params] = []
        self._numbers: dict[tuple[int, ...], int] = {}
        self._weights: list[float] = []
        self._lengths: list[dict[str, Tensor]] = []
        self._rows: list[Tensor] = []  # shape (tensors, nodes): its products with those up to itself, and the start

    def _segments(self, name: str) -> tuple[Placed, ...]:
        axes, dense = densify(self.spec.tensors[name], self._start[name][None])
        return Placed.all(axes, dense.shape[1:], dense.device)

    def add(self, node: Params, weight: float) -> int:
        """Take in one more node, and multiply it with those before it; its number, from 0.

        Parameters
        ----------
        node : mapping of str to Tensor
            A state dict that fits the spec, with finite values; kept, and not mutated.
        weight : float
            Its averaging weight, on any scale, positive.
        """
        lengths = self._from(self._start, node, weight)
        far = (bool((lengths[name] > _HOPELESS * reach).any()) for name, reach in self._reach.items())
        self.hopeful = self.hopeful and not any(far)
        self._numbers[self._identity(node)] = len(self._nodes)
        self._nodes.append({name: node[name] for name in self.names})
        self._weights.append(weight)
        self._lengths.append(lengths)
        nodes = self._nodes if self.complete else self._nodes[-1:]
        found = [self._products(name, [each[name].detach().reshape(-1) for each in nodes]) for name in self.names]
        self._rows.append(torch.stack(found) if found else torch.zeros(0, len(nodes) + 1, dtype=torch.float64))
        return len(self._nodes) - 1

    def number_of(self, node: Params) -> int | None:
        """The number of a node that was added: of the same tensors; None for others."""
        return self._numbers.get(self._identity(node))

    def _identity(self, node: Params) -> tuple[int, ...]:
        return tuple(id(node[name]) for name in self.names)

    def _from(self, centre: Params, node: Params, weight: float = 0.0) -> dict[str, Tensor]:
        """How far every unit of a node is from a network, per group; the drift is added to the sum by its weight."""
        squares = {name: apart.new_zeros(1, len(apart)) for name, apart in self._apart.items()}
        for name, placed in self._placed.items():
            drift = node[name].detach().to(self._dtype) - centre[name]
            if weight:
                self._sum[name].add_(drift, alpha=weight)
            if placed:
                add_squares(placed, densify(self.spec.tensors[name], drift.square_()[None])[1], slice(0, 1), squares)
        return {name: square[0].sqrt_() for name, square in squares.items()}

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
        rest = [name for name in self._apart if not self._within_reach(name, numbers)]
        if not rest:
            return True
        if apart:
            return all(self._still_halfway(rest, lengths) for lengths in known)
        mean = self._mean(numbers, weights)
        moved = self._from(self._start, mean)
        if not self._still_halfway(rest, moved):
            return False
        if len(numbers) == 1:
            return True
        share = torch.tensor(list(weights), dtype=torch.float64)
        share = share / share.sum()
        around = [self._from(mean, self._nodes[number]) for number in numbers]
        lengths = {name: torch.stack([each[name] for each in around]) for name in rest}
        return all(still_around(self._apart[name], moved[name], lengths[name], share) for name in rest)

    def _mean(self, numbers: Sequence[int], weights: Sequence[float]) -> dict[str, Tensor]:
        """The weighted mean of some nodes: from the sum where that is of these nodes and weights."""
        sums = self._sum
        pairs = list(zip(numbers, weights, strict=True))
        if sorted(pairs) != list(enumerate(self._weights)):
            sums = {name: torch.zeros_like(value) for name, value in self._start.items()}
            for number, weight in pairs:
                for name, total in sums.items():
                    total.add_(self._nodes[number][name].to(self._dtype) - self._start[name], alpha=weight)
        scale = 1 / math.fsum(weights)
        return {name: torch.add(value, sums[name], alpha=scale) for name, value in self._start.items()}

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
        mean = self._mean(numbers, weights).values()
        return 0.5 * (sum(inner(value, value) for value in mean) - float(share.square() @ self.norms(numbers).square()))

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
        carriers = [name for name, placed in self._placed.items() if any(group in p.segment.groups for p in placed)]
        return all(
            torch.equal(self._nodes[number][name].to(self._dtype), self._start[name])
            for number in numbers
            for name in carriers
        )

    def _still_halfway(self, groups: Sequence[str], lengths: Mapping[str, Tensor]) -> bool:
        """Whether the bound holds for the start and one other network: their mean is half-way."""
        half = torch.full((2,), 0.5, dtype=torch.float64)
        halves = {name: lengths[name] / 2 for name in groups}
        return all(still_around(self._apart[name], each, each.expand(2, -1), half) for name, each in halves.items())

    @property
    def complete(self) -> bool:
        """Whether the products of all nodes are known: there are few, and none has moved far."""
        return self.hopeful and len(self._nodes) <= MOST

    def _products(self, name: str, values: Sequence[Tensor]) -> Tensor:
        """Products of the last drift with all of them and with the start, whatever other nodes there are."""
        start = self._start[name].view(-1)
        width = max(_ROW, _AT_A_TIME // len(values) // _ROW * _ROW)
        blocks = [start.new_empty(len(values) + 1, 0)]
        total = torch.zeros(len(values) + 1, dtype=torch.float64)
        for low in range(0, len(start), width):
            cut = slice(low, low + width)
            part = torch.stack([value[cut].to(self._dtype) for value in (*values, start)])
            part[:-1] -= start[cut]
            part *= part[-2].clone()
            whole = part.shape[1] // _ROW * _ROW
            blocks.append(part[:, :whole].reshape(len(part), -1, _ROW).sum(2))
            total += part[:, whole:].sum(1, dtype=torch.float64).cpu()
        return total + torch.cat(blocks, 1).sum(1, dtype=torch.float64).cpu()

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
