"""Pin a whole group of a spec, with whatever is nested in it."""

from __future__ import annotations

from dataclasses import replace

from c2m3_fl.core.spec import Axis, PermutationSpec, Pin, Segment, TensorSpec


def without(spec: PermutationSpec, group: str, reason: str) -> PermutationSpec:
    """The same spec with one group pinned.

    If `group` is nested, its units still move with their blocks. Groups nested in `group` are pinned with it.
    """
    if group not in spec.groups:
        return spec
    for child in spec.children(group):
        spec = without(spec, child, reason)
    parent = spec.groups[group].parent
    pins = tuple(Pin(tensor, axis, reason) for tensor, axis in spec.members(group))
    groups = {name: value for name, value in spec.groups.items() if name != group}
    tensors = {name: _freed(value, group, parent, spec) for name, value in spec.tensors.items()}
    return replace(spec, groups=groups, tensors=tensors, pins=spec.pins + pins)


def _freed(tensor: TensorSpec, group: str, parent: str | None, spec: PermutationSpec) -> TensorSpec:
    def axis(segments: Axis) -> Axis:
        kept = []
        for segment in segments:
            if group not in segment.groups:
                kept.append(segment)
            elif segment.slots == group:
                kept.append(replace(segment, slots=""))
            elif segment.slots:
                kept.append(_by_slots(segment, spec.groups[segment.slots].size))
            elif parent is not None:
                kept.append(Segment(parent, segment.positions.reshape(spec.groups[parent].size, -1)))
        return tuple(kept)

    return replace(tensor, axes=tuple(axis(segments) for segments in tensor.axes))


def _by_slots(segment: Segment, size: int) -> Segment:
    """The same coordinates as units of the group of the slots alone, which has `size` units."""
    blocks = segment.positions.reshape(size // segment.inner, -1, segment.inner)
    return Segment(segment.slots, blocks.swapaxes(1, 2).reshape(size, -1))
