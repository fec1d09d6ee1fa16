"""Reshaping and joining of labelled tensors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from math import prod

import numpy as np

from c2m3_fl.symmetry.facts import Atoms, Structure
from c2m3_fl.symmetry.labels import Labels, Shape, project, support
from c2m3_fl.symmetry.unit_labels import combine, expand, insert, maximal


def reshape(structure: Structure, x: Labels, shape: Sequence[int]) -> Labels:
    """Same entries in row-major order under another shape."""
    target = tuple(shape)
    if target == x.shape:
        return x
    if 0 in x.shape:
        return Labels.ordered(target)
    steps = sorted({*_borders(x.shape), *_borders(target)})
    if all(big % small == 0 for small, big in pairwise(steps)):
        # Split before merging: dimensions that the merge does not touch keep factors of their own.
        x = _regroup(structure, x, tuple(big // small for small, big in pairwise(steps)))
    return _regroup(structure, x, target)


def _borders(shape: Shape) -> list[int]:
    return [prod(shape[:dim]) for dim in range(len(shape) + 1)]


def _matching(old: Shape, new: Shape) -> Iterator[tuple[list[int], list[int]]]:
    """Smallest runs of old and of new dimensions that hold the same entries."""
    first, second = 0, 0
    while first < len(old) or second < len(new):
        before, after = [first] if first < len(old) else [], [second] if second < len(new) else []
        have, want = prod(old[dim] for dim in before), prod(new[dim] for dim in after)
        first, second = first + len(before), second + len(after)
        while have != want:
            if (have < want and first < len(old)) or second == len(new):
                before.append(first)
                have, first = have * old[first], first + 1
            else:
                after.append(second)
                want, second = want * new[second], second + 1
        yield before, after


def _regroup(structure: Structure, x: Labels, shape: Shape) -> Labels:
    runs = list(_matching(x.shape, shape))
    factors = list(x.factors)
    for before, _ in runs:
        if sum(x.shape[dim] > 1 for dim in before) > 1:
            factors = _fuse(structure, x, factors, frozenset(before))
    fixed = {dim for before, after in runs if x.fixed & set(before) for dim in after if shape[dim] > 1}
    moved = [_move(factor, x.shape, shape, runs) for factor in factors]
    for old, new in zip(factors, moved, strict=True):
        # A unit that repeats along a new dimension has several parts there; no fact says that they are copies.
        fixed |= {dim for dim in _spread(old, shape, runs) if new.shape[dim] == 1}
    return Labels(shape, maximal(structure, moved), frozenset(fixed))


def _spread(factor: Atoms, shape: Shape, runs: Sequence[tuple[list[int], list[int]]]) -> Iterator[int]:
    """New dimensions that hold entries on which the units of a factor depended."""
    for before, after in runs:
        if any(factor.shape[dim] > 1 for dim in before):
            yield from (dim for dim in after if shape[dim] > 1)


def _fuse(structure: Structure, x: Labels, factors: list[Atoms], run: frozenset[int]) -> list[Atoms]:
    """Replace several factors on dimensions that are about to be merged by one, whose units are pairs of theirs.

    Copies along a uniform dimension (keys that several queries share) become units as well: units that are combined
    with copies of the same original may be exchanged with one another.
    """
    touched = [factor for factor in factors if support(factor) & run]
    covered = frozenset().union(*(support(factor) for factor in touched))
    copies = frozenset(dim for dim in run - covered - x.fixed if x.shape[dim] > 1)
    if len(touched) < 2 and not (touched and copies):
        return factors
    rest = [factor for factor in factors if not support(factor) & run]
    return [*rest, product(structure, x, touched, covered | copies)]


def product(structure: Structure, x: Labels, factors: Sequence[Atoms], dims: frozenset[int]) -> Atoms:
    """Units over `dims`, one per coordinate, each related to the units of all `factors` there."""
    pairs = structure.fresh(*(size if dim in dims else 1 for dim, size in enumerate(x.shape)))
    for factor in factors:
        common = support(factor) & dims
        structure.tie(project(structure, pairs, common), project(structure, factor, common))
    if x.stiff & dims:
        structure.pin(project(structure, pairs, x.stiff & dims), "combined with ordered content")
    return pairs


def _move(factor: Atoms, old: Shape, new: Shape, runs: Sequence[tuple[list[int], list[int]]]) -> Atoms:
    source, target = [1] * len(old), [1] * len(new)
    for before, after in runs:
        if any(factor.shape[dim] > 1 for dim in before):
            for dim in before:
                source[dim] = old[dim]
            for dim in after:
                target[dim] = new[dim]
    moved = np.broadcast_to(factor, source).reshape(target)
    for dim in range(len(new)):
        first = moved.take([0], axis=dim)
        if moved.shape[dim] > 1 and np.array_equal(np.broadcast_to(first, moved.shape), moved):
            moved = first
    return moved


def copies(structure: Structure, x: Labels, dim: int, count: int) -> Labels:
    """Every entry along a dimension `count` times in a row."""
    shape = (*x.shape[: dim + 1], count, *x.shape[dim + 1 :])
    merged = (*x.shape[:dim], x.shape[dim] * count, *x.shape[dim + 1 :])
    return reshape(structure, expand(insert(x, [dim + 1]), shape), merged)


def concatenate(structure: Structure, pieces: Sequence[Labels], dim: int) -> Labels:
    """Join along a dimension. Pieces with units there keep them; others get new units, pinned if they are ordered."""
    dim = pieces[0].dim(dim)
    pieces = [x for x in pieces if x.shape[dim] > 0]
    if len(pieces) == 1:
        return pieces[0]
    covers = [factor for x in pieces for factor in x.factors if dim in support(factor)]
    joint = frozenset().union(*(support(factor) for factor in covers)) if covers else _new_units(pieces, dim)
    rest = []
    for x in pieces:
        shape = (*x.shape[:dim], 1, *x.shape[dim + 1 :])
        apart = tuple(factor for factor in x.factors if not support(factor) & joint)
        rest.append(Labels(shape, apart, x.fixed - joint - {dim}))
    others = combine(structure, *rest)
    shape = (*others.shape[:dim], sum(x.shape[dim] for x in pieces), *others.shape[dim + 1 :])
    fixed = others.fixed | frozenset().union(*(x.fixed for x in pieces))
    if not joint:
        return Labels(shape, others.factors, fixed | {dim})
    full = [size if index in joint else 1 for index, size in enumerate(shape)]
    units = _told_apart(structure, [_cover(structure, x, joint, dim) for x in pieces])
    parts = [
        np.broadcast_to(atoms, [*full[:dim], x.shape[dim], *full[dim + 1 :]])
        for atoms, x in zip(units, pieces, strict=True)
    ]
    return Labels(shape, maximal(structure, [np.concatenate(parts, axis=dim), *others.factors]), fixed)


def _told_apart(structure: Structure, covers: Sequence[Atoms]) -> Iterator[Atoms]:
    """Units of the pieces; a piece that repeats units of an earlier one gets new atoms that are tied to them.

    Without new atoms, interleaving would lose which piece a part of a unit comes from.
    """
    seen = np.empty(0, np.int64)
    for cover in covers:
        if np.isin(cover, seen).any():
            own = structure.fresh(*cover.shape)
            structure.tie(own, cover)
            yield own
        else:
            yield cover
        seen = np.concatenate([seen, cover.ravel()])


def _new_units(pieces: Sequence[Labels], dim: int) -> frozenset[int]:
    """Support of the joint units if no piece has units along `dim`.

    Different tensors that are stacked keep the units that each has. Next to ordered content, a run of equal entries
    (the zeros that a recurrent state starts from) becomes units, which may be exchanged with one another.
    """
    if not any(x.factors for x in pieces):
        equal = any(x.shape[dim] > 1 and dim not in x.fixed for x in pieces)
        return frozenset({dim}) if equal and any(dim in x.fixed for x in pieces) else frozenset()
    single = all(x.shape[dim] == 1 and len(x.factors) == 1 for x in pieces)
    if not single or all(np.array_equal(x.factors[0], pieces[0].factors[0]) for x in pieces):
        return frozenset()
    return frozenset({dim}).union(*(support(x.factors[0]) for x in pieces))


def _cover(structure: Structure, x: Labels, joint: frozenset[int], dim: int) -> Atoms:
    """Units of a piece over the dimensions `joint`."""
    touched = [factor for factor in x.factors if support(factor) & joint]
    if len(touched) == 1 and support(touched[0]) <= joint and not x.stiff & joint - {dim}:
        return touched[0]
    if touched:
        return product(structure, x, touched, joint)
    fill = structure.fresh(*(size if index == dim else 1 for index, size in enumerate(x.shape)))
    if dim in x.stiff:
        structure.pin(fill, "combined with ordered content")
    else:
        structure.gather(fill)
    return fill


def stack(structure: Structure, pieces: Sequence[Labels], dim: int) -> Labels:
    """Join along a new dimension."""
    dim = dim % (pieces[0].ndim + 1)
    return concatenate(structure, [insert(x, [dim]) for x in pieces], dim)
