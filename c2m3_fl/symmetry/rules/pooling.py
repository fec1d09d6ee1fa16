"""Rules of operators on images: pooling and resampling of every channel alike, and patches."""

from __future__ import annotations

from collections.abc import Sequence

from c2m3_fl.symmetry.labels import Labels
from c2m3_fl.symmetry.reshape_labels import reshape
from c2m3_fl.symmetry.rules.registry import Argument, Call, Result, rule
from c2m3_fl.symmetry.unit_labels import combine, in_order, insert, reduce


def _resample(call: Call, x: Labels, spatial: int) -> Labels:
    """An operator that treats all channels alike and reads the last dimensions in order."""
    x = in_order(call.structure, x, range(x.ndim - spatial, x.ndim), "position in an image")
    dims = {dim for dim in range(x.ndim - spatial, x.ndim) if call.shape[dim] > 1}
    return Labels(call.shape, x.factors, frozenset(dim for dim in x.fixed if dim < x.ndim - spatial) | dims)


def _register() -> None:
    pooling = "max_pool{d}d avg_pool{d}d adaptive_avg_pool{d}d adaptive_max_pool{d}d"
    upsampling = "upsample_nearest{d}d _upsample_nearest_exact{d}d"
    names = {f"aten.{name}": d for d in (1, 2, 3) for name in f"{pooling} {upsampling}".format(d=d).split()}
    names |= {f"aten.{name}": d for d in (2, 3) for name in (f"max_pool{d}d_with_indices", f"_adaptive_avg_pool{d}d")}
    names |= {f"aten.upsample_{kind}2d": 2 for kind in ("bilinear", "bicubic")}
    names |= {"aten._upsample_bilinear2d_aa": 2, "aten._upsample_bicubic2d_aa": 2, "aten.upsample_linear1d": 1}
    names |= {"aten.upsample_trilinear3d": 3}
    for name, spatial in names.items():

        @rule(name)
        def pool(call: Call, x: Labels, *_: Argument, spatial: int = spatial, **__: Argument) -> Result:
            found = _resample(call, x, spatial)
            return found if len(call.outputs) == 1 else tuple(found for _ in call.outputs)


_register()


@rule("aten.grid_sampler", "aten.grid_sampler_2d", "aten.grid_sampler_3d")
def grid_sampler(call: Call, x: Labels, grid: Labels, *_: Argument) -> Labels:
    """Values of an image (N, C, …) at the places of a grid (N, …, coordinates)."""
    structure, pixels = call.structure, range(2, x.ndim)
    image = reduce(structure, in_order(structure, x, pixels, "position in an image"), pixels, keepdim=True)
    places = in_order(structure, grid, [-1], "coordinate of a place")
    places = reduce(structure, places, [-1])
    return combine(structure, image, insert(places, [1]))


@rule("aten.affine_grid_generator")
def affine_grid(call: Call, theta: Labels, *_: Argument) -> Labels:
    """A grid of places, from the coefficients of a linear map."""
    in_order(call.structure, theta, range(theta.ndim), "coefficient of a map of places")
    return Labels.ordered(call.shape)


@rule("aten.im2col")
def unfold(call: Call, x: Labels, kernel: Sequence[int], *_: Argument) -> Labels:
    """Patches as columns: (N, C, H, W) to (N, C·k·k, L)."""
    channel = in_order(call.structure, x, range(x.ndim - 2, x.ndim), "position in an image")
    lead = channel.ndim - 2
    factors = tuple(factor.reshape(*factor.shape[:lead], 1, 1) for factor in channel.factors)
    area = kernel[0] * kernel[1]
    patches = Labels(
        (*x.shape[:lead], area, call.shape[-1]), factors, frozenset({lead, lead + 1}) | (x.fixed & set(range(lead)))
    )
    return reshape(call.structure, patches, call.shape)
