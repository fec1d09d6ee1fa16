"""Rules of operators that read entries at the places of an index.

An index is content like any other: the units on which it depends are carried into the result. The dimension that it
reads keeps its order, unless the index *points into* its units (`Labels.points`): then both move together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from c2m3_fl.symmetry.facts import Atoms, Structure
from c2m3_fl.symmetry.labels import Labels, Shape
from c2m3_fl.symmetry.reshape_labels import reshape
from c2m3_fl.symmetry.rules.contraction import produces
from c2m3_fl.symmetry.rules.registry import Argument, Call, Result, expose, rule, tensors
from c2m3_fl.symmetry.unit_labels import align, combine, in_order, insert, permute, reduce, take, targets

_PLACE = "looked up by its place"


def addressed(structure: Structure, x: Labels, dim: int, index: Labels, reason: str = _PLACE) -> Labels:
    """A tensor of which an index picks or writes entries along `dim`: tied to the index's units, or in order."""
    units = targets(structure, index)
    if units is not None and len(units) == x.shape[dim]:
        spread = units.reshape([-1 if other == dim else 1 for other in range(x.ndim)])
        return combine(structure, x, Labels(x.shape, (spread,)))
    expose(structure, index)
    if any(factor.shape[dim] > 1 for factor in x.factors):
        return in_order(structure, x, [dim], reason)
    return x


def without(structure: Structure, x: Labels, dims: Sequence[int]) -> Labels:
    """The units of all entries along `dims`, which keep size 1."""
    return reduce(structure, x, dims, keepdim=True)


def look_up(structure: Structure, x: Labels, dim: int, index: Labels, reason: str = _PLACE) -> Labels:
    """Replace a dimension by the dimensions of an index."""
    found = without(structure, addressed(structure, x, dim, index, reason), [dim])
    shape = (*x.shape[:dim], *index.shape, *x.shape[dim + 1 :])
    factors = tuple(
        factor.reshape(*factor.shape[:dim], *(1 for _ in index.shape), *factor.shape[dim + 1 :])
        for factor in found.factors
    )
    spread = Labels(shape, factors, frozenset(old + (index.ndim - 1) * (old > dim) for old in found.fixed))
    return combine(structure, spread, insert(plain(index), range(dim + index.ndim, len(shape))))


def plain(index: Labels) -> Labels:
    """An index as a tensor of entries."""
    return replace(index, points=None, source="")


@rule("aten.embedding", indexing=True)
def embedding(call: Call, weight: Labels, index: Labels, *_: Argument, **__: Argument) -> Labels:
    """Rows of a table."""
    produces(call, weight, 1)
    return look_up(call.structure, weight, 0, index, "row of a lookup table")


@rule("aten.embedding_bag", "aten._embedding_bag", "aten._embedding_bag_forward_only", indexing=True)
def embedding_bag(call: Call, weight: Labels, index: Labels, offsets: Labels | None, *args: Argument) -> Result:
    """Sums or means of the rows of a table, one for each bag of indices."""
    produces(call, weight, 1)
    structure = call.structure
    rows = look_up(structure, weight, 0, index, "row of a lookup table")
    if len(args) > 3 and isinstance(args[3], Labels):
        rows = combine(structure, rows, insert(args[3], [args[3].ndim]))
    bags = without(structure, rows, range(rows.ndim - 1))
    lead = rows.ndim - 1
    units = tuple(factor.reshape(1, factor.shape[-1]) for factor in bags.factors)
    fixed = {0} if call.shape[0] > 1 else set()
    found = Labels(call.shape, units, frozenset(fixed | {dim - lead + 1 for dim in bags.fixed}))
    return (found, *(Labels.ordered(shape) for shape in call.outputs[1:]))


@rule("aten.one_hot", indexing=True)
def one_hot(call: Call, index: Labels, *_: Argument) -> Labels:
    """A one at the place of every index, along a new last dimension."""
    shape = (1,) * index.ndim + call.shape[-1:]
    row = Labels.ordered(shape) if index.points is None else Labels(shape)
    return combine(
        call.structure, addressed(call.structure, row, index.ndim, index), insert(plain(index), [index.ndim])
    )


