"""State dicts as wholes: their norm."""

from __future__ import annotations

import math

import pytest
import torch

from c2m3_fl.core.state_dicts import norm


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [1.0, 1e-30, 1e30])
def test_a_norm_is_that_of_all_floating_tensors_together(dtype, scale):
    if scale != 1.0 and dtype == torch.float16:
        scale = 100.0  # its squares overflow at half precision
    params = {"a": torch.full((3, 4), scale, dtype=dtype), "b": torch.full((4,), -scale, dtype=dtype)}
    params |= {"count": torch.tensor(10**6), "none": torch.zeros(0, dtype=dtype)}
    assert norm(params) == pytest.approx(4 * float(params["a"][0, 0]), rel=1e-6)


def test_norms_of_nothing_and_of_what_is_not_finite():
    assert norm({}) == norm({"w": torch.zeros(3)}) == 0.0
    assert norm({"w": torch.tensor([1.0, math.inf])}) == math.inf
    assert math.isnan(norm({"w": torch.tensor([1.0, math.nan])}))
