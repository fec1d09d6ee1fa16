"""Weighted means: an explicit rule for every dtype."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from c2m3_fl.core.averaging import mean_of_owners, normalise_weights, weighted_mean
from c2m3_fl.errors import ParamsError, WeightsError

positive = st.floats(1e-3, 1e3)


@given(
    st.lists(positive, min_size=1, max_size=6),
    st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]),
)
def test_averaging_identical_nodes_returns_their_very_bits(weights, dtype):
    node = {"w": torch.randn(50, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)}
    mean = weighted_mean([node] * len(weights), weights)
    assert mean["w"].dtype == dtype
    assert torch.equal(mean["w"], node["w"])


@given(st.lists(positive, min_size=2, max_size=6))
def test_the_mean_is_the_weighted_sum(weights):
    nodes = [{"w": torch.full((3,), float(i**2), dtype=torch.float64)} for i in range(len(weights))]
    expected = sum(w * i**2 for i, w in enumerate(weights)) / sum(weights)
    torch.testing.assert_close(weighted_mean(nodes, weights)["w"], torch.full((3,), expected, dtype=torch.float64))


def test_a_node_that_has_all_the_weight_is_the_mean():
    nodes = [{"w": torch.tensor([value], dtype=torch.float64)} for value in (1e30, 0.1, -3.0)]
    assert weighted_mean(nodes, [0, 5, 0])["w"].item() == 0.1


def test_counters_and_masks_take_the_largest_value_and_keep_their_dtype():
    nodes = [
        {"count": torch.tensor(3), "mask": torch.tensor([True, False]), "byte": torch.tensor([7], dtype=torch.uint8)},
        {"count": torch.tensor(5), "mask": torch.tensor([False, False]), "byte": torch.tensor([2], dtype=torch.uint8)},
    ]
    mean = weighted_mean(nodes, [1, 0])
    assert (mean["count"].item(), mean["count"].dtype) == (5, torch.int64)
    assert mean["mask"].tolist() == [True, False]
    assert (mean["byte"].item(), mean["byte"].dtype) == (7, torch.uint8)


def test_inputs_are_left_alone():
    nodes = [{"w": torch.zeros(2)}, {"w": torch.ones(2)}]
    weighted_mean(nodes)
    assert [node["w"].tolist() for node in nodes] == [[0, 0], [1, 1]]


@given(st.lists(st.floats(0, 1e300), min_size=1, max_size=20).filter(lambda weights: max(weights) > 0))
def test_normalised_weights_sum_to_one(weights):
    shares = normalise_weights(weights, len(weights))
    assert shares.dtype == torch.float64
    assert bool((shares >= 0).all())
    assert math.fsum(shares.tolist()) == pytest.approx(1, abs=1e-15 * len(weights))


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([1.0], "got 1, expected one for each of the 2 nodes"),
        ([1.0, -1.0], r"weights\[1\] is -1.0"),
        ([math.nan, 1.0], r"weights\[0\] is nan"),
        ([math.inf, 1.0], r"weights\[0\] is inf"),
        ([0.0, 0.0], "all zero"),
        (["a", 1], r"weights\[0\] is no number"),
        ([1, "2"], r"weights\[1\] is no number"),
        ([1, None], r"weights\[1\] is no number"),
        (3.0, "is no number, expected one per node"),
        (torch.ones(2, 1), r"weights have shape \(2, 1\), expected one number per node"),
        (torch.tensor(1.0), r"weights have shape \(\)"),
    ],
)
def test_bad_weights_are_refused(weights, message):
    with pytest.raises(WeightsError, match=message):
        normalise_weights(weights, 2)


def test_nodes_that_do_not_fit_each_other_are_refused():
    with pytest.raises(ParamsError, match="got none"):
        weighted_mean([])
    with pytest.raises(ParamsError, match=r"keys differ from node 0's in \['b'\]"):
        weighted_mean([{"a": torch.zeros(1)}, {"a": torch.zeros(1), "b": torch.zeros(1)}])
    with pytest.raises(ParamsError, match=r"node 1: 'a' has shape \(1,\), expected \(2,\)"):
        weighted_mean([{"a": torch.zeros(2)}, {"a": torch.zeros(1)}])


def test_the_mean_of_owners_counts_an_entry_where_it_is_owned_and_is_zero_where_nobody_owns_it() -> None:
    values = [torch.tensor([[1.0, 2.0, 7.0], [3.0, 4.0, 7.0]]), torch.tensor([[5.0, 6.0, 7.0], [7.0, 8.0, 7.0]])]
    owned = [torch.tensor([True, False, False]), torch.tensor([[True], [False]]) & torch.tensor([True, True, False])]
    found = mean_of_owners(values, [0.25, 0.75], owned)
    assert found.tolist() == [[4.0, 6.0, 0.0], [3.0, 0.0, 0.0]]
    assert mean_of_owners(values, [0.0, 1.0], owned).tolist() == [[5.0, 6.0, 0.0], [0.0, 0.0, 0.0]]
    assert mean_of_owners([value.half() for value in values], [1.0, 1.0], owned).dtype == torch.float16
