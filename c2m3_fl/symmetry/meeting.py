"""What follows when tensors are combined coordinate by coordinate."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from c2m3_fl.symmetry.facts import Atoms, Structure
from c2m3_fl.symmetry.labels import Labels, project, support


def note_alone(structure: Structure, operands: Sequence[Labels]) -> None:
    """Note factors along dimensions on which no other operand has units: such an operand makes units of its own."""
    for dim in range(operands[0].ndim):
        held = [[factor for factor in x.factors if factor.shape[dim] > 1] for x in operands]
        if sum(map(bool, held)) == 1:
            for factor in (factor for factors in held for factor in factors):
                structure.alone.setdefault(id(factor), (factor, len(structure.ties)))


def by_place(structure: Structure, x: Labels, others: Sequence[Labels]) -> Labels:
    """Tell the places of a repeated unit apart where other operands have units along some of its dimensions only.

    A table of offsets, looked up by query and key, repeats its units over both. Rows and columns alone, as sets, do not
    say at which pairs an offset occurs. The units of the result are the places, which lie in the units of the table.

    Parameters
    ----------
    structure : Structure
        The object that takes the facts.
    x : Labels
        One operand.
    others : sequence of Labels
        Those that it is combined with, all of as many dimensions.
    """
    factors = []
    for factor in x.factors:
        dims = support(factor)
        met = [dims & support(one) for other in others for one in other.factors]
        stiff = [dims & other.stiff for other in others]
        apart = any(common and common != dims for common in met + stiff) and dims not in stiff
        factors.append(structure.places_of(factor) if apart else factor)
    return replace(x, factors=tuple(factors))


def diagonal(structure: Structure, x: Labels, others: Sequence[Labels]) -> Labels:
    """A constant like the unit matrix, one number on the diagonal and another elsewhere, ties rows to columns.

    Parameters
    ----------
    structure : Structure
        The object that takes the facts.
    x : Labels
        One operand.
    others : sequence of Labels
        Those that it is combined with, all of as many dimensions.
    """
    rows, columns = x.ndim - 2, x.ndim - 1
    if x.content is None or not {rows, columns} <= x.fixed or x.shape[rows] != x.shape[columns]:
        return x
    matrices, on = x.content.reshape(-1, *x.shape[rows:]), np.eye(x.shape[rows], dtype=bool)
    if any((part != part[:, :1]).any() for part in (matrices[:, on], matrices[:, ~on])):
        return x
    factors = [factor for other in others for factor in other.factors]
    pairs = [[factor for factor in factors if dim in support(factor)] for dim in (rows, columns)]
    if not all(pairs) or any({rows, columns} <= support(factor) for factor in factors):
        return x
    for one in pairs[0]:
        for other in pairs[1]:
            structure.tie(project(structure, one, [rows]).reshape(-1), project(structure, other, [columns]).reshape(-1))
    return replace(x, fixed=x.fixed - {rows, columns})


def meet(structure: Structure, x: Labels, y: Labels) -> None:
    """State what follows when two aligned operands are combined coordinate by coordinate.

    Parameters
    ----------
    structure : Structure
        The object that takes the facts.
    x, y : Labels
        Both operands, of as many dimensions.
    """
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
