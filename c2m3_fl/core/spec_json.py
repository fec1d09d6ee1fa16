"""Permutation specs as JSON, so that a server traces a network once."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from c2m3_fl.core.spec import Axis, Group, PermutationSpec, Pin, Segment, TensorSpec
from c2m3_fl.errors import SpecError

_FORMAT = "c2m3-fl permutation spec 2"
_ROTATING = "c2m3-fl permutation spec 3"  # with orthogonal groups, which readers of the second would permute
_LARGEST = 2**25  # units, and coordinates of all axes together: a quarter of a gigabyte in memory
_READABLE = ("c2m3-fl permutation spec 1", _FORMAT, _ROTATING)  # the first had no slots that are units


def to_json(spec: PermutationSpec) -> str:
    """Text from which `from_json` restores an equal spec."""
    document = {
        "format": _ROTATING if spec.rotations else _FORMAT,
        "groups": {name: _pack_group(group) for name, group in spec.groups.items()},
        "tensors": {name: _pack_tensor(tensor) for name, tensor in spec.tensors.items()},
        "pins": [[pin.tensor, pin.axis, pin.reason, pin.operator, pin.module] for pin in spec.pins],
        "proven": spec.proven,
    }
    return json.dumps(document, separators=(",", ":"))


def from_json(text: str) -> PermutationSpec:
    """Restore a spec that `to_json` wrote, with all its checks.

    Raises
    ------
    SpecError
        When the text is not such a document, the spec in it contradicts itself, or it is larger than any network's.
    """
    try:
        document = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise SpecError(f"not a permutation spec: {error}; expected JSON written by to_json") from error
    if not isinstance(document, dict) or document.get("format") not in _READABLE:
        found = document.get("format") if isinstance(document, dict) else type(document).__name__
        raise SpecError(f"not a permutation spec: format {found!r}, expected {_FORMAT!r}")
    try:
        groups = {name: _unpack_group(name, entry) for name, entry in document["groups"].items()}
        _check_sizes(groups, document["tensors"])
        tensors = {name: _unpack_tensor(name, entry, groups) for name, entry in document["tensors"].items()}
        pins = tuple(Pin(*entry) for entry in document["pins"])
        proven = tuple(str(each) for each in document.get("proven", ()))
        return PermutationSpec(groups, tensors, pins, proven)
    except SpecError:
        raise
    except (KeyError, IndexError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise SpecError(f"not a permutation spec: malformed entry ({type(error).__name__}: {error})") from error


def save_spec(spec: PermutationSpec, path: str | Path) -> None:
    """Write a spec as JSON."""
    Path(path).write_text(to_json(spec), encoding="utf-8")


def _pack_group(group: Group) -> dict[str, Any]:
    packed: dict[str, Any] = {"size": group.size, "parent": group.parent}
    return packed | {"kind": group.kind} if group.orthogonal else packed


def _pack_tensor(tensor: TensorSpec) -> dict[str, Any]:
    packed: dict[str, Any] = {"shape": tensor.shape, "axes": [[_pack(one) for one in axis] for axis in tensor.axes]}
    if tensor.buffer:
        packed["buffer"] = True
    if tensor.diagonal > 1:
        packed["diagonal"] = tensor.diagonal
    return packed


def _whole(value: object, what: str, least: int = 1) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise SpecError(f"{what} {value!r}, expected a whole number, at least {least}")
    return value


def _unpack_group(name: str, packed: Mapping[str, Any]) -> Group:
    size, parent = _whole(packed["size"], f"group {name!r} has size"), packed["parent"]
    if not isinstance(parent, str | None):
        raise SpecError(f"group {name!r} has parent {parent!r}, expected a name or nothing")
    return Group(size, parent, packed.get("kind", "permutation"))


def _check_sizes(groups: Mapping[str, Group], tensors: Mapping[str, Any]) -> None:
    """Refuse a document that is small and describes something huge, before memory is taken for it."""
    units = sum(group.size for group in groups.values())
    lengths = sum(
        _whole(length, f"{name!r} has a side of", 0) * (_whole(entry.get("diagonal", 1), f"{name!r} has diagonal"))
        for name, entry in tensors.items()
        for length in entry["shape"]
    )
    if max(units, lengths) > _LARGEST:
        raise SpecError(
            f"the document describes {units:,} units and axes of {lengths:,} coordinates in all, expected at most "
            f"{_LARGEST:,} of each"
        )


def _unpack_tensor(name: str, packed: Mapping[str, Any], groups: Mapping[str, Group]) -> TensorSpec:
    plain = TensorSpec(tuple(packed["shape"]), (), packed.get("buffer", False), packed.get("diagonal", 1))
    if len(packed["axes"]) != len(plain.shape):
        raise SpecError(f"{name!r} has {len(plain.shape)} axes, the document describes {len(packed['axes'])}")
    axes: tuple[Axis, ...] = tuple(
        tuple(_unpack(one, groups, plain.length(axis)) for one in segments)
        for axis, segments in enumerate(packed["axes"])
    )
    return replace(plain, axes=axes)


def _pack(segment: Segment) -> dict[str, Any]:
    """A segment; one of neighbouring coordinates by its first coordinate only."""
    packed: dict[str, Any] = {"group": segment.group, "inner": segment.inner}
    if segment.slots:
        packed["slots"] = segment.slots
    offset = int(segment.positions.flat[0])
    plain = Segment.contiguous(segment.group, segment.size, inner=segment.inner, offset=offset)
    if np.array_equal(segment.positions, plain.positions):
        return {**packed, "offset": offset}
    return {**packed, "positions": segment.positions.ravel().tolist()}


def _unpack(packed: Mapping[str, Any], groups: Mapping[str, Group], length: int) -> Segment:
    name = packed["group"]
    if name not in groups:
        raise SpecError(f"a segment names the group {name!r}, which the document does not define")
    size, inner = groups[name].size, _whole(packed["inner"], f"a segment of group {name!r} has inner")
    if size * inner > length:
        raise SpecError(f"a segment of group {name!r} has {size * inner:,} coordinates, its axis has {length:,}")
    if "positions" in packed:
        positions = np.array(packed["positions"], dtype=np.int64).reshape(-1, inner)
        return Segment(name, positions, packed.get("slots", ""))
    offset = _whole(packed["offset"], f"a segment of group {name!r} has offset", 0)
    if offset + size * inner > length:
        raise SpecError(f"a segment of group {name!r} ends at {offset + size * inner:,}, its axis at {length:,}")
    return Segment(name, Segment.contiguous(name, size, inner=inner, offset=offset).positions, packed.get("slots", ""))
