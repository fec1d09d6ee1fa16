"""How operators on layout and values change the units of labelled tensors."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import replace

import numpy as np

from c2m3_fl.symmetry.facts import Atoms, Structure
from c2m3_fl.symmetry.labels import Labels, project, support
from c2m3_fl.symmetry.meeting import by_place, diagonal, meet, note_alone


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
    aligned = [by_place(structure, x, aligned[:index] + aligned[index + 1 :]) for index, x in enumerate(aligned)]
    aligned = [diagonal(structure, x, aligned[:index] + aligned[index + 1 :]) for index, x in enumerate(aligned)]
    for index, x in enumerate(aligned):
        for other in aligned[:index]:
            meet(structure, x, other)
    if len(aligned) > 1:
        note_alone(structure, aligned)
    # Units that stay are ordered content from here on; a constant may leave units that it treats alike.
    stiff = [x.stiff for x in aligned if x.content is None]
    moving = [factor for x in aligned for factor in x.factors if not any(support(factor) <= dims for dims in stiff)]
    return Labels(tuple(shape), maximal(structure, moving), frozenset().union(*(x.fixed for x in aligned)))


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
