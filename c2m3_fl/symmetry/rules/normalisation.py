"""Rules of normalisation layers: statistics per channel, per group of channels or per entry, then scale and shift."""

from __future__ import annotations

from collections.abc import Sequence

from c2m3_fl.symmetry.labels import Labels
from c2m3_fl.symmetry.reshape_labels import reshape
from c2m3_fl.symmetry.rules.elementwise import per_channel
from c2m3_fl.symmetry.rules.registry import Argument, Call, Result, rule, tensors
from c2m3_fl.symmetry.unit_labels import combine, normalise, reduce


@rule("aten.batch_norm", "aten._native_batch_norm_legit_no_training", "aten.instance_norm")
@rule("aten.native_batch_norm", "aten._native_batch_norm_legit", "aten._native_batch_norm_legit_functional")
def batch_norm(call: Call, x: Labels, *args: Argument, **_: Argument) -> Result:
    """Statistics per channel, running or of the batch."""
    params = [value for value in args[:4] if isinstance(value, Labels)]
    found = per_channel(call, x, *params)
    if len(call.outputs) == 1:
        return found
    channel = reduce(call.structure, found, [dim for dim in range(x.ndim) if dim != 1])
    return (found, *(channel if shape == channel.shape else Labels(shape) for shape in call.outputs[1:]))


@rule("aten.layer_norm", "aten.native_layer_norm", "aten.rms_norm", "aten._fused_rms_norm")
def layer_norm(call: Call, x: Labels, shape: Sequence[int], *args: Argument, **_: Argument) -> Result:
    """Pooled moments over the last dimensions, then scale and shift per entry."""
    structure = call.structure
    dims = range(x.ndim - len(shape), x.ndim)
    found = combine(structure, normalise(structure, x, dims), *tensors(args[:2]))
    moment = reduce(structure, x, dims, keepdim=True) if len(call.outputs) > 1 else None
    return found if moment is None else (found, *(moment for _ in call.outputs[1:]))


@rule("aten.group_norm", "aten.native_group_norm")
def group_norm(call: Call, x: Labels, *args: Argument, **_: Argument) -> Result:
    """Pooled moments over blocks of channels, then scale and shift per channel."""
    structure = call.structure
    params = tensors(args)
    groups = args[0] if isinstance(args[0], int) else args[5]  # native: weight, bias, N, C, HxW, groups, eps
    split = reshape(structure, x, (x.shape[0], groups, x.shape[1] // groups, *x.shape[2:]))
    pooled = normalise(structure, split, range(2, split.ndim))
    found = per_channel(call, reshape(structure, pooled, x.shape), *params)
    if len(call.outputs) == 1:
        return found
    return (found, *(reduce(structure, split, range(2, split.ndim)) for _ in call.outputs[1:]))


@rule("aten._weight_norm")
def weight_norm(call: Call, direction: Labels, size: Labels, dim: int = 0) -> Labels:
    """A direction divided by its norm, which the entries off `dim` share, times a size."""
    rest = [other for other in range(direction.ndim) if other != dim]
    return combine(call.structure, normalise(call.structure, direction, rest), size)
