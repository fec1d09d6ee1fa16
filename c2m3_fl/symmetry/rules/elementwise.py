"""Rules of operators that act entry by entry, and of reductions and normalisations along dimensions."""

from __future__ import annotations

from collections.abc import Sequence

from c2m3_fl.symmetry.reshape_labels import reshape
from c2m3_fl.symmetry.rules.registry import Argument, Call, Result, rule, tensors
from c2m3_fl.symmetry.unit_labels import (
    Labels,
    combine,
    in_order,
    insert,
    normalise,
    reduce,
    select,
)

_UNARY = (
    "abs acos alias asin atan bernoulli bitwise_not ceil celu clone contiguous cos cosh detach detach_ dropout elu erf "
    "erfc exp exp2 expm1 feature_dropout floor frac gelu hardshrink hardsigmoid hardswish hardtanh isfinite isinf "
    "isnan leaky_relu lift_fresh_copy log log10 log1p log2 log_sigmoid logical_not logit mish nan_to_num neg positive "
    "reciprocal relu relu6 round rsqrt selu sigmoid sign sgn silu sin sinh softplus softshrink sqrt square tan tanh "
    "tanh_ threshold to trunc type_as _to_copy _conj rrelu"
)
_BINARY = (
    "add sub rsub mul div true_divide floor_divide remainder fmod pow atan2 maximum minimum fmax fmin where clamp "
    "clamp_min clamp_max eq ne lt le gt ge logical_and logical_or logical_xor bitwise_and bitwise_or bitwise_xor "
    "masked_fill lerp addcmul addcdiv xlogy copysign hypot heaviside nextafter __and__ __or__ __xor__"
)


@rule(*(f"aten.{name}" for name in _UNARY.split()))
@rule(*(f"aten.{name}" for name in _BINARY.split()))
def elementwise(call: Call, *args: Argument, **kwargs: Argument) -> Labels:
    """Coordinates that meet carry the same unit."""
    return combine(call.structure, *tensors([*args, *kwargs.values()]))


@rule("aten.zeros_like", "aten.ones_like", "aten.full_like", "aten.new_zeros", "aten.new_ones", "aten.new_full")
def constant(call: Call, *_: Argument, **__: Argument) -> Labels:
    """The same number everywhere."""
    return Labels(call.shape)


@rule("aten.fill", "aten.empty_like", "aten.zero")
def fill(call: Call, x: Labels, value: Argument = 0, **_: Argument) -> Labels:
    """The same number everywhere, also when it is computed."""
    return Labels(call.shape)


@rule("aten.native_dropout")
def native_dropout(call: Call, x: Labels, *_: Argument) -> tuple[Labels, Labels]:
    """A random mask treats all entries alike."""
    return x, Labels(x.shape)


@rule("aten.copy")
def copy(call: Call, target: Labels, source: Labels, *_: Argument) -> Labels:
    """Content of `source`, broadcast to the shape of `target`."""
    return combine(call.structure, Labels(target.shape), source)


def every(x: Labels, dims: Argument) -> list[int]:
    """The dimensions that an optional argument names; all of them for None or an empty list."""
    if dims is None or (isinstance(dims, Sequence) and not dims):
        return list(range(x.ndim))
    return [x.dim(dim) for dim in (dims if isinstance(dims, Sequence) else [dims])]


@rule(
    "aten.mean",
    "aten.sum",
    "aten.amax",
    "aten.amin",
    "aten.logsumexp",
    "aten.prod",
    "aten.any",
    "aten.all",
    "aten.nansum",
)
def reduction(call: Call, x: Labels, dims: Argument = None, keepdim: bool = False, **_: Argument) -> Labels:
    """A symmetric function along dimensions."""
    return reduce(call.structure, x, every(x, dims), keepdim=keepdim)


