"""Rules of operators on matrices as wholes: outer products, diagonals, distances, norms, inverses."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from c2m3_fl.symmetry.facts import Structure
from c2m3_fl.symmetry.labels import Labels
from c2m3_fl.symmetry.reshape_labels import reshape
from c2m3_fl.symmetry.rules.reduction import every
from c2m3_fl.symmetry.rules.registry import Argument, Call, rule
from c2m3_fl.symmetry.unit_labels import combine, einsum, expand, in_order, insert, permute, reduce


@rule("aten.tensordot")
def tensordot(call: Call, x: Labels, y: Labels, first: Sequence[int], second: Sequence[int]) -> Labels:
    """Sum over dimensions of two tensors, pair by pair."""
    left: list[str] = [f"x{dim}" for dim in range(x.ndim)]
    right: list[str] = [f"y{dim}" for dim in range(y.ndim)]
    for one, other in zip(first, second, strict=True):
        right[y.dim(other)] = left[x.dim(one)]
    gone = {left[x.dim(one)] for one in first}
    return einsum(call.structure, [left, right], [name for name in left + right if name not in gone], [x, y])


@rule("aten.outer", "aten.ger")
def outer(call: Call, x: Labels, y: Labels) -> Labels:
    """All products of two vectors' entries."""
    return einsum(call.structure, ["i", "j"], "ij", [x, y])


@rule("aten.addr")
def addr(call: Call, bias: Labels, x: Labels, y: Labels, **_: Argument) -> Labels:
    """Something plus all products of two vectors' entries."""
    return combine(call.structure, bias, outer(call, x, y))


@rule("aten.kron")
def kron(call: Call, x: Labels, y: Labels) -> Labels:
    """All products of two matrices' entries, arranged as blocks."""
    return reshape(call.structure, einsum(call.structure, ["ij", "kl"], "ikjl", [x, y]), call.shape)


@rule("aten.inner")
def inner(call: Call, x: Labels, y: Labels) -> Labels:
    """Sum over the last dimensions of two tensors."""
    left, right = ([*(f"{name}{dim}" for dim in range(z.ndim - 1)), "k"] for name, z in (("x", x), ("y", y)))
    return einsum(call.structure, [left, right], left[:-1] + right[:-1], [x, y])


@rule("aten.vdot", "aten.linalg_vecdot", "aten.cosine_similarity")
def vecdot(call: Call, x: Labels, y: Labels, dim: int | None = None, *_: Argument, **options: Argument) -> Labels:
    """Products of vectors along one dimension."""
    default = 1 if call.structure.operator.startswith("aten.cosine") else -1
    dim = options.get("dim", default if dim is None else dim)
    return reduce(call.structure, combine(call.structure, x, y), [dim])


@rule("aten.pairwise_distance")
def pairwise(call: Call, x: Labels, y: Labels, *_: Argument, **__: Argument) -> Labels:
    """A norm of the difference along the last dimension."""
    found = combine(call.structure, x, y)
    return reduce(call.structure, found, [-1], keepdim=len(call.shape) == found.ndim)


@rule("aten.cdist", "aten._cdist_forward", "aten._euclidean_dist")
def cdist(call: Call, x: Labels, y: Labels, *_: Argument, **__: Argument) -> Labels:
    """Distances of all rows of one matrix to all rows of another."""
    batch = [[f"b{dim}" for dim in range(z.ndim - 2, 0, -1)] for z in (x, y)]
    longest = max(batch, key=len)
    return einsum(call.structure, [[*batch[0], "p", "m"], [*batch[1], "r", "m"]], [*longest, "p", "r"], [x, y])


@rule("aten.linalg_norm", "aten.linalg_matrix_norm")
def matrix_norm(
    call: Call, x: Labels, order: Argument = None, dims: Argument = None, *_: Argument, **__: Argument
) -> Labels:
    """A norm of vectors or matrices: none depends on the order of rows or of columns."""
    if dims is None and call.structure.operator.startswith("aten.linalg_matrix_norm"):
        dims = [-2, -1]
    return reduce(call.structure, x, every(x, dims), keepdim=len(call.shape) == x.ndim)


# ------------------------------------------------------------------------------------------------------- diagonals


