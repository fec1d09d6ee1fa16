"""Rules of operators that write or add entries at the places of an index (messages along the edges of a graph)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from c2m3_fl.symmetry.labels import Labels
from c2m3_fl.symmetry.reshape_labels import concatenate
from c2m3_fl.symmetry.rules.lookup import addressed, among, first, known, plain, several, without
from c2m3_fl.symmetry.rules.registry import Argument, Call, rule
from c2m3_fl.symmetry.unit_labels import align, combine, drop, in_order, insert, permute, take


@rule("aten.slice_scatter")
def slice_scatter(
    call: Call, x: Labels, source: Labels, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1
) -> Labels:
    """Entries at regular places along a dimension replaced by others."""
    dim = x.dim(dim)
    return _replace(call, x, dim, np.arange(x.shape[dim])[slice(start, end, step)], source)


@rule("aten.select_scatter")
def select_scatter(call: Call, x: Labels, source: Labels, dim: int, index: int) -> Labels:
    """One entry along a dimension replaced."""
    dim = x.dim(dim)
    return _replace(call, x, dim, np.array([index % x.shape[dim]]), insert(source, [dim]))


def _replace(call: Call, x: Labels, dim: int, places: np.ndarray, source: Labels) -> Labels:
    """Entries at known places along a dimension replaced by those of `source`."""
    if not source.factors and not source.fixed and any(factor.shape[dim] > 1 for factor in x.factors):
        take(call.structure, x, dim, places)
        return combine(call.structure, x)  # a constant written over some units: their labels stay valid
    joined = concatenate(call.structure, [x, source], dim)
    order = np.arange(x.shape[dim])
    order[places] = x.shape[dim] + np.arange(len(places))
    return take(call.structure, joined, dim, order)


def _add(call: Call, x: Labels, dim: int, places: np.ndarray, source: Labels) -> Labels:
    """Something combined with the entries at known places along a dimension."""
    combine(call.structure, take(call.structure, x, dim, places), source)
    return combine(call.structure, x)


@rule("aten.index_add", "aten.index_copy", "aten.index_reduce", indexing=True)
def index_add(call: Call, x: Labels, dim: int, index: Labels, source: Labels, *_: Argument, **__: Argument) -> Labels:
    """Slices of `source` added to slices of `x`, or written over them, at the places of an index."""
    dim = x.dim(dim)
    if 2 in call.values and any(factor.shape[dim] > 1 for factor in x.factors):
        places = call.values[2].ravel()
        writes = call.structure.operator.startswith("aten.index_copy") and len(np.unique(places)) == len(places)
        return (_replace if writes else _add)(call, x, dim, places, source)
    index = index if index.ndim else insert(index, [0])
    return _scatter(call, x, dim, index, source, insert(plain(index), range(1, source.ndim - dim)))


@rule("aten.index_fill", indexing=True)
def index_fill(call: Call, x: Labels, dim: int, index: Labels, value: Argument) -> Labels:
    """Slices at the places of an index filled with one number."""
    dim = x.dim(dim)
    if 2 in call.values:
        take(call.structure, x, dim, call.values[2].ravel())
        return combine(call.structure, x)
    x = addressed(call.structure, x, dim, index)
    return Labels(x.shape, x.factors, x.fixed | ({dim} if index.points is None else set()))


@rule("aten.scatter", "aten.scatter_add", "aten.scatter_reduce", indexing=True)
def scatter(call: Call, x: Labels, dim: int, index: Labels, source: Argument, *_: Argument, **__: Argument) -> Labels:
    """Entries written or added along a dimension at the places of an index of as many dimensions."""
    dim = x.dim(dim)
    if isinstance(source, Labels) and source.ndim == index.ndim:
        for other in range(source.ndim):
            if source.shape[other] > index.shape[other]:
                source = take(call.structure, source, other, np.arange(index.shape[other]))
    else:
        source = Labels(index.shape)
    spread = plain(index)
    for other in range(x.ndim):
        if other != dim and x.shape[other] != index.shape[other]:  # only the first entries are written
            x = in_order(call.structure, x, [other])
            source, spread = (in_order(call.structure, value, [other]) for value in (source, spread))
            source, spread = (without(call.structure, value, [other]) for value in (source, spread))
    return _scatter(call, x, dim, index, source, spread)


def _scatter(call: Call, x: Labels, dim: int, index: Labels, source: Labels, spread: Labels) -> Labels:
    """All entries of `source` along `dim`, at places along `dim` of `x`."""
    written = without(call.structure, combine(call.structure, source, spread), [dim])
    target = addressed(call.structure, x, dim, index)
    if index.points is None and x.shape[dim] > 1:
        target = Labels(target.shape, target.factors, target.fixed | {dim})
    return combine(call.structure, target, written)


@rule("aten.index_put", "aten._unsafe_index_put", indexing=True)
def index_put(
    call: Call, x: Labels, indices: Sequence[Labels | None], values: Labels, accumulate: bool = False, *_: Argument
) -> Labels:
    """Values written, or added, at the places of indices, one for each of some dimensions."""
    used = [dim for dim, value in enumerate(indices) if value is not None]
    places = known(call, x, used)
    one = places is not None and indices[used[0]].ndim == 1  # type: ignore[union-attr]  # used are given
    if places is not None and one and any(factor.shape[used[0]] > 1 for factor in x.factors):
        values = align(values, x.ndim)
        if accumulate or len(np.unique(places)) < len(places):
            return _add(call, x, used[0], places, values)
        if values.shape[used[0]] == 1 < len(places):
            wide = [len(places) if dim == used[0] else size for dim, size in enumerate(x.shape)]
            values = Labels(tuple(wide), values.factors, values.fixed)
        return _replace(call, x, used[0], places, values)
    target, joint = several(call, x, indices)
    start, rest = first(used), [dim for dim in range(x.ndim) if dim not in used]
    spread = among(joint, used, len(rest))
    written = combine(call.structure, spread, values)
    gone = range(start, start + joint.ndim)
    written = insert(drop(without(call.structure, written, gone), gone), range(len(rest), x.ndim))
    order = [rest.index(dim) if dim in rest else len(rest) + used.index(dim) for dim in range(x.ndim)]
    pointed = {dim for dim in used if indices[dim].points is not None}  # type: ignore[union-attr]  # as above
    fixed = target.fixed | {dim for dim in used if dim not in pointed and x.shape[dim] > 1}
    return combine(call.structure, Labels(target.shape, target.factors, fixed), permute(written, order))
