"""What tracing learns about a network's units, as plain relations between *atoms*.

Every coordinate of every axis of every parameter is an atom: a unit of its own unless a fact says otherwise. Blocks
(attention heads, channel groups) are further atoms. Tracing states these facts:

    tie       these two coordinates carry the same unit
    relate    this unit lies in that block: blocks move as wholes
    gather    these units form a set: only members of the set may be exchanged
    pin       this unit stays where it is, for this reason

Where rotations are asked for, two more say which units are not coordinates of a space that may be rotated:

    read_singly   an operator that is not linear in these units reads them one by one
    pool          an operator reads their mean: only rotations that keep the vector of ones leave it as it is

Once all facts are known, `c2m3_fl.symmetry.build_spec` turns them into groups.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Atoms = npt.NDArray[np.int64]
AxisKey = tuple[str, int]


@dataclass(frozen=True)
class Cause:
    """Why atoms are pinned: the reason, the ATen operator and the path of the module that called it."""

    reason: str
    operator: str = ""
    module: str = ""


class Structure:
    """The facts found so far; append-only.

    Attributes
    ----------
    size : int
        Number of atoms.
    starts : list of int
        First atom of every array of fresh atoms: atoms of one array have the same origin.
    axes : dict of (str, int) to ndarray
        Atoms of every parameter axis, shape (length,).
    virtuals : dict of str to ndarray
        Atoms of the virtual axis 1 of block-diagonal weights, shape (blocks * width,).
    diagonal : dict of str to int
        Number of diagonal blocks of the weights of grouped convolutions.
    written : set of str
        Tensors that a traced pass writes to, such as running statistics.
    outputs : dict of (str, int) to None
        Axes that compute units (rows of a linear layer), in the order of their first use. Groups are named after them.
    alone : dict of int to (ndarray, int)
        Factors that were combined with tensors without units along one of their dimensions, by identity; and how many
        ties were known at that time.
    single, pooled : list of ndarray
        Units that are read one by one, and units of which a mean is read.

    Parameters
    ----------
    folded : frozenset of str, optional
        Scales of norms that are folded, where rotations are asked for.
    """

    def __init__(self, folded: frozenset[str] | None = None) -> None:
        self.folded = folded
        self.single: list[Atoms] = []
        self.pooled: list[Atoms] = []
        self.size = 0
        self.starts: list[int] = []
        self.axes: dict[AxisKey, Atoms] = {}
        self.virtuals: dict[str, Atoms] = {}
        self.diagonal: dict[str, int] = {}
        self.written: set[str] = set()
        self.outputs: dict[AxisKey, None] = {}
        self.ties: list[tuple[Atoms, Atoms]] = []
        self.relations: list[tuple[Atoms, Atoms]] = []
        self.sets: dict[bytes, Atoms] = {}
        self.pins: list[tuple[Atoms, Cause]] = []
        self.alone: dict[int, tuple[Atoms, int]] = {}
        self.operator = ""
        self.module = ""
        self._blocks: dict[tuple[bytes, int], Atoms] = {}
        self._places: dict[tuple[bytes, tuple[int, ...]], Atoms] = {}

    def fresh(self, *shape: int) -> Atoms:
        """New atoms, about which no fact is known."""
        count = int(np.prod(shape, dtype=np.int64))
        self.starts.append(self.size)
        self.size += count
        return np.arange(self.size - count, self.size, dtype=np.int64).reshape(shape)

    def axis(self, tensor: str, axis: int, length: int) -> Atoms:
        """Atoms of a parameter axis, shape (length,), made on the first call."""
        if (tensor, axis) not in self.axes:
            self.axes[tensor, axis] = self.fresh(length)
        return self.axes[tensor, axis]

    def virtual(self, tensor: str, blocks: int, width: int) -> Atoms | None:
        """Atoms of the virtual axis 1 of a block-diagonal weight, shape (blocks, width).

        None if the same tensor is already used with another number of blocks.
        """
        if self.diagonal.get(tensor, blocks) != blocks:
            return None
        if tensor not in self.diagonal:
            self.diagonal[tensor] = blocks
            self.virtuals[tensor] = self.fresh(blocks * width)
        return self.virtuals[tensor].reshape(blocks, width)

    def places(self) -> dict[AxisKey, Atoms]:
        """Atoms of all axes as a spec describes them: axis 1 of a block-diagonal weight is the virtual one."""
        return {**self.axes, **{(tensor, 1): atoms for tensor, atoms in self.virtuals.items()}}

    def tie(self, a: Atoms, b: Atoms) -> None:
        """State that the units of two broadcastable arrays are the same, coordinate by coordinate."""
        if a is not b:
            a, b = np.broadcast_arrays(a, b)
            self.ties.append((a.ravel(), b.ravel()))

    def relate(self, children: Atoms, parents: Atoms) -> None:
        """State that every unit of `children` lies in the block `parents` of the same coordinate."""
        children, parents = np.broadcast_arrays(children, parents)
        self.relations.append((children.ravel(), parents.ravel()))

    def gather(self, atoms: Atoms) -> None:
        """State that these units are a set: they are the arguments of a symmetric function."""
        flat = np.ascontiguousarray(atoms).ravel()
        self.sets.setdefault(flat.tobytes(), flat)

    def blocks(self, rows: Atoms) -> Atoms:
        """Blocks, shape (n,), that hold the units of each of the n rows; equal rows are one block."""
        rows = np.ascontiguousarray(rows)
        key = (rows.tobytes(), rows.shape[0])
        if key not in self._blocks:
            unique, inverse = np.unique(rows, axis=0, return_inverse=True)
            parents = self.fresh(len(unique))[inverse.reshape(-1)]
            self.relate(rows, parents[:, None])
            self._blocks[key] = parents
        return self._blocks[key]

    def places_of(self, factor: Atoms) -> Atoms:
        """The same array if no atom repeats, apart from equal slices; otherwise new atoms, which lie in its atoms.

        Slices along a dimension that are equal share their atoms.
        """
        key = (factor.tobytes(), factor.shape)
        if key not in self._places:
            distinct, back = factor, []
            for dim in range(factor.ndim):
                _, first, inverse = np.unique(distinct, axis=dim, return_index=True, return_inverse=True)
                distinct = np.take(distinct, first, axis=dim)
                back.append(inverse.reshape(-1))
            if len(np.unique(distinct)) == distinct.size:
                self._places[key] = factor
            else:
                places = self.fresh(*distinct.shape)
                self.relate(places, distinct)
                self._places[key] = places[np.ix_(*back)]
        return self._places[key]

    def pin(self, atoms: Atoms, reason: str) -> None:
        """State that these units stay where they are."""
        self.pins.append((np.ascontiguousarray(atoms).ravel(), Cause(reason, self.operator, self.module)))

    def read_singly(self, atoms: Atoms) -> None:
        """State that these units are read one by one by an operator that is not linear in them."""
        self.single.append(atoms.ravel())

    def pool(self, atoms: Atoms) -> None:
        """State that a mean over these units is read."""
        self.pooled.append(atoms.ravel())
