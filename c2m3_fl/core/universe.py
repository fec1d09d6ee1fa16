"""The agreement of all nodes in the universe: its value, its gradient, and its exact course along a step.

With U_i the parameters of node i mapped into the universe and M = sum_i w_i U_i,

    f = sum_{i<j} w_i w_j <U_i, U_j> = (|M|^2 - sum_i w_i^2 |U_i|^2) / 2,

so value, gradient and step cost O(nodes). Every term keeps the *images* of its parameters: for each subset Q
of its grouped axes (a bit mask) the tensor X_Q with just the axes in Q mapped. X_0 is the node's own tensor, the
full image is U, and the image on all axes but one is what the gradient along that axis multiplies. Towards a vertex
(permutations S) all images move as polynomials,

    X_Q(t) = sum_{T in Q} (1 - t)^|Q - T| t^|T| S_T(X_{Q - T}),

whose coefficients are gathers; the only matrix products are the contractions of the gradient. Images change in
place and a few nodes at a time: fresh memory of their size costs more than the arithmetic.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from math import prod

import torch
from torch import Tensor

from c2m3_fl.core.terms import Term

_AT_A_TIME = 1 << 18  # numbers that intermediate results may hold on a CPU: they stay in memory that is at hand
_ROW = 1024  # numbers that inner products add up in the working dtype before they go on in float64

Vertex = Mapping[str, Tensor]  # per group the index forms of all nodes, shape (nodes, size)
Point = Mapping[str, Tensor]  # per group the matrix forms of all nodes, shape (nodes, size, size)


class Images:
    """A term and its images at the current point of the search; `maps[Q]` has the axes in bit mask Q mapped.

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
                self.advance(vertex, 1.0)
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
        """Give every image memory of its own, ready to be changed node by node."""
        for mask in range(1, len(self.maps)):
            if self.maps[mask] is self.maps[0]:
                self.maps[mask] = self.maps[0].clone()

    def agreement(self, weights: Tensor) -> float:
        """The term's part in f."""
        mean = weighted_sum(self.universe, weights)
        own = float(weights.square() @ inners(self.universe, self.universe).to(weights))
        return 0.5 * (inner(mean, mean) - own)

    def agreement_along(self, vertex: Vertex, weights: Tensor) -> list[float]:
        """The term's part in f on the way to a vertex: coefficients of (1 - t)^(2k - s) t^s for s = 0 ... 2k."""
        full, degree = len(self.maps) - 1, len(self.term.groups)
        means = [torch.zeros_like(self.universe[0]) for _ in range(degree + 1)]
        result = [0.0] * (2 * degree + 1)
        for nodes in self._portions():
            parts = [self._coefficient(full, power, vertex, nodes) for power in range(degree + 1)]
            shares = weights[nodes].to(parts[0])
            for mean, part in zip(means, parts, strict=True):
                mean.view(-1).addmv_(part.reshape(len(shares), -1).T, shares)
            for power, value in _products(parts, weights[nodes].square()):
                result[power] -= value
        for power, value in _products([mean[None] for mean in means], weights.new_ones(1)):
            result[power] += value
        return result

    def advance(self, vertex: Vertex, step_size: float) -> None:
        """Move towards a vertex, in place."""
        for mask in sorted(range(1, len(self.maps)), key=int.bit_count, reverse=True):
            old = self.maps[mask]
            new = torch.empty_like(old) if old is self.maps[0] else old
            degree = mask.bit_count()
            for nodes in self._portions():
                if step_size == 1.0:
                    new[nodes] = self._coefficient(mask, degree, vertex, nodes)
                    continue
                parts = [self._coefficient(mask, power, vertex, nodes) for power in range(1, degree + 1)]
                torch.mul(old[nodes], (1 - step_size) ** degree, out=new[nodes])
                for power, part in enumerate(parts, start=1):
                    new[nodes].add_(part, alpha=(1 - step_size) ** (degree - power) * step_size**power)
            self.maps[mask] = new

    def gradient(self, weights: Tensor, into: Mapping[str, Tensor], frozen: int = 0) -> None:
        """Add the term's gradient for the nodes from `frozen` on, each divided by its node's own weight.

        Parameters
        ----------
        weights : Tensor of float64, shape (nodes,)
            Averaging weights.
        into : mapping of str to Tensor, shape (nodes - frozen, size, size)
            What to add to.
        frozen : int
            How many leading nodes stay where they are.
        """
        term, mean = self.term, weighted_sum(self.universe, weights)
        for nodes in self._portions(frozen):
            shares = weights[nodes].to(mean).view(-1, *[1] * mean.ndim)
            others = torch.addcmul(mean, shares, self.universe[nodes], value=-1)
            target = slice(nodes.start - frozen, nodes.stop - frozen)
            for axis, group in enumerate(term.groups):
                rest = self.maps[(len(self.maps) - 1) & ~(1 << axis)][nodes]
                contract(others, rest, term.dim(axis), into[group][target])

    def _coefficient(self, mask: int, power: int, vertex: Vertex, nodes: slice) -> Tensor:
        """What belongs to ``(1 - t)^(|Q| - power) t^power`` in the image with the axes in `mask` mapped."""
        total: Tensor | None = None
        for subset in range(mask + 1):
            if subset & ~mask or subset.bit_count() != power:
                continue
            part = self.maps[mask & ~subset][nodes]
            for axis, group in enumerate(self.term.groups):
                if subset >> axis & 1:
                    part = gather(part, self.term.dim(axis), vertex[group][nodes])
            total = part if total is None else total.add_(part)
        assert total is not None
        return total

    def _portions(self, start: int = 0) -> Iterator[slice]:
        """Slices of nodes that are worked on together."""
        count, size = len(self.term.value), prod(self.term.value.shape[1:])
        at_once = max(1, _AT_A_TIME // size) if self.term.value.device.type == "cpu" else count
        return (slice(first, min(first + at_once, count)) for first in range(start, count, at_once))


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


def share_moved(vertex: Vertex) -> float:
    """Share of all nodes' units that a vertex moves away from their place."""
    moved = [(index != torch.arange(index.shape[1], device=index.device)).sum() for index in vertex.values()]
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


def _products(parts: Sequence[Tensor], weights: Tensor) -> Iterator[tuple[int, float]]:
    """Halves of all inner products of parts, summed over the nodes by weight, each with its power of t."""
    for first, left in enumerate(parts):
        for second in range(first, len(parts)):
            value = float(weights @ inners(left, parts[second]).to(weights))
            yield first + second, value * (0.5 if first == second else 1.0)


def _multiply(values: Tensor, dim: int, matrices: Tensor) -> Tensor:
    moved = values.movedim(dim, 1)
    product = matrices @ moved.reshape(*moved.shape[:2], -1)
    return product.reshape(moved.shape).movedim(1, dim).contiguous()
