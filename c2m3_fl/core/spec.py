"""What may be permuted: groups of interchangeable units and where they sit in a network's tensors.

A *group* is a set of interchangeable units; all axes that carry the same neurons share it. An axis
of a tensor is described by its *segments*: for each unit of a group, the positions of that unit on the
axis. A coordinate outside all segments belongs to no unit and never moves (pixels, classes).

    linear row axis            Segment.contiguous("fc1", 256)
    columns after a flatten    Segment.contiguous("conv2", 64, inner=49)    # 64 channels of 7 x 7
    DenseNet input axis        (contiguous("a", 64), contiguous("b", 32, offset=64), ...)
    gates of an LSTM           positions[u] = (u, H + u, 2 H + u, 3 H + u)

A group with a *parent* is nested: it has ``parent.size`` blocks of equally many units, ordered block by
block, and may move a block only as its parent moves (attention heads with permutable inner dimensions).

The slots of a segment's units may be units of a second group, ordered inside each of them alike: the rows of a
projection to queries move by the query heads and, inside all heads that share a key, by that key's dimensions.

A group is *orthogonal* where its units are coordinates that may be rotated (residual streams, the inside of heads).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from c2m3_fl.core.axes import KINDS, Axis, Group, Pin, Segment, TensorSpec
from c2m3_fl.core.describe import describe
from c2m3_fl.errors import ConfigError, ParamsError, SpecError

__all__ = ["Axis", "Group", "Params", "PermutationSpec", "Pin", "Segment", "TensorSpec", "floating"]

Params = Mapping[str, Tensor]


@dataclass(frozen=True)
class PermutationSpec:
    """The permutation symmetries of a network.

    Attributes
    ----------
    groups : mapping of str to Group
        The groups of units that move together.
    tensors : mapping of str to TensorSpec
        One entry for every tensor of the state dict, in its order.
    pins : tuple of Pin
        The axes that no rule covers, with the reason.
    proven : tuple of str
        Modes and batch sizes of the network in which the groups were proven; specs that differ in it are equal.

    Raises
    ------
    SpecError
        When a segment names an unknown group, disagrees with its group's size, leaves the axis or
        overlaps another segment, when a nested group does not divide into its parent's blocks, or when an orthogonal
        group is the parent of another one, has slots that are units, or lies on a block-diagonal tensor.
    """

    groups: Mapping[str, Group]
    tensors: Mapping[str, TensorSpec]
    pins: tuple[Pin, ...] = field(default=())
    proven: tuple[str, ...] = field(default=(), compare=False)

    def __post_init__(self) -> None:
        for name, group in self.groups.items():
            _check_group(self.groups, name, group)
        for name, tensor in self.tensors.items():
            _check_tensor(self.groups, name, tensor)

    def __str__(self) -> str:
        return describe(self)

    def children(self, parent: str) -> tuple[str, ...]:
        """Names of the groups nested in `parent`."""
        return self._children.get(parent, ())

    @cached_property
    def _children(self) -> dict[str, tuple[str, ...]]:
        """The groups nested in every group that has any."""
        found: dict[str, tuple[str, ...]] = {}
        for name, group in self.groups.items():
            if group.parent is not None:
                found[group.parent] = (*found.get(group.parent, ()), name)
        return found

    @property
    def rotations(self) -> tuple[str, ...]:
        """Names of the groups that are orthogonal."""
        return tuple(name for name, group in self.groups.items() if group.orthogonal)

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


def refuse_rotations(spec: PermutationSpec, who: str) -> None:
    """Raise `SpecError` naming an orthogonal group of the spec, for what handles permutations alone."""
    if spec.rotations:
        name = spec.rotations[0]
        raise SpecError(
            f"{who}: group {name!r} is {spec.groups[name].kind}, expected permutations; use a spec without rotations, "
            "which is derived where rotations=True is left out"
        )


def check_rotations(spec: PermutationSpec, *, rotations: bool) -> None:
    """Raise `ConfigError` where rotations are asked for beside a spec that has none."""
    if rotations and not spec.rotations:
        raise ConfigError(
            "the given spec has permutations alone; derive it by permutation_spec(..., rotations=True), or leave out "
            "one of spec and rotations"
        )


def _check_group(groups: Mapping[str, Group], name: str, group: Group) -> None:
    if group.kind not in KINDS:
        raise SpecError(f"group {name!r} is of kind {group.kind!r}, expected one of {list(KINDS)}")
    if group.size < 1:
        raise SpecError(f"group {name!r} has {group.size} units, expected at least one")
    if group.parent is None:
        return
    if group.parent not in groups:
        raise SpecError(f"group {name!r}: its parent {group.parent!r} is not among the groups")
    parent = groups[group.parent]
    if parent.parent is not None:
        raise SpecError(f"group {name!r}: its parent {group.parent!r} is itself nested; one level is supported")
    if parent.orthogonal:
        raise SpecError(
            f"group {name!r}: its parent {group.parent!r} is {parent.kind}, expected permutations of blocks"
        )
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
            if tensor.diagonal > 1 and any(groups[each].orthogonal for each in segment.groups if each in groups):
                raise SpecError(f"{where} is block-diagonal, where groups permute; pin the axis")
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
    if groups[segment.group].orthogonal:
        raise SpecError(f"{where} is orthogonal, so that its slots cannot be units of {segment.slots!r}")
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
