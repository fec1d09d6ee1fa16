"""Rules of operators that compare the entries along a dimension: extrema, sorting, the largest k.

The values in order of size are symmetric functions of the entries. An index *points into* the units: its numbers change
with their order, so it may be used to look entries up, but not as a number.
"""

from __future__ import annotations

from dataclasses import replace

from c2m3_fl.symmetry.labels import Labels, support
from c2m3_fl.symmetry.rules.reduction import every
from c2m3_fl.symmetry.rules.registry import Argument, Call, Result, rule
from c2m3_fl.symmetry.unit_labels import combine, drop, in_order, reduce


def _ranked(call: Call, x: Labels, dim: int, keepdim: bool) -> tuple[Labels, Labels]:
    """Values by rank, and their indices: one rank that disappears unless `keepdim`, or several."""
    dim = x.dim(dim)
    values = reduce(call.structure, x, [dim], keepdim=True)
    if keepdim and call.shape[dim] > 1:
        values = replace(values, shape=call.shape, fixed=values.fixed | {dim})
    values = values if keepdim else drop(values, [dim])
    units = any(dim in support(factor) for factor in x.factors)
    return values, replace(values, points=(x, dim) if units else None)


@rule("aten.max", "aten.min", "aten.median", "aten.nanmedian", "aten.mode")
def extremum(call: Call, x: Labels, *args: Argument, **_: Argument) -> Result:
    """An entry by rank: of all, along a dimension (with its index), or the greater of two tensors."""
    if args and isinstance(args[0], Labels):
        return combine(call.structure, x, args[0])
    if len(call.outputs) == 1:
        return reduce(call.structure, x, range(x.ndim))
    return _ranked(call, x, args[0] if args else -1, len(call.shape) == x.ndim)


@rule("aten.kthvalue", "aten.topk")
def by_rank(call: Call, x: Labels, _k: int, dim: int = -1, *_: Argument, **__: Argument) -> Result:
    """The k-th or the k largest entries along a dimension, with their indices."""
    return _ranked(call, x, dim, len(call.shape) == x.ndim)


@rule("aten.sort")
def sort(call: Call, x: Labels, dim: int = -1, *_: Argument, **__: Argument) -> Result:
    """All entries along a dimension by rank, with their indices."""
    return _ranked(call, x, dim, True)


@rule("aten.argsort")
def argsort(call: Call, x: Labels, dim: int = -1, *_: Argument, **__: Argument) -> Labels:
    """Indices of all entries along a dimension by rank."""
    return _ranked(call, x, dim, True)[1]


@rule("aten.argmax", "aten.argmin")
def argument(call: Call, x: Labels, dim: int | None = None, keepdim: bool = False) -> Labels:
    """Index of an extremum; that of all entries depends on the order of every dimension."""
    if dim is not None or x.ndim == 1:
        return _ranked(call, x, dim or 0, keepdim)[1]
    return reduce(call.structure, in_order(call.structure, x, every(x, None)), every(x, None), keepdim=keepdim)
