"""Permutations and rotations for the numerical proof: of all groups, of some, and of one axis alone."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from c2m3_fl.core.permutation import Permutation, apply_to_tensor, axis_index, identity, random
from c2m3_fl.core.rotation import random_matrix
from c2m3_fl.core.spec import PermutationSpec, TensorSpec
from c2m3_fl.errors import SpecError

Carrier = tuple[str, int]  # a tensor and one of its axes


def stirring(spec: PermutationSpec, generator: torch.Generator) -> dict[str, Tensor]:
    """A random permutation or rotation that is not the identity on any group, however small."""
    perm = random(spec, generator)
    for name in spec.roots:
        if not spec.groups[name].orthogonal and torch.equal(perm[name], torch.arange(len(perm[name]))):
            perm[name] = perm[name].roll(1)
    for name, group in spec.groups.items():
        if group.parent is not None and group.orthogonal:
            perm[name] = random_matrix(group, perm[group.parent], generator)
        elif group.parent is not None:
            outer = perm[group.parent]
            inner = (perm[name] % (group.size // len(outer))).reshape(len(outer), -1)
            if bool((inner == torch.arange(inner.shape[1])).all()):
                inner = inner.roll(1, dims=1)
            perm[name] = (outer[:, None] * inner.shape[1] + inner).reshape(-1)
    return perm


def restrict(spec: PermutationSpec, perm: Permutation, chosen: Collection[str]) -> dict[str, Tensor]:
    """The part of a permutation that moves the `chosen` groups only; other nested units follow their blocks."""
    result = identity(spec)
    for name in spec.roots:
        if name in chosen:
            result[name] = perm[name]
    for name, group in spec.groups.items():
        if group.parent is None:
            continue
        block = group.size // spec.groups[group.parent].size
        outer = result[group.parent]
        if group.orthogonal:
            result[name] = _follow(perm[name] if name in chosen else result[name], outer)
            continue
        inner = (perm[name] % block).reshape(-1, block) if name in chosen else torch.arange(block)
        result[name] = (outer[:, None] * block + inner).reshape(-1)
    return result


def _follow(matrix: Tensor, outer: Tensor) -> Tensor:
    """The matrix with the same rotation in every block, and blocks that move as `outer` says."""
    count = len(outer)
    inside = matrix.reshape(count, len(matrix) // count, count, -1).sum(2)  # one block of each row is not zero
    whole = matrix.new_zeros(count, inside.shape[1], count, inside.shape[1])
    whole[torch.arange(count), :, outer] = inside
    return whole.reshape(matrix.shape)


def places(spec: PermutationSpec) -> dict[str, list[Carrier]]:
    """The axes that carry units of each group, or of what is nested in it."""
    found: dict[str, dict[Carrier, None]] = {name: {} for name in spec.groups}
    for tensor, value in spec.tensors.items():
        for axis, segment in value.segments:
            for name in segment.groups:
                for holder in (name, spec.groups[name].parent):
                    if holder is not None:
                        found[holder][tensor, axis] = None
    return {name: list(held) for name, held in found.items()}


@dataclass(frozen=True)
class Move:
    """A permutation of one axis of a tensor alone.

    Attributes
    ----------
    spec : TensorSpec
        The tensor, with segments of the moving groups on that axis only.
    axis : int
        The axis.
    perm : mapping of str to Tensor
        The permutation.
    places, sources : Tensor
        The coordinates that change, and those that their entries come from.
    """

    spec: TensorSpec
    axis: int
    perm: Permutation
    places: Tensor
    sources: Tensor

    def apply(self, value: Tensor, whole: TensorSpec) -> Tensor:
        """The tensor after the move; where diagonal blocks move as wholes, rows and columns move together."""
        try:
            return apply_to_tensor(self.spec, self.perm, value)
        except SpecError:
            return apply_to_tensor(whole, self.perm, value)

    def change(self, value: Tensor, gradient: Tensor, whole: TensorSpec) -> float:
        """The sum of gradient times difference that the move makes."""
        if self.spec.diagonal > 1:
            return abs(float((gradient * (self.apply(value, whole) - value)).sum()))
        parts = [value.index_select(self.axis, index) for index in (self.sources, self.places)]
        return abs(float((gradient.index_select(self.axis, self.places) * (parts[0] - parts[1])).sum()))


def turned_alone(spec: PermutationSpec, carrier: Carrier, perm: Permutation, value: Tensor) -> Tensor:
    """A tensor of which one axis alone rotates."""
    whole = spec.tensors[carrier[0]]
    axes = tuple(axis if dim == carrier[1] else () for dim, axis in enumerate(whole.axes))
    return apply_to_tensor(replace(whole, axes=axes), perm, value)


def alone(spec: PermutationSpec, carrier: Carrier, groups: Collection[str], perm: Permutation) -> Move | None:
    """The part of a permutation of some groups that moves one axis; None if nothing moves there."""
    name, axis = carrier
    tensor = spec.tensors[name]
    moving = tuple(segment for segment in tensor.axes[axis] if not set(segment.groups).isdisjoint(groups))
    sources = axis_index(moving, tensor.length(axis), perm)
    places = (sources != torch.arange(len(sources))).nonzero()[:, 0]
    if not len(places):
        return None
    axes = tuple(moving if dim == axis else () for dim in range(len(tensor.axes)))
    return Move(replace(tensor, axes=axes), axis, perm, places, sources[places])
