"""Compile state dicts to the terms of the agreement: one array for every tuple of groups.

The agreement is a sum over coordinates, so every tensor is cut along the segments of its axes, and all
cuts that are permuted by the same groups are concatenated. The result is one array per tuple of groups,

    no group      a constant
    (g,)          (nodes, C_g, R)             biases, norms, input and output layers
    (g, h)        (nodes, C_g, R, C_h)        inner layers; g = h for recurrent weights and residual streams
    (g, h, k)     (nodes, C_g, R, C_h, C_k)   and so on

where R is the product of all axes that no group permutes: inner slots of the units, kernels, inputs. With the
first group before R and the others after it, both contractions of the gradient are plain matrix products.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
import torch
from torch import Tensor

from c2m3_fl.core.spec import Axis, Params, PermutationSpec, Segment, TensorSpec

_AT_A_TIME = 1 << 20  # values of the nodes that are cut together, beside the terms that they become


@dataclass(frozen=True, eq=False)
class Term:
    """All parameters that are permuted by one tuple of groups.

    Attributes
    ----------
    groups : tuple of str
        The groups of the grouped axes; a group may occur on several.
    value : Tensor, shape (nodes, C_1, R, C_2, ..., C_k)
        The parameters of every node in that node's own order.
    """

    groups: tuple[str, ...]
    value: Tensor

    def dim(self, axis: int) -> int:
        """Dimension of `value` that holds grouped axis `axis`."""
        return 1 if axis == 0 else axis + 2


@dataclass(frozen=True)
class _Cut:
    """One segment of an axis (or the rest of it, ``groups=()``) as an index of shape (size * inner,)."""

    groups: tuple[str, ...]
    index: Tensor | None
    size: int
    inner: int


def matched_names(spec: PermutationSpec, nodes: Sequence[Params]) -> list[str]:
    """Names of the tensors in the agreement: floating-point tensors that are not buffers."""
    return [
        name
        for name, tensor in spec.tensors.items()
        if not tensor.buffer and 0 not in tensor.shape and all(torch.is_floating_point(node[name]) for node in nodes)
    ]


def working_dtype(nodes: Sequence[Params], names: Sequence[str]) -> torch.dtype:
    """The widest dtype of the matched tensors, at least float32."""
    dtype = torch.float32
    for node in nodes:
        for name in names:
            dtype = torch.promote_types(dtype, node[name].dtype)
    return dtype


def compile_terms(
    spec: PermutationSpec, nodes: Sequence[Params], scales: Mapping[str, float] | None = None
) -> list[Term]:
    """Cut and stack the nodes' tensors into terms.

    Parameters
    ----------
    spec : PermutationSpec
        The symmetries of the network.
    nodes : sequence of mappings of str to Tensor
        State dicts that fit the spec; not mutated.
    scales : mapping of str to float, optional
        Factor of every tensor's part of the agreement; one by default.
    """
    names = matched_names(spec, nodes)
    if not names:
        return []
    dtype, device = working_dtype(nodes, names), nodes[0][names[0]].device
    at_once = max(1, _AT_A_TIME // sum(nodes[0][name].numel() for name in names))
    if len(nodes) <= at_once:
        return [Term(groups, part) for groups, part in _cut(spec, names, nodes, scales, dtype, device)]
    whole: dict[tuple[str, ...], Tensor] = {}
    for first in range(0, len(nodes), at_once):
        for groups, part in _cut(spec, names, nodes[first : first + at_once], scales, dtype, device):
            if groups not in whole:
                whole[groups] = part.new_empty(len(nodes), *part.shape[1:])
            whole[groups][first : first + at_once] = part
    return [Term(groups, value) for groups, value in whole.items()]


def _cut(
    spec: PermutationSpec,
    names: Sequence[str],
    nodes: Sequence[Params],
    scales: Mapping[str, float] | None,
    dtype: torch.dtype,
    device: torch.device,
) -> Iterator[tuple[tuple[str, ...], Tensor]]:
    """Cut some nodes' tensors: per tuple of groups, in order, the parts that they move, side by side."""
    pieces: dict[tuple[str, ...], list[Tensor]] = {}
    for name in names:
        factor = 1.0 if scales is None else scales[name] ** 0.5
        value = torch.stack([node[name].detach().to(device=device, dtype=dtype) for node in nodes])
        for groups, piece in _pieces(spec, *densify(spec.tensors[name], value if factor == 1.0 else value * factor)):
            pieces.setdefault(groups, []).append(piece)
    for groups in sorted(pieces):
        parts = pieces.pop(groups)
        yield groups, parts[0].contiguous() if len(parts) == 1 else torch.cat(parts, dim=min(2, parts[0].ndim - 1))


