"""One node's part of a term in the universe: images of it, and what the agreement contracts them with.

A node is kept in the order of permutations, its *frame*: there its image is the very tensor that is kept. Where a group
of the node stands between permutations, its *place* is relative to the frame (`places`).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence

import torch
from torch import Tensor

from c2m3_fl.core.places import Place, blend, permute
from c2m3_fl.core.rotation import displacement
from c2m3_fl.core.terms import Term

_SMALL = 1 << 14  # numbers that are converted to double precision as a whole: fewer calls
_ROW = 1024  # products that are added up in the working dtype before the sum goes on in float64

Vertex = Mapping[str, Tensor]  # per group the index forms of some nodes, shape (nodes, size)
Places = Mapping[str, Place]  # of one node's groups; those at the frame are left out


def image(term: Term, value: Tensor, places: Places, *, without: Collection[int] = ()) -> Tensor:
    """One node's part of a term with its axes at their places; the part itself, not a copy, where all are at the frame.

    Parameters
    ----------
    term : Term
        Which groups the axes have.
    value : Tensor, shape (C_1, R, C_2, ...)
        The node's part in its frame.
    places : mapping of str to Place
        Where the node's groups stand.
    without : collection of int
        Grouped axes that stay as they are.
    """
    for axis, group in enumerate(term.groups):
        if axis not in without and group in places:
            value = blend(value, term.dim(axis) - 1, places[group])
    return value


def moved(term: Term, value: Tensor, index: Mapping[str, Tensor], axes: Collection[int] | None = None) -> Tensor:
    """One node's part of a term with its axes (all of them by default) permuted; the part itself where nothing moves.

    Parameters
    ----------
    term, value
        See `image`.
    index : mapping of str to Tensor of int64, shape (size,)
        Permutations of some groups; the others stay.
    axes : collection of int, optional
        The grouped axes that move.
    """
    for axis, group in enumerate(term.groups):
        if group in index and (axes is None or axis in axes):
            value = permute(value, term.dim(axis) - 1, index[group])
    return value


def agreement(nodes: Iterable[Tensor], shares: Sequence[float], mean: Tensor) -> Tensor:
    """A term's part of the agreement, in float64; `mean` becomes the weighted sum of the nodes.

    Every node is compared with the sum of those before it: a difference of squares would drown the agreement of light
    nodes in the rounding of a heavy one.
    """
    total = torch.zeros((), dtype=torch.float64, device=mean.device)
    mean.zero_()
    for own, share in zip(nodes, shares, strict=True):
        total += share * dot(own, mean)
        mean.add_(own, alpha=share)
    return total


def contract(left: Tensor, right: Tensor, dim: int, into: Tensor) -> None:
    """Add ``out[u, a] = sum left[.., u, ..] right[.., a, ..]``, summed over all dimensions but `dim`."""
    size = left.shape[dim]
    if dim == left.ndim - 1 and dim > 0:
        into.addmm_(left.reshape(-1, size).T, right.reshape(-1, size))
        return
    left, right = (tensor.movedim(dim, 0).reshape(size, -1) for tensor in (left, right))
    into.addmm_(left, right.T)


def share_moved(vertex: Vertex, before: Vertex | None = None) -> float:
    """Share of all nodes' units that a vertex has elsewhere than another one, or than in their own place."""
    changes = [
        displacement(index, torch.eye(index.shape[1], device=index.device) if before is None else before[name]).sum()
        if index.ndim > 2
        else (index != (torch.arange(index.shape[1], device=index.device) if before is None else before[name])).sum()
        for name, index in vertex.items()
    ]
    total = sum(index.shape[:2].numel() for index in vertex.values())
    return min(float(torch.stack(changes).sum()) / total, 1.0) if total else 0.0


def inner(left: Tensor, right: Tensor) -> float:
    """Inner product, accumulated in float64."""
    return float(dot(left, right))


def dot(left: Tensor, right: Tensor) -> Tensor:
    """Inner product as a tensor on the device of the computation, accumulated in float64."""
    if left.numel() <= _SMALL:
        return torch.dot(left.reshape(-1).double(), right.reshape(-1).double())
    return inners(left[None], right[None])[0]


def inners(left: Tensor, right: Tensor) -> Tensor:
    """Every node's inner product, accumulated in float64, shape (nodes,)."""
    left, right = left.reshape(len(left), -1), right.reshape(len(right), -1)
    if left.device.type != "cpu":  # where launching a kernel takes longer than running it
        return (left * right).sum(1, dtype=torch.float64)
    rows = left.shape[1] // _ROW * _ROW
    tail: Tensor = torch.linalg.vecdot(left[:, rows:].double(), right[:, rows:].double())
    if rows == 0:
        return tail
    head = (tensor[:, :rows].view(len(tensor), -1, _ROW) for tensor in (left, right))
    sums: Tensor = torch.linalg.vecdot(*head)
    return sums.sum(1, dtype=torch.float64) + tail


def half_square(parts: Sequence[Tensor]) -> Tensor:
    """Half the squared norm of a polynomial with these coefficients, as the coefficients of a polynomial."""
    result = parts[0].new_zeros(2 * len(parts) - 1, dtype=torch.float64)
    for first, left in enumerate(parts):
        for second, right in enumerate(parts[first:], start=first):
            result[first + second] += dot(left, right) * (1.0 if first < second else 0.5)
    return result
