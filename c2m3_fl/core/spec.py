"""What may be permuted: groups of interchangeable units and where they sit in a network's tensors.

A *group* is a set of interchangeable units that every axis carrying the same neurons shares. An axis
of a tensor is described by its *segments*: for each unit of a group, the positions of that unit on the
axis. A coordinate that no segment names belongs to no unit and never moves (pixels, classes).

    linear row axis            Segment.contiguous("fc1", 256)
    columns after a flatten    Segment.contiguous("conv2", 64, inner=49)    # 64 channels of 7 x 7
    DenseNet input axis        (contiguous("a", 64), contiguous("b", 32, offset=64), ...)
    gates of an LSTM           positions[u] = (u, H + u, 2 H + u, 3 H + u)

A group with a *parent* is nested: it has ``parent.size`` blocks of equally many units, ordered block by
block, and may move a block only as its parent moves (attention heads with permutable inner dimensions).

The slots of a segment's units may be units of a second group, ordered inside each of them alike: the rows of a
projection to queries move by the query heads and, inside all heads that share a key, by that key's dimensions.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from c2m3_fl.core.describe import describe
from c2m3_fl.errors import ParamsError, SpecError

Params = Mapping[str, Tensor]


@dataclass(frozen=True)
class Group:
    """A set of interchangeable units.

    Attributes
    ----------
    size : int
        Number of units that the group's permutation moves.
    parent : str, optional
        Name of the group whose blocks these units fill: units ``h * block … (h + 1) * block - 1``
        belong to unit ``h`` of the parent, with ``block = size / parent.size``.
    """

    size: int
    parent: str | None = None


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
        Buffers (BatchNorm statistics) are permuted and averaged but are no part of the objective.
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


@dataclass(frozen=True)
class PermutationSpec:
    """The permutation symmetries of a network.

    Attributes
    ----------
    groups : mapping of str to Group
        The groups of interchangeable units.
    tensors : mapping of str to TensorSpec
        One entry for every tensor of the state dict, in its order.
    pins : tuple of Pin
        The axes that no rule could prove permutable, with the reason.

    Raises
    ------
    SpecError
        When a segment names an unknown group, disagrees with its group's size, leaves the axis or
        overlaps another segment, or when a nested group does not divide into its parent's blocks.
    """

    groups: Mapping[str, Group]
    tensors: Mapping[str, TensorSpec]
    pins: tuple[Pin, ...] = field(default=())

    def __post_init__(self) -> None:
        for name, group in self.groups.items():
            _check_group(self.groups, name, group)
        for name, tensor in self.tensors.items():
            _check_tensor(self.groups, name, tensor)

    def __str__(self) -> str:
        return describe(self)

    def children(self, parent: str) -> tuple[str, ...]:
        """Names of the groups nested in `parent`."""
        return tuple(name for name, group in self.groups.items() if group.parent == parent)

    @property
    def roots(self) -> tuple[str, ...]:
        """Names of the groups that have no parent."""
        return tuple(name for name, group in self.groups.items() if group.parent is None)

    def members(self, group: str) -> tuple[tuple[str, int], ...]:
        """Every ``(tensor, axis)`` that carries units of `group`."""
        return tuple(
            (name, axis)
            for name, tensor in self.tensors.items()
            for axis, segment in tensor.segments
            if group in segment.groups
        )

    def check(self, params: Params, who: str = "state dict") -> None:
        """Raise `ParamsError` unless `params` is a state dict of exactly this spec's tensors, with their shapes."""
        if not isinstance(params, Mapping):
            raise ParamsError(f"{who}: is a {type(params).__name__}, expected a state dict; pass model.state_dict()")
        missing = [name for name in self.tensors if name not in params]
        extra = [name for name in params if name not in self.tensors]
        if missing or extra:
            raise ParamsError(
                f"{who}: keys differ from the spec's: missing {missing[:5]}, unexpected {extra[:5]}; "
                "pass the state dict of the network that the spec was derived from"
            )
        for name, tensor in self.tensors.items():
            if not isinstance(params[name], Tensor):
                raise ParamsError(f"{who}: {name!r} is a {type(params[name]).__name__}, expected a torch.Tensor")
            if tuple(params[name].shape) != tensor.shape:
                raise ParamsError(f"{who}: {name!r} has shape {tuple(params[name].shape)}, expected {tensor.shape}")


def _check_group(groups: Mapping[str, Group], name: str, group: Group) -> None:
    if group.size < 1:
        raise SpecError(f"group {name!r} has {group.size} units, expected at least one")
    if group.parent is None:
        return
    if group.parent not in groups:
        raise SpecError(f"group {name!r}: its parent {group.parent!r} is not among the groups")
    parent = groups[group.parent]
    if parent.parent is not None:
        raise SpecError(f"group {name!r}: its parent {group.parent!r} is itself nested; one level is supported")
    if group.size % parent.size:
        raise SpecError(
            f"group {name!r}: {group.size} units do not divide into the {parent.size} blocks of {group.parent!r}"
        )


def _check_tensor(groups: Mapping[str, Group], name: str, tensor: TensorSpec) -> None:
    if len(tensor.axes) != len(tensor.shape):
        raise SpecError(f"{name!r} has {len(tensor.shape)} axes, the spec describes {len(tensor.axes)}")
    if tensor.diagonal > 1 and (len(tensor.shape) < 2 or tensor.shape[0] % tensor.diagonal):
        raise SpecError(f"{name!r} of shape {tensor.shape} has no {tensor.diagonal} diagonal blocks")
    for axis, segments in enumerate(tensor.axes):
        taken = np.zeros(tensor.length(axis), dtype=np.int64)
        for segment in segments:
            where = f"group {segment.group!r}: {name!r} axis {axis}"
            if segment.group not in groups:
                raise SpecError(f"{where} names a group that the spec does not have")
            if segment.size != groups[segment.group].size:
                raise SpecError(f"{where} has {segment.size} units, expected {groups[segment.group].size}")
            if segment.slots:
                _check_slots(groups, segment, where)
            if segment.positions.min() < 0 or segment.positions.max() >= len(taken):
                raise SpecError(f"{where} reaches beyond the {len(taken)} coordinates of the axis")
            np.add.at(taken, segment.positions.ravel(), 1)
        if taken.max(initial=0) > 1:
            raise SpecError(f"{name!r} axis {axis}: coordinate {int(taken.argmax())} belongs to two units")


def _check_slots(groups: Mapping[str, Group], segment: Segment, where: str) -> None:
    if segment.slots not in groups or segment.slots == segment.group:
        raise SpecError(f"{where}: its slots are units of {segment.slots!r}, expected another group of the spec")
    parent = groups[segment.group].parent
    if groups[segment.slots].parent != parent:
        raise SpecError(f"{where}: its slots are units of {segment.slots!r}, which lies in other blocks")
    block = groups[segment.slots].size // (1 if parent is None else groups[parent].size)
    if segment.inner != block:
        raise SpecError(
            f"{where} has {segment.inner} slots per unit, expected the {block} units of a block of {segment.slots!r}"
        )


def floating(params: Params) -> list[str]:
    """Names of the floating-point tensors, in order: the ones that averaging and matching may touch."""
    return [name for name, tensor in params.items() if torch.is_floating_point(tensor)]
