"""Tensors that share memory without being one object: views, transposes and slices of one parameter."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import combinations
from math import prod

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

Places = npt.NDArray[np.int64]
_COUNTED = 2**22  # entries; more are not compared one by one: their axes count as unrelated


@dataclass(frozen=True, eq=False)
class Overlap:
    """Two tensors with common entries in memory.

    Attributes
    ----------
    first, second : str
        Their names.
    axes : tuple of (int, ndarray, int, ndarray), optional
        The common entries, axis by axis: an axis of the first tensor, coordinates on it, the axis of the second that
        runs along it, and the corresponding coordinates. An axis of -1 stands for none: the other tensor has one
        coordinate. None if the common entries are not a product of coordinates.
    """

    first: str
    second: str
    axes: tuple[tuple[int, Places, int, Places], ...] | None


def overlaps(tensors: Mapping[str, Tensor]) -> list[Overlap]:
    """All pairs of different objects that share entries in memory.

    Parameters
    ----------
    tensors : mapping of str to Tensor
        Tensors by name; one object under two names is left out.
    """
    held: dict[tuple[torch.device, int], dict[int, tuple[str, Tensor]]] = {}
    for name, value in tensors.items():
        if value.layout == torch.strided and value.numel() and value.device.type != "meta":
            place = (value.device, value.untyped_storage().data_ptr())
            held.setdefault(place, {}).setdefault(id(value), (name, value))
    pairs = [pair for group in held.values() for pair in combinations(group.values(), 2)]
    return [found for (first, a), (second, b) in pairs for found in _overlap(first, a, second, b)]


def sharing(model: nn.Module) -> frozenset[str]:
    """State-dict names of the parameters and buffers that share entries with another one."""
    return frozenset(name for found in overlaps(named_tensors(model)) for name in (found.first, found.second))


def named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by their names; tied ones under each of theirs."""
    return {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers(remove_duplicate=False))}


def _overlap(first: str, a: Tensor, second: str, b: Tensor) -> Iterator[Overlap]:
    if b.storage_offset() < a.storage_offset():
        for found in _overlap(second, b, first, a):
            axes = None if found.axes is None else tuple((d, places, c, own) for c, own, d, places in found.axes)
            yield Overlap(first, second, axes)
        return
    if a.element_size() != b.element_size() or b.storage_offset() > _last(a):
        if a.element_size() != b.element_size():
            yield Overlap(first, second, None)
        return
    axes = _axes(a, b)
    inside = axes is not None and all(len(own) == b.shape[right] for _, own, right, _ in axes if right >= 0)
    if inside:
        yield Overlap(first, second, axes)
    elif max(a.numel(), b.numel()) > _COUNTED:
        yield Overlap(first, second, None)
    elif common := len(np.intersect1d(_addresses(a), _addresses(b))):
        exact = axes is not None and prod(len(own) for _, own, _, _ in axes) == common
        yield Overlap(first, second, axes if exact else None)


def _last(x: Tensor) -> int:
    return int(x.storage_offset()) + sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))


def _addresses(x: Tensor) -> Places:
    found = np.full((1,) * x.ndim, x.storage_offset(), dtype=np.int64)
    for dim, (size, stride) in enumerate(zip(x.shape, x.stride(), strict=True)):
        found = found + (np.arange(size) * stride).reshape([-1 if other == dim else 1 for other in range(x.ndim)])
    return found.ravel()


def _axes(a: Tensor, b: Tensor) -> tuple[tuple[int, Places, int, Places], ...] | None:
    """Correspondence of coordinates, if every axis of `b` runs along one of `a`, which starts before."""
    own = sorted(((a.stride(dim), dim) for dim in range(a.ndim) if a.shape[dim] > 1), reverse=True)
    spans = [stride * a.shape[dim] for stride, dim in own]
    if not own or own[-1][0] == 0 or any(stride < span for (stride, _), span in zip(own, spans[1:], strict=False)):
        return None  # entries of `a` share memory among themselves
    runs = {}
    for dim in range(b.ndim):
        if b.shape[dim] > 1:
            along = next((axis for stride, axis in own if stride and b.stride(dim) % stride == 0), None)
            if along is None or along in runs:
                return None
            runs[along] = dim
    rest, found = int(b.storage_offset()) - int(a.storage_offset()), []
    for stride, axis in own:
        start, rest = divmod(rest, stride)
        dim = runs.get(axis, -1)
        step, count = (b.stride(dim) // stride, b.shape[dim]) if dim >= 0 else (1, 1)
        if step == 0:
            return None
        places = np.arange(count, dtype=np.int64)
        inside = places[start + step * places < a.shape[axis]]
        found.append((axis, start + step * inside, dim, inside))
    return None if rest else tuple(found)