@rule("aten.eq", "aten.ne", indexing=True)
def compare(call: Call, x: Labels, y: Argument) -> Labels:
    """Equality, entry by entry; an index compared with 0, 1, 2, … along a dimension is a row of zeros and a one."""
    for index, other, place in ((x, y, 1), (y, x, 0)):
        if isinstance(index, Labels) and index.points is not None and isinstance(other, Labels):
            count, numbers = index.points[0].shape[index.points[1]], call.values.get(place)
            if numbers is not None and numbers.size == count and (numbers.ravel() == np.arange(count)).all():
                dim = int(np.argmax(other.shape))
                row = addressed(call.structure, Labels(other.shape), dim, index)
                return combine(call.structure, row, plain(index))
    return combine(call.structure, *(expose(call.structure, value) for value in tensors([x, y])))


@rule("aten.index_select", indexing=True)
def index_select(call: Call, x: Labels, dim: int, index: Labels) -> Labels:
    """Entries at the places of an index."""
    if 2 in call.values:
        return take(call.structure, x, dim, call.values[2].ravel())
    return look_up(call.structure, x, x.dim(dim), index)


@rule("aten.gather", "aten.take_along_dim", indexing=True)
def gather(call: Call, x: Labels, *args: Argument, **_: Argument) -> Labels:
    """Entries along a dimension at the places of an index of as many dimensions."""
    index, dim = (args[0], args[1]) if isinstance(args[0], Labels) else (args[1], args[0])
    dim = x.dim(dim)
    found = without(call.structure, addressed(call.structure, x, dim, index), [dim])
    for other in range(x.ndim):
        if other != dim and x.shape[other] > call.shape[other]:
            found = take(call.structure, found, other, np.arange(call.shape[other]))
    return combine(call.structure, found, plain(index))


@rule("aten.index", indexing=True)
def index(call: Call, x: Labels, indices: Sequence[Labels | None]) -> Labels:
    """Entries at the places of indices, one for each of some dimensions; the indices broadcast."""
    used = [dim for dim, value in enumerate(indices) if value is not None]
    if (places := known(call, x, used)) is not None:
        return reshape(call.structure, take(call.structure, x, used[0], places), call.shape)
    x, joint = several(call, x, indices)
    start = first(used)
    if call.shape[start : start + joint.ndim] != joint.shape:  # masks
        in_order(call.structure, x, range(x.ndim), "looked up by several indices")
        return Labels.ordered(call.shape)
    found = arrange(without(call.structure, x, used), used, joint.ndim)
    return combine(call.structure, found, among(joint, used, x.ndim - len(used)))


def known(call: Call, x: Labels, used: Sequence[int]) -> Atoms | None:
    """The places that a single constant index names."""
    if len(used) != 1 or 1 not in call.values or x.shape[used[0]] == 0 or call.values[1].dtype == np.bool_:
        return None
    places: Atoms = call.values[1].ravel() % x.shape[used[0]]
    return places


def several(call: Call, x: Labels, indices: Sequence[Labels | None]) -> tuple[Labels, Labels]:
    """A tensor whose dimensions are addressed by indices, and the indices broadcast to one."""
    for dim, value in enumerate(indices):
        if value is not None:
            x = addressed(call.structure, x, dim, value)
    return x, combine(call.structure, *(plain(value) for value in indices if value is not None))


def first(used: Sequence[int]) -> int:
    """Where the dimensions of the indices come: in place of neighbouring dimensions, otherwise in front."""
    return used[0] if list(used) == list(range(used[0], used[-1] + 1)) else 0


def arrange(x: Labels, used: Sequence[int], ndim: int) -> Labels:
    """Dimensions that indices read, of size 1, replaced by `ndim` dimensions of size 1 where the indices' come."""
    rest = [dim for dim in range(x.ndim) if dim not in used]
    start = first(used)
    moved = permute(x, [*rest, *used])
    shape: Shape = moved.shape[: len(rest)]
    factors = tuple(factor.reshape(factor.shape[: len(rest)]) for factor in moved.factors)
    kept = Labels(shape, factors, frozenset(dim for dim in moved.fixed if dim < len(rest)))
    return insert(kept, range(start, start + ndim))


def among(joint: Labels, used: Sequence[int], rest: int) -> Labels:
    """The indices' labels among the `rest` other dimensions of the result."""
    start = first(used)
    return insert(align(joint, start + joint.ndim), range(start + joint.ndim, rest + joint.ndim))