def diagonal(structure: Structure, x: Labels, first: int, second: int) -> Labels:
    """Entries with the same coordinate on two dimensions of one length, which move to the end as one."""
    order = [dim for dim in range(x.ndim) if dim not in (first, second)]
    x = permute(x, [*order, first, second])
    shape = x.shape[:-1]
    parts = [Labels(shape, (), frozenset(min(dim, x.ndim - 2) for dim in x.fixed))]
    for factor in x.factors:
        if max(factor.shape[-2:]) > 1:
            factor = np.diagonal(np.broadcast_to(factor, (*factor.shape[:-2], *x.shape[-2:])), axis1=-2, axis2=-1)
        else:
            factor = factor[..., 0]
        parts.append(Labels(shape, (np.ascontiguousarray(factor),)))
    return combine(structure, *parts)


@rule("aten.diagonal")
def pick_diagonal(call: Call, x: Labels, offset: int = 0, first: int = 0, second: int = 1) -> Labels:
    """Entries with the same row and column; those beside the diagonal are read in order."""
    first, second = x.dim(first), x.dim(second)
    if offset == 0 and x.shape[first] == x.shape[second]:
        return diagonal(call.structure, x, first, second)
    x = reduce(call.structure, in_order(call.structure, x, [first, second]), [first, second])
    x = insert(x, [x.ndim])
    return Labels(call.shape, x.factors, x.fixed | {x.ndim - 1})


@rule("aten.diag_embed")
def diag_embed(call: Call, x: Labels, offset: int = 0, first: int = -2, second: int = -1) -> Labels:
    """A matrix with given entries on its diagonal: rows and columns carry the same units."""
    if offset != 0:
        in_order(call.structure, x, range(x.ndim))
        return Labels.ordered(call.shape)
    found = combine(call.structure, insert(x, [x.ndim]), insert(x, [x.ndim - 1]))
    places = sorted([first % found.ndim, second % found.ndim])
    order = [*range(x.ndim - 1)]
    for place, dim in zip(places, (x.ndim - 1, x.ndim), strict=True):
        order.insert(place, dim)
    return permute(found, order)


@rule("aten.diag")
def diag(call: Call, x: Labels, offset: int = 0) -> Labels:
    """The diagonal of a matrix, or the matrix of a diagonal."""
    return diag_embed(call, x, offset) if x.ndim == 1 else pick_diagonal(call, x, offset)


@rule("aten.trace")
def trace(call: Call, x: Labels) -> Labels:
    """Sum of the diagonal."""
    return reduce(call.structure, pick_diagonal(call, x, int(x.shape[0] != x.shape[1])), [-1])


# ------------------------------------------------------------------------------------------------ square matrices


def _sides(call: Call, x: Labels) -> tuple[Labels, Labels]:
    """Units of the rows (…, n, 1), and of the columns (…, 1, m)."""
    return reduce(call.structure, x, [-1], keepdim=True), reduce(call.structure, x, [-2], keepdim=True)


def _turned(x: Labels) -> Labels:
    return permute(x, [*range(x.ndim - 2), x.ndim - 1, x.ndim - 2])


@rule("aten.linalg_inv", "aten.inverse", "aten.linalg_pinv", "aten.pinverse")
def inverse(call: Call, x: Labels, *_: Argument, **__: Argument) -> Labels:
    """The inverse has the matrix's columns as rows, and its rows as columns."""
    rows, columns = _sides(call, x)
    return combine(call.structure, _turned(rows), _turned(columns))


@rule("aten.linalg_matrix_exp", "aten.matrix_exp", "aten.linalg_matrix_power", "aten.matrix_power")
def power(call: Call, x: Labels, *_: Argument) -> Labels:
    """A power series of a matrix: its rows and columns carry the same units."""
    rows, columns = _sides(call, x)
    combine(call.structure, rows, _turned(columns))
    return combine(call.structure, rows, columns)


@rule("aten.meshgrid")
def meshgrid(call: Call, vectors: Sequence[Labels], *_: Argument, **options: Argument) -> tuple[Labels, ...]:
    """Every vector along a dimension of its own."""
    swapped = options.get("indexing", _[0] if _ else "ij") == "xy"
    found = []
    for place, (vector, shape) in enumerate(zip(vectors, call.outputs, strict=True)):
        dim = 1 - place if swapped and place < 2 else place
        vector = vector if vector.ndim else insert(vector, [0])
        found.append(expand(insert(vector, [other for other in range(len(shape)) if other != dim]), shape))
    return tuple(found)
