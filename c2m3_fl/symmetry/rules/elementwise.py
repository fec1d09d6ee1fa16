"""Rules of operators that act entry by entry."""

from __future__ import annotations

from c2m3_fl.symmetry.labels import Labels
from c2m3_fl.symmetry.reshape_labels import reshape
from c2m3_fl.symmetry.rules.registry import Argument, Call, rule, tensors
from c2m3_fl.symmetry.unit_labels import combine, in_order, insert, select

_UNARY = (
    "abs acos alias asin atan bernoulli bitwise_not ceil celu clone contiguous cos cosh detach detach_ dropout elu erf "
    "erfc exp exp2 expm1 feature_dropout floor frac gelu hardshrink hardsigmoid hardswish hardtanh isfinite isinf "
    "isnan leaky_relu lift_fresh_copy log log10 log1p log2 log_sigmoid logical_not logit mish nan_to_num neg positive "
    "reciprocal relu relu6 round rsqrt selu sigmoid sign sgn silu sin sinh softplus softshrink sqrt square tan tanh "
    "tanh_ threshold trunc _to_copy _conj rrelu"
)
_BINARY = (
    "add sub rsub mul div true_divide floor_divide remainder fmod pow atan2 maximum minimum fmax fmin where clamp "
    "clamp_min clamp_max lt le gt ge logical_and logical_or logical_xor bitwise_and bitwise_or bitwise_xor "
    "masked_fill lerp addcmul addcdiv xlogy copysign hypot heaviside nextafter __and__ __or__ __xor__"
)


@rule(*(f"aten.{name}" for name in _UNARY.split()))
@rule(*(f"aten.{name}" for name in _BINARY.split()))
def elementwise(call: Call, *args: Argument, **kwargs: Argument) -> Labels:
    """Coordinates that are combined carry the same unit."""
    return combine(call.structure, *tensors([*args, *kwargs.values()]))


@rule("aten.to", "aten.type_as")
def cast(call: Call, x: Labels, *_: Argument, **__: Argument) -> Labels:
    """The same entries in another type, perhaps that of another tensor."""
    return combine(call.structure, x)


@rule("aten.zeros_like", "aten.ones_like", "aten.full_like", "aten.new_zeros", "aten.new_ones", "aten.new_full")
def constant(call: Call, *_: Argument, **__: Argument) -> Labels:
    """The same number everywhere."""
    return Labels(call.shape)


@rule("aten.rand_like", "aten.randn_like", "aten.randint_like", "aten.rand", "aten.randn", "aten.randint")
@rule("aten.uniform", "aten.exponential", "aten.log_normal", "aten.cauchy", "aten.geometric")
def noise(call: Call, *_: Argument, **__: Argument) -> Labels:
    """Random numbers treat all entries alike."""
    return Labels(call.shape)


@rule("aten.fill", "aten.empty_like", "aten.zero")
def fill(call: Call, x: Labels, value: Argument = 0, **_: Argument) -> Labels:
    """The same number everywhere, a constant or a computed one."""
    return Labels(call.shape)


@rule("aten.native_dropout")
def native_dropout(call: Call, x: Labels, *_: Argument) -> tuple[Labels, Labels]:
    """A random mask treats all entries alike."""
    return x, Labels(x.shape)


@rule("aten.copy")
def copy(call: Call, target: Labels, source: Labels, *_: Argument) -> Labels:
    """Content of `source`, broadcast to the shape of `target`."""
    return combine(call.structure, Labels(target.shape), source)


@rule("aten.tril", "aten.triu")
def triangle(call: Call, x: Labels, *_: Argument) -> Labels:
    """Read the last two dimensions in order."""
    return in_order(call.structure, x, [-2, -1])


def per_channel(call: Call, x: Labels, *params: Labels | None) -> Labels:
    """Combine parameters and statistics of shape (C,) with dimension 1 of `x`, shape (N, C, …)."""
    spread = [insert(value, range(1, x.ndim - 1)) for value in params if value is not None]
    return combine(call.structure, x, *spread)


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


@rule("aten.bucketize")
def bucketize(call: Call, x: Labels, bounds: Labels, *_: Argument, **__: Argument) -> Labels:
    """The number of the interval that holds each entry."""
    in_order(call.structure, bounds, [0])
    return combine(call.structure, x)


@rule("aten.masked_scatter")
def masked_scatter(call: Call, x: Labels, mask: Labels, source: Labels) -> Labels:
    """Entries where a mask holds are replaced by those of `source`, one after another."""
    for value in (x, mask, source):
        in_order(call.structure, value, range(value.ndim), "entries are taken one after another")
    return Labels.ordered(call.shape)
