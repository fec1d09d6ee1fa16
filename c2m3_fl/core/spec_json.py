"""Permutation specs as JSON, so that a server traces a network once."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from c2m3_fl.core.spec import Axis, Group, PermutationSpec, Pin, Segment, TensorSpec
from c2m3_fl.errors import SpecError

_FORMAT = "c2m3-fl permutation spec 2"
_READABLE = ("c2m3-fl permutation spec 1", _FORMAT)  # the first had no slots that are units


def to_json(spec: PermutationSpec) -> str:
    """Text from which `from_json` restores an equal spec."""
    document = {
        "format": _FORMAT,
        "groups": {name: {"size": group.size, "parent": group.parent} for name, group in spec.groups.items()},
        "tensors": {name: _pack_tensor(tensor) for name, tensor in spec.tensors.items()},
        "pins": [[pin.tensor, pin.axis, pin.reason, pin.operator, pin.module] for pin in spec.pins],
    }
    return json.dumps(document, separators=(",", ":"))


def from_json(text: str) -> PermutationSpec:
    """Restore a spec that `to_json` wrote, with all its checks.

    Raises
    ------
    SpecError
        When the text is not such a document, or the spec in it contradicts itself.
    """
    try:
        document = json.loads(text)
    except json.JSONDecodeError as error:
        raise SpecError(f"not a permutation spec: {error}; expected JSON written by to_json") from error
    if not isinstance(document, dict) or document.get("format") not in _READABLE:
        found = document.get("format") if isinstance(document, dict) else type(document).__name__
        raise SpecError(f"not a permutation spec: format {found!r}, expected {_FORMAT!r}")
    try:
        groups = {name: Group(entry["size"], entry["parent"]) for name, entry in document["groups"].items()}
        tensors = {name: _unpack_tensor(entry, groups) for name, entry in document["tensors"].items()}
        pins = tuple(Pin(*entry) for entry in document["pins"])
    except (KeyError, TypeError, ValueError) as error:
        raise SpecError(f"not a permutation spec: malformed entry ({type(error).__name__}: {error})") from error
    return PermutationSpec(groups, tensors, pins)


def save_spec(spec: PermutationSpec, path: str | Path) -> None:
    """Write a spec as JSON."""
    Path(path).write_text(to_json(spec), encoding="utf-8")


def load_spec(path: str | Path) -> PermutationSpec:
    """Read a spec that `save_spec` wrote."""
    return from_json(Path(path).read_text(encoding="utf-8"))


def _pack_tensor(tensor: TensorSpec) -> dict[str, Any]:
    packed: dict[str, Any] = {"shape": tensor.shape, "axes": [[_pack(one) for one in axis] for axis in tensor.axes]}
    if tensor.buffer:
        packed["buffer"] = True
    if tensor.diagonal > 1:
        packed["diagonal"] = tensor.diagonal
    return packed


def _unpack_tensor(packed: Mapping[str, Any], groups: Mapping[str, Group]) -> TensorSpec:
    axes: tuple[Axis, ...] = tuple(tuple(_unpack(one, groups) for one in axis) for axis in packed["axes"])
    return TensorSpec(tuple(packed["shape"]), axes, packed.get("buffer", False), packed.get("diagonal", 1))


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


def _unpack(packed: Mapping[str, Any], groups: Mapping[str, Group]) -> Segment:
    name, inner = packed["group"], packed["inner"]
    if not isinstance(inner, int) or inner < 1:
        raise SpecError(f"a segment of group {name!r} has inner {inner!r}, expected a whole number, at least 1")
    if "positions" in packed:
        positions = np.array(packed["positions"], dtype=np.int64).reshape(-1, inner)
    elif name not in groups:
        raise SpecError(f"a segment names the group {name!r}, which the document does not define")
    else:
        positions = Segment.contiguous(name, groups[name].size, inner=inner, offset=packed["offset"]).positions
    return Segment(name, positions, packed.get("slots", ""))