def _pieces(spec: PermutationSpec, axes: tuple[Axis, ...], value: Tensor) -> list[tuple[tuple[str, ...], Tensor]]:
    """Cut a stacked tensor (nodes, *shape) into its products of segments, each in canonical layout."""
    cuts = [_cuts(axis, length) for axis, length in zip(axes, value.shape[1:], strict=True)]
    return [_canonical(spec, cell, value) for cell in product(*cuts)]


def _cuts(axis: Axis, length: int) -> list[_Cut]:
    cuts = [_segment_cut(segment, length) for segment in axis]
    free = np.ones(length, dtype=bool)
    for segment in axis:
        free[segment.positions.ravel()] = False
    rest = np.flatnonzero(free)
    if len(rest) or not axis:
        cuts.append(_Cut((), None if len(rest) == length else torch.from_numpy(rest), 1, len(rest)))
    return cuts


def _segment_cut(segment: Segment, length: int) -> _Cut:
    flat = segment.positions.ravel()
    whole = len(flat) == length and np.array_equal(flat, np.arange(length))
    return _Cut(segment.groups, None if whole else torch.from_numpy(flat), segment.size, segment.inner)


def _canonical(spec: PermutationSpec, cell: tuple[_Cut, ...], value: Tensor) -> tuple[tuple[str, ...], Tensor]:
    """One cell of a stacked tensor as (nodes, C_1, R, C_2, ...), with its groups sorted by name.

    Slots that are units of a second group get an axis of their own, with zeros for units of other blocks.
    """
    for dim, cut in enumerate(cell, start=1):
        if cut.index is not None:
            value = value.index_select(dim, cut.index.to(value.device))
    count = len(value)
    value = value.reshape(count, *(length for cut in cell for length in (cut.size, cut.inner)))
    for axis, cut in enumerate(cell):
        if len(cut.groups) > 1:
            value = _spread(value, 2 + 2 * axis, spec.groups[cut.groups[1]].size)
    grouped = sorted((group, 1 + 2 * axis + i) for axis, cut in enumerate(cell) for i, group in enumerate(cut.groups))
    dims = [dim for _, dim in grouped]
    rest = [dim for dim in range(1, value.ndim) if dim not in dims]
    sizes = [value.shape[dim] for dim in dims]
    value = value.permute(0, *dims[:1], *rest, *dims[1:])
    return tuple(group for group, _ in grouped), value.reshape(count, *sizes[:1], -1, *sizes[1:])


def _spread(value: Tensor, dim: int, size: int) -> Tensor:
    """Scatter the slots on `dim` to an axis of `size` units, by the block of their unit on ``dim - 1``."""
    units, inner = value.shape[dim - 1 : dim + 1]
    place = torch.arange(units, device=value.device) * size // (units * inner) * inner
    index = place[:, None] + torch.arange(inner, device=value.device)
    index = index.view(units, inner, *[1] * (value.ndim - dim - 1))
    wide = value.new_zeros(*value.shape[:dim], size, *value.shape[dim + 1 :])
    return wide.scatter_(dim, index.expand(value.shape), value)


def densify(tensor: TensorSpec, value: Tensor) -> tuple[tuple[Axis, ...], Tensor]:
    """A block-diagonal stacked tensor in a form whose axes are permuted independently.

    With one column (or one row) per block, the permutation of the rows (or columns) determines the other; otherwise
    the tensor is embedded in the dense block-diagonal tensor that it represents.
    """
    blocks = tensor.diagonal
    if blocks == 1:
        return tensor.axes, value
    count, height, width = value.shape[:3]
    if width == 1 and tensor.axes[0]:
        return (tensor.axes[0], (), *tensor.axes[2:]), value
    if height == blocks and tensor.axes[1]:
        return (tensor.axes[1], (), *tensor.axes[2:]), value.reshape(count, height * width, 1, *value.shape[3:])
    split = value.reshape(count, blocks, height // blocks, width, *value.shape[3:])
    dense = value.new_zeros(count, blocks, height // blocks, blocks, width, *value.shape[3:])
    each = torch.arange(blocks, device=value.device)
    dense[:, each, :, each] = split.transpose(0, 1)
    return tensor.axes, dense.reshape(count, height, blocks * width, *value.shape[3:])
