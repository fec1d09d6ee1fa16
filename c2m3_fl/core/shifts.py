"""What a move changes in one node's part of a term, where it moves less than half of the units of one axis."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from c2m3_fl.core.places import Place
from c2m3_fl.core.terms import Term


@dataclass(frozen=True, eq=False)
class Shift:
    """Some units of one axis, and what they are.

    Attributes
    ----------
    axis : int
        The grouped axis.
    units : Tensor of int64, shape (moved,)
        The places on it.
    before, after : Tensor
        The node's part there, before and after the move.
    """

    axis: int
    units: Tensor
    before: Tensor
    after: Tensor


def shift_of(term: Term, value: Tensor, places: Mapping[str, Place], index: Mapping[str, Tensor]) -> Shift | None:
    """The shift that permutations make of a part; None where it is none.

    Parameters
    ----------
    term : Term
        Which groups the axes have.
    value : Tensor, shape (C_1, R, C_2, ...)
        The node's part in its frame.
    places : mapping of str to Place
        The node's groups that are not at the frame.
    index : mapping of str to Tensor
        Permutations of some groups, or rotations.
    """
    axes = [axis for axis, group in enumerate(term.groups) if group in index]
    rows = index[term.groups[axes[0]]]
    if len(axes) > 1 or rows.ndim > 1 or any(group in places for group in term.groups):
        return None
    units = (rows != torch.arange(len(rows), device=rows.device)).nonzero()[:, 0]
    if 2 * len(units) >= len(rows):
        return None
    dim = term.dim(axes[0]) - 1
    return Shift(axes[0], units, value.index_select(dim, units), value.index_select(dim, rows[units]))
