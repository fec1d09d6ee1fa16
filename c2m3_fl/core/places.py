"""Where a group of one node stands between permutations, relative to the order in which the node is kept, its frame.

Where a group rotates, orthogonal matrices take the place of index forms, and matrices of spectral norm one or less that
of doubly stochastic ones.

Steps of Frank-Wolfe lead from permutations to mixtures of a few of them, which take no memory, and which gathers apply
faster than products; after many short steps, or from noise, a place is a doubly stochastic matrix.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from c2m3_fl.core.axes import Kind

_FEW = 4  # permutations whose gathers cost less than a product


@dataclass(frozen=True, eq=False)
class Mixture:
    """A convex combination of permutations and of the barycentre, where every unit is the mean of all.

    Attributes
    ----------
    shares : tuple of float
        Of the permutations; one less the barycentre's share together.
    permutations : tuple of Tensor of int64, shape (size,), or None
        Index forms; None is the frame.
    barycentre : float
        Its share.
    """

    shares: tuple[float, ...] = (1.0,)
    permutations: tuple[Tensor | None, ...] = (None,)
    barycentre: float = 0.0


Place = Tensor | Mixture  # a tensor is a doubly stochastic matrix, shape (size, size)
FRAME = Mixture()


def warm(warmth: float, kind: Kind = "permutation") -> Mixture:
    """The share `warmth` of the way from the frame to the barycentre, which of all rotations is zero."""
    return Mixture((1.0 - warmth,), (None,), 0.0 if kind == "orthogonal" else warmth)


def towards(place: Place, index: Tensor, step_size: float, like: Tensor) -> Place:
    """A place moved towards a permutation: ``(1 - t) P + t S``."""
    if isinstance(place, Mixture) and len(place.shares) < _FEW and index.ndim == 1:
        shares = tuple((1.0 - step_size) * share for share in place.shares)
        warmth = (1.0 - step_size) * place.barycentre
        return Mixture((*shares, step_size), (*place.permutations, index), warmth)
    matrix = matrix_of(place, len(index), like) * (1.0 - step_size)
    if index.ndim > 1:
        return matrix.add_(index, alpha=step_size)
    matrix[torch.arange(len(index), device=matrix.device), index] += step_size
    return matrix


def matrix_of(place: Place, size: int, like: Tensor) -> Tensor:
    """A place as a matrix, shape (size, size)."""
    if isinstance(place, Tensor):
        return place
    matrix = like.new_full((size, size), place.barycentre / size)
    rows = torch.arange(size, device=matrix.device)
    for share, index in zip(place.shares, place.permutations, strict=True):
        matrix[rows, rows if index is None else index] += share
    return matrix


def blend(value: Tensor, dim: int, place: Place) -> Tensor:
    """Put the units along a dimension at their place."""
    if isinstance(place, Mixture):
        parts = (value if index is None else permute(value, dim, index) for index in place.permutations)
        first, warmth = next(parts), place.barycentre
        share = place.shares[0]
        mean = torch.add(value.mean(dim, keepdim=True) * warmth, first, alpha=share) if warmth else first * share
        for share, part in zip(place.shares[1:], parts, strict=True):
            mean.add_(part, alpha=share)
        return mean
    if dim == value.ndim - 1 and dim > 0:
        return value @ place.T
    rows = value.movedim(dim, 0)
    return (place @ rows.reshape(len(rows), -1)).reshape(rows.shape).movedim(0, dim)


def permute(value: Tensor, dim: int, index: Tensor) -> Tensor:
    """Permute or rotate one dimension; along the last one a gather is three to fifteen times as fast as a selection."""
    if index.ndim > 1:
        return blend(value, dim, index.to(value.dtype))
    if dim == value.ndim - 1 and dim > 0:
        return value.gather(dim, index.expand(value.shape))
    return value.index_select(dim, index)


def worth(gain: Tensor, index: Tensor | None) -> Tensor:
    """The inner product of a gradient, shape (size, size), with a permutation, in float64; None is the frame."""
    if index is not None and index.ndim > 1:
        return (gain * index).sum(dtype=torch.float64)
    chosen = gain.diagonal() if index is None else gain.gather(1, index[:, None])
    return chosen.sum(dtype=torch.float64)


def mass(gain: Tensor, place: Place) -> Tensor:
    """The inner product of a gradient, shape (size, size), with a place, in float64."""
    if isinstance(place, Tensor):
        return (gain * place).sum(dtype=torch.float64)
    total = gain.sum(dtype=torch.float64) * (place.barycentre / len(gain))
    for share, index in zip(place.shares, place.permutations, strict=True):
        total += share * worth(gain, index)
    return total


def nearest(place: Place, size: int, like: Tensor) -> Tensor:
    """Where most of the mass of each unit is."""
    if isinstance(place, Tensor):
        return place.argmax(1)
    index = place.permutations[max(range(len(place.shares)), key=place.shares.__getitem__)]
    return torch.arange(size, device=like.device) if index is None else index
