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

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, replace
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


def maximal(structure: Structure, factors: Iterable[Atoms]) -> tuple[Atoms, ...]:
    """The factors whose support is not contained in another's; a factor without support is a set of one unit."""
    kept: list[Atoms] = []
    for factor in sorted(factors, key=lambda factor: -len(support(factor))):
        if not support(factor):
            structure.gather(factor)
        elif not any(support(factor) <= support(other) for other in kept):
            kept.append(factor)
    return tuple(kept)


def align(x: Labels, ndim: int) -> Labels:
    """Add leading dimensions of size 1, as broadcasting does."""
    extra = ndim - x.ndim
    if extra == 0:
        return x
    factors = tuple(factor.reshape((1,) * extra + factor.shape) for factor in x.factors)
    content = None if x.content is None else x.content.reshape((1,) * extra + x.shape)
    return Labels((1,) * extra + x.shape, factors, frozenset(dim + extra for dim in x.fixed), content=content)


def combine(structure: Structure, *operands: Labels) -> Labels:
    """Elementwise operator with broadcasting: coordinates that are combined carry the same unit."""
    ndim = max(x.ndim for x in operands)
    aligned = [align(x, ndim) for x in operands]
    shape = np.broadcast_shapes(*(x.shape for x in aligned))
    aligned = [_by_place(structure, x, aligned[:index] + aligned[index + 1 :]) for index, x in enumerate(aligned)]
    for index, x in enumerate(aligned):
        for other in aligned[:index]:
            _meet(structure, x, other)
    if len(aligned) > 1:
        _note_alone(structure, aligned)
    # Units that stay are ordered content from here on; a constant may leave units that it treats alike.
    stiff = [x.stiff for x in aligned if x.content is None]
    moving = [factor for x in aligned for factor in x.factors if not any(support(factor) <= dims for dims in stiff)]
    return Labels(tuple(shape), maximal(structure, moving), frozenset().union(*(x.fixed for x in aligned)))


def _note_alone(structure: Structure, operands: Sequence[Labels]) -> None:
    """Note factors along dimensions on which no other operand has units: such an operand makes units of its own."""
    for dim in range(operands[0].ndim):
        held = [[factor for factor in x.factors if factor.shape[dim] > 1] for x in operands]
        if sum(map(bool, held)) == 1:
            for factor in (factor for factors in held for factor in factors):
                structure.alone.setdefault(id(factor), (factor, len(structure.ties)))


def _by_place(structure: Structure, x: Labels, others: Sequence[Labels]) -> Labels:
    """Tell the places of a repeated unit apart where other operands have units along some of its dimensions only.

    A table of offsets, looked up by query and key, repeats its units over both. Rows and columns alone, as sets, do not
    say at which pairs an offset occurs. The units of the result are the places, which lie in the units of the table.
    """
    factors = []
    for factor in x.factors:
        dims = support(factor)
        met = [dims & support(one) for other in others for one in other.factors]
        stiff = [dims & other.stiff for other in others]
        apart = any(common and common != dims for common in met + stiff) and dims not in stiff
        factors.append(structure.places_of(factor) if apart else factor)
    return replace(x, factors=tuple(factors))


def _meet(structure: Structure, x: Labels, y: Labels) -> None:
    """State what follows when two aligned operands are combined coordinate by coordinate."""
    for factor in x.factors:
        for other in y.factors:
            common = support(factor) & support(other)
            if common:
                structure.tie(project(structure, factor, common), project(structure, other, common))
    for one, two in ((x, y), (y, x)):
        for factor in one.factors:
            common = support(factor) & two.stiff
            if common:
                _told_by(structure, project(structure, factor, common), two, common)


def _told_by(structure: Structure, atoms: Atoms, x: Labels, dims: frozenset[int]) -> None:
    """Units that are combined with ordered content: those with equal values of a constant remain a set."""
    flat = atoms.ravel()
    kinds = np.arange(len(flat))
    if x.content is not None:
        rows = np.moveaxis(np.broadcast_to(x.content, x.shape), sorted(dims), range(len(dims))).reshape(len(flat), -1)
        kinds = np.unique(rows, axis=0, return_inverse=True)[1].reshape(-1)
    alone = np.bincount(kinds)[kinds] == 1
    for kind in np.unique(kinds[~alone]):
        structure.gather(flat[kinds == kind])
    if alone.any():
        structure.pin(flat[alone], "combined with ordered content")


def targets(structure: Structure, index: Labels) -> Atoms | None:
    """The units that a tensor of indices points into, shape (n,)."""
    if index.points is None:
        return None
    x, dim = index.points
    first, *others = [project(structure, factor, [dim]) for factor in x.factors if dim in support(factor)]
    for other in others:
        structure.tie(first, other)
    return first.reshape(-1)


