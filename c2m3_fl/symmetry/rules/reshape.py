"""Rules of operators that only move, pick or join entries."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from c2m3_fl.symmetry.labels import Labels
from c2m3_fl.symmetry.reshape_labels import concatenate, copies, reshape, stack
from c2m3_fl.symmetry.rules.registry import Argument, Call, rule
from c2m3_fl.symmetry.unit_labels import expand, in_order, insert, permute, select, take


@rule(
    "aten.view", "aten.reshape", "aten._unsafe_view", "aten.flatten", "aten.unflatten", "aten.ravel", "aten.view_copy"
)
@rule("aten.unsqueeze", "aten.view_as", "aten.reshape_as", "aten.atleast_1d", "aten.atleast_2d")
def view(call: Call, x: Labels, *_: Argument) -> Labels:
    """Same entries in row-major order, in the shape of the output."""
    return reshape(call.structure, x, call.shape)


@rule("aten.squeeze")
def squeeze(call: Call, x: Labels, *dims: Argument) -> Labels:
    """Dimensions of size 1 disappear."""
    return reshape(call.structure, x, call.shape)


@rule("aten.permute")
def reorder(call: Call, x: Labels, dims: Sequence[int]) -> Labels:
    """Dimensions in another order."""
    return permute(x, dims)


@rule("aten.transpose", "aten.swapaxes", "aten.t", "aten.mT", "aten.numpy_T")
def transpose(call: Call, x: Labels, first: int = -1, second: int = -2) -> Labels:
    """Two dimensions exchanged."""
    if x.ndim < 2:
        return x
    order = list(range(x.ndim))
    order[first], order[second] = order[second], order[first]
    return permute(x, order)


@rule("aten.movedim", "aten.moveaxis")
def movedim(call: Call, x: Labels, source: Argument, target: Argument) -> Labels:
    """Move some dimensions to other places."""
    sources = [x.dim(dim) for dim in (source if isinstance(source, Sequence) else [source])]
    targets = [x.dim(dim) for dim in (target if isinstance(target, Sequence) else [target])]
    order = [dim for dim in range(x.ndim) if dim not in sources]
    for place, dim in sorted(zip(targets, sources, strict=True)):
        order.insert(place, dim)
    return permute(x, order)


@rule("aten.pixel_shuffle")
def pixel_shuffle(call: Call, x: Labels, factor: int) -> Labels:
    """Channels (C, r, r) to pixels."""
    *batch, channels, height, width = x.shape
    lead = len(batch)
    wide = reshape(call.structure, x, (*batch, channels // factor**2, factor, factor, height, width))
    order = [*range(lead + 1), lead + 3, lead + 1, lead + 4, lead + 2]
    return reshape(call.structure, permute(wide, order), call.shape)


@rule("aten.pixel_unshuffle")
def pixel_unshuffle(call: Call, x: Labels, factor: int) -> Labels:
    """Pixels to channels (C, r, r)."""
    *batch, channels, height, width = x.shape
    lead = len(batch)
    wide = reshape(call.structure, x, (*batch, channels, height // factor, factor, width // factor, factor))
    order = [*range(lead + 1), lead + 2, lead + 4, lead + 1, lead + 3]
    return reshape(call.structure, permute(wide, order), call.shape)


@rule("aten.channel_shuffle", "aten.native_channel_shuffle")
def channel_shuffle(call: Call, x: Labels, groups: int) -> Labels:
    """Channels (g, c) to (c, g)."""
    wide = reshape(call.structure, x, (x.shape[0], groups, x.shape[1] // groups, *x.shape[2:]))
    order = [0, 2, 1, *range(3, wide.ndim)]
    return reshape(call.structure, permute(wide, order), x.shape)


@rule("aten.expand", "aten.expand_as", "aten.broadcast_to")
def broadcast(call: Call, x: Labels, *_: Argument, **__: Argument) -> Labels:
    """Repeated along dimensions of size 1."""
    return expand(x, call.shape)


@rule("aten.repeat", "aten.tile")
def repeat(call: Call, x: Labels, repeats: Sequence[int]) -> Labels:
    """Repeat the whole tensor along dimensions."""
    x = insert(x, range(len(call.shape) - x.ndim))
    for dim, size in enumerate(call.shape):
        if size != x.shape[dim]:
            times = size // x.shape[dim]
            x = insert(x, [dim])
            x = expand(x, (*x.shape[:dim], times, *x.shape[dim + 1 :]))
            x = reshape(call.structure, x, (*x.shape[:dim], size, *x.shape[dim + 2 :]))
    return x


@rule("aten.repeat_interleave")
def repeat_interleave(call: Call, x: Labels, repeats: Argument, dim: int | None = None, **_: Argument) -> Labels:
    """Every entry several times in a row."""
    if not isinstance(repeats, int):
        in_order(call.structure, x, range(x.ndim), "repeated a varying number of times")
        return Labels.ordered(call.shape)
    if dim is None:
        x, dim = reshape(call.structure, x, (int(np.prod(x.shape)),)), 0
    dim = x.dim(dim)
    return copies(call.structure, x, dim, repeats)


# ---------------------------------------------------------------------------------------------------- parts of it


@rule("aten.select")
def pick(call: Call, x: Labels, dim: int, index: int) -> Labels:
    """One entry along a dimension."""
    return select(call.structure, x, dim, index)


@rule("aten.slice")
def cut(call: Call, x: Labels, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1) -> Labels:
    """Entries at regular places along a dimension."""
    dim = x.dim(dim)
    return take(call.structure, x, dim, np.arange(x.shape[dim])[slice(start, end, step)])


@rule("aten.narrow")
def narrow(call: Call, x: Labels, dim: int, start: int, length: int) -> Labels:
    """A run of entries along a dimension."""
    dim = x.dim(dim)
    start = start % x.shape[dim]
    return take(call.structure, x, dim, np.arange(start, start + length))


@rule(
    "aten.split", "aten.split_with_sizes", "aten.chunk", "aten.tensor_split", "aten.unsafe_split", "aten.unsafe_chunk"
)
def split(call: Call, x: Labels, sizes: Argument, dim: int = 0) -> tuple[Labels, ...]:
    """Runs of entries along a dimension, as long as the shapes of the outputs."""
    dim, start, parts = x.dim(dim), 0, []
    for shape in call.outputs:
        parts.append(take(call.structure, x, dim, np.arange(start, start + shape[dim])))
        start += shape[dim]
    return tuple(parts)


@rule("aten.unbind")
def unbind(call: Call, x: Labels, dim: int = 0) -> tuple[Labels, ...]:
    """All entries along a dimension."""
    return tuple(select(call.structure, x, dim, index) for index in range(x.shape[dim]))


@rule("aten.flip")
def flip(call: Call, x: Labels, dims: Sequence[int]) -> Labels:
    """Entries backwards."""
    for dim in dims:
        x = take(call.structure, x, dim, np.arange(x.shape[x.dim(dim)])[::-1])
    return x


@rule("aten.roll")
def roll(call: Call, x: Labels, shifts: Argument, dims: Argument = ()) -> Labels:
    """Move entries along dimensions, cyclically."""
    shifts, dims = ([value] if isinstance(value, int) else list(value) for value in (shifts, dims))
    if not dims:
        flat = reshape(call.structure, x, (int(np.prod(x.shape)),))
        return reshape(call.structure, roll(call, flat, shifts, [0]), x.shape)
    for shift, dim in zip(shifts, dims, strict=True):
        x = take(call.structure, x, dim, np.roll(np.arange(x.shape[x.dim(dim)]), shift))
    return x


# ------------------------------------------------------------------------------------------------------ joining it


@rule("aten.cat", "aten.concat", "aten.concatenate")
def cat(call: Call, pieces: Sequence[Labels], dim: int = 0) -> Labels:
    """Joined along a dimension."""
    return concatenate(call.structure, [x for x in pieces if x.shape != (0,)], dim)


@rule("aten.stack")
def pile(call: Call, pieces: Sequence[Labels], dim: int = 0) -> Labels:
    """Joined along a new dimension."""
    return stack(call.structure, pieces, dim)


@rule("aten.constant_pad_nd", "aten.pad", "aten.reflection_pad1d", "aten.reflection_pad2d", "aten.replication_pad2d")
@rule("aten.reflection_pad3d", "aten.replication_pad1d", "aten.replication_pad3d")
def pad(call: Call, x: Labels, widths: Sequence[int], mode: Argument = "constant", *_: Argument) -> Labels:
    """Add a margin: uniform if the dimension has units, otherwise ordered."""
    structure = call.structure
    labelled = {dim for factor in x.factors for dim, size in enumerate(factor.shape) if size > 1}
    for place in range(len(widths) // 2):
        dim, (before, after) = x.ndim - 1 - place, widths[2 * place : 2 * place + 2]
        if (before, after) == (0, 0):
            continue
        size = x.shape[dim] + before + after
        wide = (*x.shape[:dim], size, *x.shape[dim + 1 :])
        if dim in labelled and min(before, after) >= 0 and (not isinstance(mode, str) or mode == "constant"):
            margin = Labels((*x.shape[:dim], before + after, *x.shape[dim + 1 :]))
            joined = concatenate(structure, [margin, x], dim)
            order = np.arange(size)
            order = np.concatenate([order[:before], order[before + after :], order[before : before + after]])
            x = take(structure, joined, dim, order)
        elif dim in labelled and max(before, after) <= 0:
            x = take(structure, x, dim, np.arange(x.shape[dim])[-before : x.shape[dim] + after])
        else:
            x = in_order(structure, x, [dim])
            x = Labels(wide, x.factors, x.fixed | {dim})
    return x
