"""Tables: buffers that hold numbers of their own, and parts of tensors that the inputs do not reach."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from c2m3_fl.core.spec import PermutationSpec
from c2m3_fl.symmetry.colour_refinement import tied
from c2m3_fl.symmetry.facts import Structure

_UNREAD = "not read with these inputs"


def pin_tables(structure: Structure, state: Mapping[str, Tensor], buffers: Collection[str]) -> None:
    """Pin buffers that make units of their own, such as the knots of splines: their content tells the units apart.

    Units that a parameter makes are permuted with all buffers about them, whatever these hold. What parameters only
    read, such as coordinates, the buffer makes.

    Parameters
    ----------
    structure : Structure
        The facts of one pass; it takes the pins.
    state : mapping of str to Tensor
        The state dict.
    buffers : collection of str
        Names of the buffers.
    """
    never = len(structure.ties)
    alone, met = np.full((2, structure.size), never)
    for atoms, known in structure.alone.values():
        alone[atoms] = np.minimum(alone[atoms], known)
    tables = [key for key in structure.axes if key[0] in buffers and key[1] in varying(state[key[0]])]
    if not tables:
        return
    for number in reversed(range(never)):
        for atoms in structure.ties[number]:
            met[atoms] = number
    own = np.zeros(structure.size, dtype=bool)
    for key in tables:
        own[structure.axes[key]] = True
    own &= (alone <= met) & (alone < never)
    classes = tied(structure)
    made = np.unique(classes[(alone < never) & ~own])
    learnt = {key: classes[atoms] for key, atoms in structure.axes.items() if key[0] not in buffers}
    computed = np.concatenate([made, *(found for key, found in learnt.items() if key in structure.outputs)])
    read = np.setdiff1d(np.concatenate([made, *learnt.values()]), computed)
    structure.operator = structure.module = ""
    for key in tables:
        atoms = structure.axes[key]
        table = own[atoms] & ~np.isin(classes[atoms], made) | np.isin(classes[atoms], read)
        structure.pin(atoms[table], "buffer with content of its own")


def pin_unread(structure: Structure) -> None:
    """Pin what lies beyond a slice on a parameter axis: other inputs may read it, such as longer sequences."""
    statements = [side for pair in structure.ties + structure.relations for side in pair]
    touched = np.zeros(structure.size, dtype=bool)
    for atoms in [*statements, *structure.sets.values(), *(atoms for atoms, _ in structure.pins)]:
        touched[atoms] = True
    structure.operator = structure.module = ""
    for atoms in structure.axes.values():
        if touched[atoms].any() and not touched[atoms].all():
            structure.pin(atoms[~touched[atoms]], _UNREAD)


def with_tables(spec: PermutationSpec, written: Collection[str]) -> PermutationSpec:
    """The same spec with fixed tables in the agreement, like parameters: positions that are added to a stream.

    A table is a buffer of several axes that carries units, that no pass writes to, and that is read as a whole: entries
    that are not read are the same in all nodes and would outweigh everything else.

    Parameters
    ----------
    spec : PermutationSpec
        The spec, all of whose buffers are out of the agreement.
    written : collection of str
        Tensors that some pass writes to.
    """
    unread = {pin.tensor for pin in spec.pins if pin.reason == _UNREAD}
    tables = {
        name: replace(tensor, buffer=False)
        for name, tensor in spec.tensors.items()
        if tensor.buffer and any(tensor.axes) and sum(size > 1 for size in tensor.shape) > 1
        if name not in written and name not in unread
    }
    return replace(spec, tensors={**spec.tensors, **tables}) if tables else spec


def varying(tensor: Tensor) -> list[int]:
    """Dimensions along which a tensor is not constant."""
    return [
        dim
        for dim, size in enumerate(tensor.shape)
        if size > 1 and not torch.equal(tensor, tensor.narrow(dim, 0, 1).expand_as(tensor))
    ]
