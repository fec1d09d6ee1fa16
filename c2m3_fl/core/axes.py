"""Groups of units that move together, where they sit on the axes of a tensor, and axes that nothing may move."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt

Kind = Literal["permutation", "orthogonal", "centred"]
KINDS: tuple[Kind, ...] = get_args(Kind)


@dataclass(frozen=True)
class Group:
    """A set of units, and what may be done with them.

    Attributes
    ----------
    size : int
        Number of units that the group's permutation or rotation moves.
    parent : str, optional
        Name of the group whose blocks these units fill: units ``h * block … (h + 1) * block - 1``
        belong to unit ``h`` of the parent, with ``block = size / parent.size``.
    kind : {"permutation", "orthogonal", "centred"}
        What leaves the network's function unchanged: permutations of the units; every orthogonal matrix, where the
        units are coordinates of a space that is read by linear operators alone; or the orthogonal matrices that fix
        the vector of ones, where a mean over the units is taken off as well (LayerNorm). Those of a nested group act
        inside the blocks, which the parent's permutation moves.
    """

    size: int
    parent: str | None = None
    kind: Kind = "permutation"

    @property
    def orthogonal(self) -> bool:
        """Whether the units are coordinates that rotate, instead of things that change places."""
        return self.kind != "permutation"


@dataclass(frozen=True, eq=False)
class Segment:
    """Where the units of one group sit on one axis.

    Attributes
    ----------
    group : str
        The group's name.
    positions : ndarray of int64, shape (size, inner)
        ``positions[u, s]`` is the coordinate of slot ``s`` of unit ``u``. All slots of a unit move together.
    slots : str
        A second group that the slots themselves are units of, or "": slot s of unit u is unit s of the block that
        holds u (of the whole group where neither has a parent). Both groups have the same parent, or none.
    """

    group: str
    positions: npt.NDArray[np.int64]
    slots: str = ""

    @classmethod
    def contiguous(cls, group: str, size: int, *, inner: int = 1, offset: int = 0) -> Segment:
        """Segment of `size` units of `inner` neighbouring coordinates each, from coordinate `offset`."""
        start = offset + inner * np.arange(size, dtype=np.int64)[:, None]
        return cls(group, start + np.arange(inner, dtype=np.int64))

    @property
    def size(self) -> int:
        """Number of units."""
        return int(self.positions.shape[0])

    @property
    def inner(self) -> int:
        """Number of coordinates per unit."""
        return int(self.positions.shape[1])

    @property
    def groups(self) -> tuple[str, ...]:
        """The groups that move these coordinates: one, or two where the slots are units as well."""
        return (self.group, self.slots) if self.slots else (self.group,)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Segment):
            return NotImplemented
        same = self.groups == other.groups
        return same and np.array_equal(self.positions, other.positions)

    def __hash__(self) -> int:
        return hash((self.groups, self.positions.shape))


Axis = tuple[Segment, ...]


@dataclass(frozen=True)
class TensorSpec:
    """How one tensor of the state dict moves.

    Attributes
    ----------
    shape : tuple of int
        The tensor's shape.
    axes : tuple of Axis
        The segments of every axis; an empty tuple is an axis that never moves.
    buffer : bool
        Buffers (BatchNorm statistics) are permuted and averaged but are no part of the objective; fixed tables
        (positions added to a stream) are a part like parameters, ``buffer=False``.
    diagonal : int
        For ``diagonal = g > 1`` the tensor stands for the diagonal blocks of a block-diagonal one, as the
        weight of a grouped convolution does: axis 0 holds g blocks of rows, and the segments of axis 1
        name coordinates of the *virtual* axis of length ``g * shape[1]``, block after block.
    """

    shape: tuple[int, ...]
    axes: tuple[Axis, ...]
    buffer: bool = False
    diagonal: int = 1

    def length(self, axis: int) -> int:
        """Length of an axis; of the virtual one where the tensor is block-diagonal."""
        return self.shape[axis] * (self.diagonal if axis == 1 else 1)

    @property
    def segments(self) -> Iterator[tuple[int, Segment]]:
        """All ``(axis, segment)`` pairs."""
        return ((axis, segment) for axis, segments in enumerate(self.axes) for segment in segments)


@dataclass(frozen=True)
class Pin:
    """An axis, or part of it, that stays where it is, and why.

    Attributes
    ----------
    tensor : str
        Name in the state dict.
    axis : int
        The axis that holds the pinned coordinates.
    reason : str
        Why no permutation is allowed ("network input", "no rule for aten.foo", "fails the numerical proof").
    operator : str
        The ATen operator that pinned it, or "".
    module : str
        Path of the module that called the operator, or "".
    """

    tensor: str
    axis: int
    reason: str
    operator: str = ""
    module: str = ""
