"""Rules of operators that reduce, normalise or accumulate along dimensions."""

from __future__ import annotations

from collections.abc import Sequence

from c2m3_fl.symmetry.labels import Labels
from c2m3_fl.symmetry.rules.registry import Argument, Call, Result, rule
from c2m3_fl.symmetry.unit_labels import combine, in_order, insert, normalise, reduce


def every(x: Labels, dims: Argument) -> list[int]:
    """The dimensions that an optional argument names; all dimensions for None or an empty list."""
    if dims is None or (isinstance(dims, Sequence) and not dims):
        return list(range(x.ndim))
    return [x.dim(dim) for dim in (dims if isinstance(dims, Sequence) else [dims])]


@rule(
    "aten.mean",
    "aten.sum",
    "aten.amax",
    "aten.amin",
    "aten.logsumexp",
    "aten.prod",
    "aten.any",
    "aten.all",
    "aten.nansum",
)
def reduction(call: Call, x: Labels, dims: Argument = None, keepdim: bool = False, **_: Argument) -> Labels:
    """A symmetric function along dimensions."""
    return reduce(call.structure, x, every(x, dims), keepdim=keepdim)


@rule("aten.var", "aten.std", "aten.var_mean", "aten.std_mean")
def moments(
    call: Call, x: Labels, dims: Argument = None, *_: Argument, keepdim: bool = False, **__: Argument
) -> Result:
    """Second moments along dimensions."""
    if isinstance(dims, bool):
        dims = None
    found = reduce(call.structure, x, every(x, dims), keepdim=len(call.shape) == x.ndim)
    return found if len(call.outputs) == 1 else (found, found)


@rule("aten.linalg_vector_norm", "aten.norm")
def vector_norm(
    call: Call, x: Labels, order: Argument = 2, dims: Argument = None, *_: Argument, **__: Argument
) -> Labels:
    """A norm along dimensions."""
    return reduce(call.structure, x, every(x, dims), keepdim=len(call.shape) == x.ndim)


@rule("aten.softmax", "aten._softmax", "aten.log_softmax", "aten._log_softmax", "aten._safe_softmax")
def softmax(call: Call, x: Labels, dim: int, *_: Argument, **__: Argument) -> Labels:
    """Division by a sum along one dimension."""
    return normalise(call.structure, x, [dim])


@rule("aten.cumsum", "aten.cumprod", "aten.logcumsumexp", "aten.cummax", "aten.cummin")
def cumulative(call: Call, x: Labels, dim: int, **_: Argument) -> Result:
    """Read one dimension in order."""
    found = in_order(call.structure, x, [dim])
    return found if len(call.outputs) == 1 else (found, found)


@rule("aten.diff")
def diff(call: Call, x: Labels, _n: int = 1, dim: int = -1, *_: Argument, **__: Argument) -> Labels:
    """Differences of neighbours along one dimension."""
    found = in_order(call.structure, x, [dim])
    return Labels(call.shape, found.factors, found.fixed - {dim for dim, size in enumerate(call.shape) if size < 2})


@rule("aten.unfold")
def windows(call: Call, x: Labels, dim: int, *_: Argument) -> Labels:
    """Windows along one dimension, whose entries lie on a new last one."""
    found = insert(in_order(call.structure, x, [dim]), [x.ndim])
    return Labels(call.shape, found.factors, found.fixed | {x.ndim})


@rule("aten.linalg_cross", "aten.cross")
def cross(call: Call, x: Labels, y: Labels, dim: int = -1, **options: Argument) -> Labels:
    """Vector products along a dimension of three entries."""
    found = combine(call.structure, x, y)
    return in_order(call.structure, found, [options.get("dim", dim)])