@rule("aten.var", "aten.std", "aten.var_mean", "aten.std_mean")
def moments(
    call: Call, x: Labels, dims: Argument = None, *_: Argument, keepdim: bool = False, **__: Argument
) -> Result:
    """Second moments along dimensions."""
    if isinstance(dims, bool):
        dims = None
    found = reduce(call.structure, x, every(x, dims), keepdim=len(call.shape) == x.ndim)
    return found if len(call.outputs) == 1 else (found, found)


@rule("aten.linalg_vector_norm", "aten.norm")
def vector_norm(
    call: Call, x: Labels, order: Argument = 2, dims: Argument = None, *_: Argument, **__: Argument
) -> Labels:
    """A norm along dimensions."""
    return reduce(call.structure, x, every(x, dims), keepdim=len(call.shape) == x.ndim)


@rule("aten.max", "aten.min")
def extremum(call: Call, x: Labels, *args: Argument, **_: Argument) -> Result:
    """Largest entry: of all, along a dimension (with its index, which reveals the order), or of two tensors."""
    if args and isinstance(args[0], Labels):
        return combine(call.structure, x, args[0])
    if not args:
        return reduce(call.structure, x, range(x.ndim))
    dim = x.dim(args[0])
    ordered = reduce(call.structure, in_order(call.structure, x, [dim]), [dim], keepdim=len(call.shape) == x.ndim)
    return ordered, ordered


@rule("aten.argmax", "aten.argmin")
def argument(call: Call, x: Labels, dim: int | None = None, keepdim: bool = False) -> Labels:
    """Index of the largest entry, which reveals the order."""
    dims = every(x, dim)
    return reduce(call.structure, in_order(call.structure, x, dims), dims, keepdim=keepdim)


@rule("aten.softmax", "aten._softmax", "aten.log_softmax", "aten._log_softmax", "aten._safe_softmax")
def softmax(call: Call, x: Labels, dim: int, *_: Argument, **__: Argument) -> Labels:
    """Division by a sum along one dimension."""
    return normalise(call.structure, x, [dim])


@rule("aten.softmin")
def softmin(call: Call, x: Labels, dim: int, *_: Argument) -> Labels:
    """Division by a sum along one dimension."""
    return normalise(call.structure, x, [dim])


@rule("aten.cumsum", "aten.cumprod", "aten.logcumsumexp", "aten.cummax", "aten.cummin")
def cumulative(call: Call, x: Labels, dim: int, **_: Argument) -> Result:
    """Reads one dimension in order."""
    found = in_order(call.structure, x, [dim])
    return found if len(call.outputs) == 1 else (found, found)


@rule("aten.tril", "aten.triu")
def triangle(call: Call, x: Labels, *_: Argument) -> Labels:
    """Reads the last two dimensions in order."""
    return in_order(call.structure, x, [-2, -1])


# -------------------------------------------------------------------------------------------------- normalisation


def per_channel(call: Call, x: Labels, *params: Labels | None) -> Labels:
    """Parameters and statistics of shape (C,) meet dimension 1 of `x`, shape (N, C, …)."""
    spread = [insert(value, range(1, x.ndim - 1)) for value in params if value is not None]
    return combine(call.structure, x, *spread)


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


@rule("aten.prelu", "aten._prelu_kernel")
def prelu(call: Call, x: Labels, weight: Labels) -> Labels:
    """A slope per channel, or one for all."""
    if weight.ndim == x.ndim or weight.shape == (1,):
        return combine(call.structure, x, weight)
    return per_channel(call, x, weight)


@rule("aten.glu")
def glu(call: Call, x: Labels, dim: int = -1) -> Labels:
    """The first half times the sigmoid of the second: halves carry the same units."""
    dim = x.dim(dim)
    halves = reshape(call.structure, x, (*x.shape[:dim], 2, x.shape[dim] // 2, *x.shape[dim + 1 :]))
    return combine(call.structure, *(select(call.structure, halves, dim, half) for half in range(2)))
