"""State dicts as wholes: their norm, and their order."""

from __future__ import annotations

import math

import pytest
import torch

from c2m3_fl.core.state_dicts import norm, order_by_weight, ordering_digest


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


def test_counters_of_batches_order_networks_only_where_all_else_agrees():
    def network(weight, batches):
        return {"batches": torch.tensor(batches), "w": torch.tensor([float(weight)])}

    nodes = [network(weight, batches) for weight in range(4) for batches in (3, 4)]
    orders = []
    for step in (1, 5, 1000):
        drifted = [node | {"batches": node["batches"] * step} for node in nodes]
        orders.append([int(nodes[index]["w"]) for index in order_by_weight(drifted, torch.ones(8))])
    assert orders[0] == orders[1] == orders[2]
    assert len({ordering_digest(node) for node in nodes}) == 8
