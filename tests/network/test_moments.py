from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from c2m3_fl.network.moments import Moments


def _draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@settings(deadline=None)
@given(cuts=st.lists(st.integers(1, 39), max_size=4, unique=True), seed=st.integers(0, 2**31))
def test_moments_of_parts_combine_to_those_of_the_whole(cuts: list[int], seed: int) -> None:
    values = 3 * _draw(40, 5, seed=seed, dtype=torch.float64) + 7
    total = Moments.empty(5)
    for part in values.tensor_split(sorted(cuts)):
        total = total.combine(Moments.of(part, (-1,)))
    assert total.count == 40
    torch.testing.assert_close(total.mean, values.mean(0), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(total.std, values.std(0, correction=0), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(total.unbiased_variance, values.var(0), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("axes", "pooled"), [((1,), (0, 2, 3)), ((-3,), (0, 2, 3)), ((-1,), (0, 1, 2)), ((-3, -2, -1), (0,))]
)
def test_channels_are_the_coordinates_of_the_named_axes(axes: tuple[int, ...], pooled: tuple[int, ...]) -> None:
    values = _draw(6, 3, 4, 5, dtype=torch.float64)
    moments = Moments.of(values, axes)
    torch.testing.assert_close(moments.mean, values.mean(pooled).reshape(-1))
    torch.testing.assert_close(moments.variance, values.var(pooled, correction=0).reshape(-1))


def test_a_large_offset_does_not_cancel_the_spread() -> None:
    values = _draw(1000, 4) + 4096.0  # exact in float32 to 2^-12 of a unit
    expected = values.double().std(0, correction=0)
    # the squares are rounded to float32 before they are summed: 2^-24 at most; squared first, 4096 would drown them
    torch.testing.assert_close(Moments.of(values, (-1,)).std, expected, rtol=2**-24, atol=0)


def test_a_constant_channel_has_no_spread() -> None:
    assert Moments.of(torch.full((10, 2), 0.1), (-1,)).std.eq(0).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_narrow_types_accumulate_in_wide_ones(dtype: torch.dtype) -> None:
    values = (_draw(5000, 2) + 1).to(dtype)
    torch.testing.assert_close(Moments.of(values, (-1,)).mean, values.double().mean(0), rtol=1e-6, atol=0)
