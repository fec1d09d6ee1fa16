"""A permutation spec in words: its groups, how much of the network they move, and every pin with its reason."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Mapping
from math import prod
from typing import Protocol

import numpy as np

from c2m3_fl.core.axes import Group, Pin, TensorSpec

_WIDTH = 116
_MEMBERS = 4  # members shown per group; `PermutationSpec.members` has them all


class Described(Protocol):
    """What a description reads of a `PermutationSpec`, which can itself be described."""

    @property
    def groups(self) -> Mapping[str, Group]:
        """The groups of interchangeable units."""
        ...

    @property
    def tensors(self) -> Mapping[str, TensorSpec]:
        """The tensors of the state dict."""
        ...

    @property
    def pins(self) -> tuple[Pin, ...]:
        """The axes that stay where they are."""
        ...

    @property
    def roots(self) -> tuple[str, ...]:
        """The groups without a parent."""
        ...

    def children(self, parent: str) -> tuple[str, ...]:
        """The groups nested in a group."""
        ...

    def members(self, group: str) -> tuple[tuple[str, int], ...]:
        """Where the units of a group are."""
        ...


def coverage(spec: Described) -> float:
    """Share of the entries of all parameters (buffers apart) that some permutation moves; 1 for no parameters."""
    sizes = [(prod(tensor.shape), _moved(tensor)) for tensor in spec.tensors.values() if not tensor.buffer]
    total = sum(size for size, _ in sizes)
    return sum(moved for _, moved in sizes) / total if total else 1.0


def _moved(tensor: TensorSpec) -> int:
    """Number of entries on at least one permuted coordinate."""
    if tensor.diagonal > 1:
        # Rows and virtual columns belong to the same blocks: if columns move in a block, count that block's entries.
        still = np.ones((tensor.diagonal, tensor.shape[0] // tensor.diagonal, tensor.shape[1]), dtype=bool)
        for axis, segment in tensor.segments:
            block, place = np.divmod(segment.positions.ravel(), still.shape[1] if axis == 0 else still.shape[2])
            if axis == 0:
                still[block, place] = False
            elif axis == 1:
                still[block, :, place] = False
        rest = [_stays(tensor, axis) for axis in range(2, len(tensor.shape))]
        return prod(tensor.shape) - int(still.sum()) * prod(rest)
    return prod(tensor.shape) - prod(_stays(tensor, axis) for axis in range(len(tensor.shape)))


def _stays(tensor: TensorSpec, axis: int) -> int:
    return tensor.shape[axis] - sum(segment.positions.size for segment in tensor.axes[axis])


def describe(spec: Described) -> str:
    """Readable text, one line per group and one paragraph per reason of a pin."""
    total = sum(prod(tensor.shape) for tensor in spec.tensors.values() if not tensor.buffer)
    nested = sum(group.parent is not None for group in spec.groups.values())
    count = len(spec.groups)
    head = (
        f"{count} group{'' if count == 1 else 's'}{f' ({nested} nested)' if nested else ''}; "
        f"permutations {'and rotations ' if any(group.orthogonal for group in spec.groups.values()) else ''}"
        f"move {100 * coverage(spec):.2f} % of {total:,} parameters"
    )
    return "\n".join([head, *_groups(spec), *_pins(spec.pins)])


def _groups(spec: Described) -> Iterable[str]:
    if not spec.groups:
        return
    width = max(len("group"), *(len(name) + 2 * (group.parent is not None) for name, group in spec.groups.items()))
    kinds = max((len(group.kind) + 2 for group in spec.groups.values()), default=0)
    kinds = kinds if any(group.orthogonal for group in spec.groups.values()) else 0  # all are permutations
    yield f"\n{'group':<{width}}  {'units':>6}  {'kind' if kinds else '':<{kinds}}members"
    for root in spec.roots:
        for name in (root, *spec.children(root)):
            group = spec.groups[name]
            label = name if group.parent is None else f"  {name}"
            units = (
                f"{group.size}"
                if group.parent is None
                else f"{spec.groups[root].size}x{group.size // spec.groups[root].size}"
            )
            yield f"{label:<{width}}  {units:>6}  {group.kind if kinds else '':<{kinds}}{_members(spec, name)}"


def _members(spec: Described, name: str) -> str:
    places = [f"{tensor}:{axis}" for tensor, axis in dict.fromkeys(spec.members(name))]
    if not places:
        return "(blocks of " + ", ".join(spec.children(name)) + ")"
    more = f", and {len(places) - _MEMBERS} more" if len(places) > _MEMBERS else ""
    return ", ".join(places[:_MEMBERS]) + more


def _pins(pins: Iterable[Pin]) -> Iterable[str]:
    """Pins by reason; where modules differ, the operator's module path follows the axis."""
    reasons: dict[tuple[str, str], dict[tuple[str, str], list[int]]] = {}
    for pin in pins:
        places = reasons.setdefault((pin.reason, pin.operator), {})
        places.setdefault((pin.tensor, pin.module), []).append(pin.axis)
    for (reason, operator), places in reasons.items():
        yield f"\npinned: {reason}{f' ({operator})' if operator else ''}"
        text = "; ".join(
            f"{tensor}:{','.join(map(str, axes))}{f' in {module}' if module and not tensor.startswith(module) else ''}"
            for (tensor, module), axes in places.items()
        )
        yield from textwrap.wrap(text, _WIDTH, initial_indent="  ", subsequent_indent="  ", break_on_hyphens=False)
