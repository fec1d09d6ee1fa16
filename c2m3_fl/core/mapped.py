"""The parameters of all nodes on their way into the universe: what the agreement is computed from.

Every term keeps its *mapped tensors*: for each subset Q of its grouped axes (a bit mask) the tensor X_Q with just the
axes in Q mapped. X_0 is the node's own tensor, X with all axes mapped is U, the node in the universe, and X with all
axes but one mapped is what the gradient along that axis multiplies. Towards a vertex (permutations S) all of them move
as polynomials,

    X_Q(t) = sum_{T in Q} (1 - t)^|Q - T| t^|T| S_T(X_{Q - T}),

whose coefficients are gathers; the only matrix products are the contractions of the gradient. Mapped tensors change in
place and a few nodes at a time: fresh memory of their size costs more than the arithmetic.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from math import prod

import torch
from torch import Tensor

from c2m3_fl.core.terms import Term

_AT_A_TIME = 1 << 18  # elements per chunk on a CPU, so that temporaries stay in cache
_ROW = 1024  # products that are added up in the working dtype before the sum goes on in float64

Vertex = Mapping[str, Tensor]  # per group the index forms of all nodes, shape (nodes, size)
Point = Mapping[str, Tensor]  # per group the matrix forms of all nodes, shape (nodes, size, size)


class Mapped:
    """A term and its mapped tensors at the current point of a search; `maps[Q]` has the axes in bit mask Q mapped.

    Parameters
    ----------
    term : Term
        The parameters; never changed.
    point : mapping of str to Tensor, shape (nodes, size, size), or None
        Doubly stochastic matrices; None for the identity.
    """

    def __init__(self, term: Term, point: Point | None = None) -> None:
        self.term = term
        self.maps = [term.value] * (1 << len(term.groups))
        vertex = None if point is None else vertex_of({name: point[name] for name in term.groups})
        if vertex is not None:
            if share_moved(vertex) > 0:
                self.own()
                self.advance(slice(0, len(term.value)), vertex, 1.0)
        elif point is not None:
            for mask in range(1, len(self.maps)):
                axis = mask.bit_length() - 1
                rest = self.maps[mask & ~(1 << axis)]
                self.maps[mask] = _multiply(rest, term.dim(axis), point[term.groups[axis]])

    @property
    def universe(self) -> Tensor:
        """All axes mapped: the nodes in the universe."""
        return self.maps[-1]

    def own(self) -> None:
        """Give every mapped tensor memory of its own, so that it can be changed node by node."""
        for mask in range(1, len(self.maps)):
            if self.maps[mask] is self.maps[0]:
                self.maps[mask] = self.maps[0].clone()

    def agreement(self, weights: Tensor) -> tuple[Tensor, Tensor]:
        """The term's part in f, as a tensor, and the weighted sum of the nodes in the universe.

        Every node is compared with the sum of those before it: a difference of squares would drown the agreement of
        light nodes in the rounding of a heavy one.
        """
        mean, total = torch.zeros_like(self.universe[0]), weights.new_zeros(())
        for node, weight, share in zip(self.universe, weights, weights.tolist(), strict=True):
            total += weight * inners(node[None], mean[None])[0]
            mean.add_(node, alpha=share)
        return total, mean

    def course(self, block: slice, vertex: Vertex, weights: Tensor, others: Tensor) -> list[Tensor]:
        """The term's part in f, as far as a block of nodes moves it, on the way to a vertex.

        Parameters
        ----------
        block : slice
            The nodes that move.
        vertex : mapping of str to Tensor, shape (nodes of the block, size)
            Where to.
        weights : Tensor of float64, shape (nodes,)
            Averaging weights of all nodes.
        others : Tensor
            Weighted sum of the nodes that stay.

        Returns
        -------
        list of Tensor of float64
            Polynomials to be added up: each its coefficients of ``(1 - t)^(n - s) t^s`` for s = 0 ... n.
        """
        degree, alone = len(self.term.groups), block.stop - block.start == 1
        means = [torch.zeros_like(others) for _ in range(degree + 1)]
        squares = weights.new_zeros(2 * degree + 1)  # of the block's sum, less those of its nodes: zero for one alone
        for nodes in self._portions(block):
            here = slice(nodes.start - block.start, nodes.stop - block.start)
            moves = self._moves(vertex, here)
            parts = [self._coefficient(len(self.maps) - 1, power, moves, nodes) for power in range(degree + 1)]
            shares = weights[nodes].to(others)
            for mean, part in zip(means, parts, strict=True):
                mean.view(-1).addmv_(part.reshape(len(shares), -1).T, shares)
            if not alone:
                squares -= _half_square(parts, weights[nodes].square())
        towards = torch.cat([inners(others[None], mean[None]) for mean in means])
        return [towards] if alone else [towards, squares + _half_square([mean[None] for mean in means])]

    def advance(self, block: slice, vertex: Vertex, step_size: float) -> None:
        """Move a block of nodes towards a vertex, in place."""
        for mask in sorted(range(1, len(self.maps)), key=int.bit_count, reverse=True):
            mapped, degree = self.maps[mask], mask.bit_count()
            for nodes in self._portions(block):
                here = slice(nodes.start - block.start, nodes.stop - block.start)
                moves = self._moves(vertex, here)
                if step_size == 1.0:
                    mapped[nodes] = self._coefficient(mask, degree, moves, nodes)
                    continue
                parts = [self._coefficient(mask, power, moves, nodes) for power in range(1, degree + 1)]
                mapped[nodes] *= (1 - step_size) ** degree
                for power, part in enumerate(parts, start=1):
                    mapped[nodes].add_(part, alpha=(1 - step_size) ** (degree - power) * step_size**power)

    def gradient(self, block: slice, weights: Tensor, others: Tensor, into: Mapping[str, Tensor]) -> None:
        """Add the term's gradient for a block of nodes, each divided by its node's own weight.

        Parameters
        ----------
        block : slice
            The nodes.
        weights : Tensor of float64, shape (nodes,)
            Averaging weights.
        others : Tensor
            Weighted sum of the nodes outside the block.
        into : mapping of str to Tensor, shape (nodes of the block, size, size)
            What to add to.
        """
        term, alone = self.term, block.stop - block.start == 1
        mean = others if alone else others + weighted_sum(self.universe[block], weights[block])
        for nodes in self._portions(block):
            shares = weights[nodes].to(mean).view(-1, *[1] * mean.ndim)
            rest = others[None] if alone else torch.addcmul(mean, shares, self.universe[nodes], value=-1)
            target = slice(nodes.start - block.start, nodes.stop - block.start)
            for axis, group in enumerate(term.groups):
                mapped = self.maps[(len(self.maps) - 1) & ~(1 << axis)][nodes]
                contract(rest, mapped, term.dim(axis), into[group][target])

    def _moves(self, vertex: Vertex, nodes: slice) -> dict[str, Tensor]:
        """The term's part of a vertex, for some of its nodes; a vertex has one entry per group of the network."""
        return {group: vertex[group][nodes] for group in self.term.groups}

    def _coefficient(self, mask: int, power: int, vertex: Vertex, nodes: slice) -> Tensor:
        """The coefficient of ``(1 - t)^(|Q| - power) t^power`` in the tensor with the axes in `mask` mapped."""
        total: Tensor | None = None
        for subset in range(mask + 1):
            if subset & ~mask or subset.bit_count() != power:
                continue
            part = self.maps[mask & ~subset][nodes]
            for axis, group in enumerate(self.term.groups):
                if subset >> axis & 1:
                    part = gather(part, self.term.dim(axis), vertex[group])
            total = part if total is None else total.add_(part)
        assert total is not None
        return total

    def _portions(self, block: slice) -> Iterator[slice]:
        """Slices of the block's nodes that are worked on together."""
        size, count = prod(self.term.value.shape[1:]), block.stop - block.start
        at_once = max(1, _AT_A_TIME // size) if self.term.value.device.type == "cpu" else max(1, count)
        return (slice(first, min(first + at_once, block.stop)) for first in range(block.start, block.stop, at_once))


def weighted_sum(values: Tensor, weights: Tensor) -> Tensor:
    """Sum over the nodes, shape (...) from (nodes, ...)."""
    flat = weights.to(values) @ values.reshape(len(values), -1)
    return flat.reshape(values.shape[1:])


def contract(left: Tensor, right: Tensor, dim: int, into: Tensor) -> None:
    """Add ``out[i, u, a] = sum left[i, .., u, ..] right[i, .., a, ..]``, summed over all but the nodes and `dim`."""
    count, size = len(left), left.shape[dim]
    if dim == left.ndim - 1 and dim > 1:
        into.baddbmm_(left.reshape(count, -1, size).transpose(1, 2), right.reshape(count, -1, size))
        return
    left, right = (tensor.movedim(dim, 1).reshape(count, size, -1) for tensor in (left, right))
    into.baddbmm_(left, right.transpose(1, 2))


def gather(values: Tensor, dim: int, index: Tensor) -> Tensor:
    """Permute dimension `dim` of every node by that node's row of `index`, shape (nodes, size)."""
    count, size = index.shape
    if dim == values.ndim - 1 and dim > 1:
        view = index.view(count, *[1] * (values.ndim - 2), size)
        return values.gather(dim, view.expand(values.shape))
    before, after = values.shape[1:dim].numel(), values.shape[dim + 1 :].numel()
    rows = torch.arange(count * before, device=index.device).view(count, before, 1) * size + index.view(count, 1, size)
    return values.reshape(count * before * size, after).index_select(0, rows.reshape(-1)).view(values.shape)


def vertex_of(point: Point) -> dict[str, Tensor] | None:
    """Index forms of doubly stochastic matrices that are permutations; None where they are not."""
    if any(not bool(((matrices == 0) | (matrices == 1)).all()) for matrices in point.values()):
        return None
    return {name: matrices.argmax(-1) for name, matrices in point.items()}


def share_moved(vertex: Vertex, before: Vertex | None = None) -> float:
    """Share of all nodes' units that a vertex has elsewhere than another one, or than in their own place."""
    moved = [
        (index != (torch.arange(index.shape[1], device=index.device) if before is None else before[name])).sum()
        for name, index in vertex.items()
    ]
    total = sum(index.numel() for index in vertex.values())
    return int(torch.stack(moved).sum()) / total if total else 0.0


def inner(left: Tensor, right: Tensor) -> float:
    """Inner product, accumulated in float64."""
    return float(inners(left[None], right[None]))


def inners(left: Tensor, right: Tensor) -> Tensor:
    """Every node's inner product, accumulated in float64, shape (nodes,)."""
    left, right = left.reshape(len(left), -1), right.reshape(len(right), -1)
    rows = left.shape[1] // _ROW * _ROW
    tail: Tensor = torch.linalg.vecdot(left[:, rows:].double(), right[:, rows:].double())
    if rows == 0:
        return tail
    head = (tensor[:, :rows].view(len(tensor), -1, _ROW) for tensor in (left, right))
    sums: Tensor = torch.linalg.vecdot(*head)
    return sums.sum(1, dtype=torch.float64) + tail


def _half_square(parts: Sequence[Tensor], weights: Tensor | None = None) -> Tensor:
    """Half the squared norm of a polynomial with these coefficients, summed over the nodes by weight."""
    result = parts[0].new_zeros(2 * len(parts) - 1, dtype=torch.float64)
    for first, left in enumerate(parts):
        for second, right in enumerate(parts[first:], start=first):
            product = inners(left, right)
            total = product.sum() if weights is None else weights @ product
            result[first + second] += total if first < second else 0.5 * total
    return result


def _multiply(values: Tensor, dim: int, matrices: Tensor) -> Tensor:
    moved = values.movedim(dim, 1)
    product = matrices @ moved.reshape(*moved.shape[:2], -1)
    return product.reshape(moved.shape).movedim(1, dim).contiguous()
