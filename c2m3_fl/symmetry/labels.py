"""Which unit every coordinate of a tensor belongs to, and how operators on layout and values change that.

The units of a tensor are described by *factors*: integer arrays of atoms that broadcast against the tensor. A factor
has full size on the dimensions that its units depend on (its *support*) and size 1 elsewhere:

    weight of a linear layer (O, I)        two factors, (O, 1) and (1, I)
    feature map (N, C, H, W)               one factor,  (1, C, 1, 1)
    values per head (N, heads, T, d)       one factor,  (1, heads, 1, d): a unit lives in its head

A dimension outside every support is *fixed* (its content is ordered: pixels, tokens) or uniform (constant along it).
Layout operators are applied to the arrays of atoms themselves: a flatten repeats a channel's atom once per pixel.
Concatenation, interleaving and packed projections therefore need no special rule.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import prod

import numpy as np
import numpy.typing as npt

from c2m3_fl.symmetry.facts import Atoms, Structure

Shape = tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Labels:
    """The units of one tensor.

    Attributes
    ----------
    shape : tuple of int
        The tensor's shape.
    factors : tuple of ndarray
        Atoms, each broadcastable to `shape`; no support contains another.
    fixed : frozenset of int
        Dimensions with ordered content; on the support of a factor, content besides its units.
    source : str
        Name of the parameter, when the tensor is one as it stands.
    points : (Labels, int), optional
        Of a tensor of indices: the tensor and its dimension that the indices point into, if there are units.
    content : ndarray, optional
        The values of a constant.
    """

    shape: Shape
    factors: tuple[Atoms, ...] = ()
    fixed: frozenset[int] = frozenset()
    source: str = ""
    points: tuple[Labels, int] | None = None
    content: npt.NDArray[np.generic] | None = None

    @classmethod
    def ordered(cls, shape: Sequence[int]) -> Labels:
        """Ordered content, such as an input: every dimension is fixed."""
        return cls(tuple(shape), (), frozenset(dim for dim, size in enumerate(shape) if size > 1))

    @property
    def ndim(self) -> int:
        """Number of dimensions."""
        return len(self.shape)

    @property
    def stiff(self) -> frozenset[int]:
        """Fixed dimensions that no factor covers."""
        return self.fixed.difference(*(support(factor) for factor in self.factors))

    def dim(self, index: int) -> int:
        """A dimension counted from the front."""
        return index % max(1, self.ndim)


def support(factor: Atoms) -> frozenset[int]:
    """Dimensions that the units of a factor depend on."""
    return frozenset(dim for dim, size in enumerate(factor.shape) if size > 1)


def project(structure: Structure, factor: Atoms, dims: Iterable[int]) -> Atoms:
    """Blocks of a factor over `dims`, a part of its support: units that share these coordinates share a block."""
    kept = sorted(dims)
    if frozenset(kept) == support(factor):
        return factor
    rows = np.moveaxis(factor, kept, range(len(kept))).reshape(prod(factor.shape[dim] for dim in kept), -1)
    shape = [size if dim in kept else 1 for dim, size in enumerate(factor.shape)]
    return structure.blocks(rows).reshape(shape)