def reduce(structure: Structure, x: Labels, dims: Iterable[int], *, keepdim: bool = False) -> Labels:
    """Symmetric function of all entries along `dims` (sum, mean, maximum, norm)."""
    gone = frozenset(x.dim(dim) for dim in dims)
    factors = []
    for factor in x.factors:
        rest = support(factor) - gone
        if rest:
            factors.append(project(structure, factor, rest))
        else:
            structure.gather(factor)
    kept = Labels(
        tuple(1 if dim in gone else size for dim, size in enumerate(x.shape)),
        maximal(structure, factors),
        x.fixed - gone,
    )
    return kept if keepdim else drop(kept, gone)


def normalise(structure: Structure, x: Labels, dims: Iterable[int]) -> Labels:
    """An operator that divides by a symmetric function of the entries along `dims` (softmax, norms)."""
    return combine(structure, x, reduce(structure, x, dims, keepdim=True))


def in_order(structure: Structure, x: Labels, dims: Iterable[int], reason: str = "order matters here") -> Labels:
    """An operator that reads the entries along `dims` in order (convolution over pixels, cumulative sum)."""
    read = frozenset(x.dim(dim) for dim in dims)
    factors = []
    for factor in x.factors:
        common = support(factor) & read
        if common:
            structure.pin(project(structure, factor, common), reason)
        rest = support(factor) - read
        if rest:
            factors.append(project(structure, factor, rest))
    return Labels(x.shape, maximal(structure, factors), x.fixed | {dim for dim in read if x.shape[dim] > 1})


Index = Hashable


def einsum(
    structure: Structure, terms: Sequence[Sequence[Index]], output: Sequence[Index], operands: Sequence[Labels]
) -> Labels:
    """Sum of products: one index per dimension of every operand. Indices missing in `output` are summed over."""
    order = list(dict.fromkeys(index for term in terms for index in term))
    order.sort(key=lambda index: output.index(index) if index in output else len(output))
    spread = []
    for term, x in zip(terms, operands, strict=True):
        present = sorted(range(x.ndim), key=[order.index(index) for index in term].__getitem__)
        moved, there = permute(x, present), {order.index(index) for index in term}
        spread.append(insert(moved, [dim for dim in range(len(order)) if dim not in there]))
    product = combine(structure, *spread)
    return reduce(structure, product, range(len(output), len(order)))


def drop(x: Labels, dims: Iterable[int]) -> Labels:
    """Remove dimensions of size 1."""
    gone = sorted(dims)
    keep = [dim for dim in range(x.ndim) if dim not in gone]
    factors = tuple(factor.reshape([factor.shape[dim] for dim in keep]) for factor in x.factors)
    fixed = frozenset(keep.index(dim) for dim in x.fixed if dim in keep)
    return Labels(tuple(x.shape[dim] for dim in keep), factors, fixed)


def insert(x: Labels, dims: Iterable[int]) -> Labels:
    """Add dimensions of size 1 at the places `dims` of the result."""
    for dim in sorted(dims):
        shape = (*x.shape[:dim], 1, *x.shape[dim:])
        factors = tuple(np.expand_dims(factor, dim) for factor in x.factors)
        x = Labels(shape, factors, frozenset(old + (old >= dim) for old in x.fixed))
    return x


def permute(x: Labels, dims: Sequence[int]) -> Labels:
    """Reorder dimensions."""
    order = [x.dim(dim) for dim in dims]
    factors = tuple(np.transpose(factor, order) for factor in x.factors)
    return Labels(tuple(x.shape[dim] for dim in order), factors, frozenset(order.index(dim) for dim in x.fixed))


def expand(x: Labels, shape: Sequence[int]) -> Labels:
    """Repeat along dimensions of size 1: uniform there."""
    x = align(x, len(shape))
    return replace(x, shape=tuple(shape), source="")


def take(structure: Structure, x: Labels, dim: int, index: Atoms) -> Labels:
    """Entries `index` along one dimension (slice, flip, roll, lookup).

    Whatever happens next happens to these units alone: if they are not all, each once, they become a set.
    """
    dim = x.dim(dim)
    apart = len(index) != x.shape[dim] or len(np.unique(index)) < len(index)
    factors = []
    for factor in x.factors:
        taken = np.take(factor, index, axis=dim) if factor.shape[dim] > 1 else factor
        if apart and taken is not factor:
            structure.gather(taken)
        factors.append(taken)
    shape = (*x.shape[:dim], len(index), *x.shape[dim + 1 :])
    return Labels(shape, maximal(structure, factors), x.fixed - ({dim} if len(index) < 2 else set()))


def select(structure: Structure, x: Labels, dim: int, index: int) -> Labels:
    """One entry along a dimension, which disappears: whatever happens next happens to a single unit."""
    dim = x.dim(dim)
    for factor in x.factors:
        if support(factor) == {dim}:
            structure.pin(np.take(factor, [index], axis=dim), "picked by its place")
    return drop(take(structure, x, dim, np.array([index % x.shape[dim]])), [dim])
