"""Nodes that drifted from one network: what their drifts prove the exact bound proves, too; products, one by one."""

from __future__ import annotations

import pytest
import torch

from c2m3_fl.core import permutation
from c2m3_fl.core.averaging import weighted_mean
from c2m3_fl.core.basis import consensus, consensus_of
from c2m3_fl.core.drift import MOST, Drifts
from c2m3_fl.core.identity_proof import _add_squares, _bound_holds, _gram, distances, reach
from c2m3_fl.core.outliers import find_outliers, outliers_of
from c2m3_fl.core.parts import Layout
from c2m3_fl.core.spec import Group, PermutationSpec, TensorSpec
from c2m3_fl.core.terms import compile_terms
from tests.core.networks import ALL, draws, mlp, on, pairwise_agreement, planted

LARGE = mlp(30, 70, 50, 4)  # two tensors of more than a thousand elements
each_spec = pytest.mark.parametrize("spec", ALL.values(), ids=ALL.keys())


def around(start, drifts, scale):
    return [
        {name: value + scale * drift[name] if value.is_floating_point() else value for name, value in start.items()}
        for drift in drifts
    ]


def seen(spec, start, nodes, weights):
    found = Drifts(spec, start)
    numbers = [found.add(node, weight) for node, weight in zip(nodes, weights, strict=True)]
    return found, numbers


def exact(spec, nodes, weights):
    """The bound node by node, over all coordinates, in double precision."""
    nodes = [{name: value.double() if value.is_floating_point() else value for name, value in n.items()} for n in nodes]
    share = torch.tensor(weights, dtype=torch.float64)
    share = share / share.sum()
    mean = weighted_mean(nodes, share)
    terms = compile_terms(spec, [mean])
    drifts = {name: torch.zeros(len(nodes), group.size, dtype=torch.float64) for name, group in spec.groups.items()}
    for name, tensor in spec.tensors.items():
        if not tensor.buffer and mean[name].is_floating_point():
            _add_squares(spec, name, torch.stack([node[name] - mean[name] for node in nodes]), slice(None), drifts)
    grams = {name: _gram(terms, name, rows, None)[0] for name, rows in drifts.items()}
    return all(
        _bound_holds(grams[name], drift, each.expand(2))
        for name, rows in drifts.items()
        for drift, each in zip(rows.sqrt(), share, strict=True)
    )


def largest(spec, start, drifts, weights, *, apart=False):
    """The largest factor on the drifts at which they still prove the identity, by bisection."""
    low, high = 0.0, 4.0
    for _ in range(12):
        middle = (low + high) / 2
        found, numbers = seen(spec, start, around(start, drifts, middle), weights)
        low, high = (middle, high) if found.still(numbers, weights, apart=apart) else (low, middle)
    return low


def drawn(spec, seed, dtype):
    """A network, drifts with a part in common and of a different size in each tensor, and weights."""
    generator = torch.Generator().manual_seed(seed)
    count = int(torch.randint(2, 6, (1,), generator=generator))
    (start,) = draws(spec, 1, seed=3 * seed, dtype=dtype)
    common, *own = draws(spec, count + 1, seed=3 * seed + 1, dtype=dtype)
    size = {name: float(torch.rand((), generator=generator)) ** 2 for name in start}
    shared = float(torch.rand((), generator=generator))
    drifts = [{name: size[name] * (shared * common[name] + node[name]) for name in start} for node in own]
    weights = torch.rand(count, generator=generator, dtype=torch.float64).mul(3).exp().tolist()
    return start, drifts, weights


@each_spec
def test_what_the_drifts_prove_the_exact_bound_proves_too(spec):
    """Up to the very largest drifts that pass, where a bound that is too wide would show."""
    passed = 0
    for seed in range(4):
        start, drifts, weights = drawn(spec, seed, (torch.float32, torch.float64)[seed % 2])
        factor = largest(spec, start, drifts, weights)
        for share in (1.0, 0.5, 0.01):
            nodes = around(start, drifts, share * factor)
            found, numbers = seen(spec, start, nodes, weights)
            if found.still(numbers, weights):
                passed += 1
                assert exact(spec, nodes, weights)
                assert exact(spec, [start, weighted_mean(nodes, weights)], [1.0, 1.0])
    assert passed >= 8


@each_spec
def test_what_is_proven_apart_is_proven_for_each_node_next_to_the_start(spec):
    passed = 0
    for seed in range(3):
        start, drifts, weights = drawn(spec, seed, torch.float64)
        factor = largest(spec, start, drifts, weights, apart=True)
        nodes = around(start, drifts, 0.999 * factor)
        found, numbers = seen(spec, start, nodes, weights)
        if found.still(numbers, weights, apart=True):
            passed += 1
            assert all(exact(spec, [start, node], [1.0, 1.0]) for node in nodes)
    assert passed >= 2


def two_units(generator, apart):
    """Rows that lie `apart`, and drifts of unit length, most of them along the line between the rows: the worst."""
    rows = torch.randn(2, 3, generator=generator, dtype=torch.float64)
    line = torch.nn.functional.normalize(rows[0] - rows[1], dim=0)
    rows[1] = rows[0] - apart * line
    drifts = torch.nn.functional.normalize(torch.randn(4, 2, 3, generator=generator, dtype=torch.float64), dim=2)
    signs = torch.randint(-1, 2, (4, 2, 1), generator=generator)
    return rows, torch.where(signs == 0, drifts, signs * line)


def test_within_reach_a_thousand_pairs_of_units_pass_the_exact_bound_for_any_weights():
    generator = torch.Generator().manual_seed(0)
    for _ in range(1000):
        rows, drifts = two_units(generator, 1.0)
        gram = distances_of(rows)
        drifts = drifts * reach(gram)[:, None] * torch.rand(4, 2, 1, generator=generator, dtype=torch.float64) ** 0.2
        share = torch.rand(4, generator=generator, dtype=torch.float64).pow(4).clamp(min=1e-6)
        share = share / share.sum()
        mean = rows + torch.einsum("n,nuc->uc", share, drifts)
        norms = (rows + drifts - mean).norm(dim=2)
        assert all(_bound_holds(mean @ mean.T, norm, each.expand(2)) for norm, each in zip(norms, share, strict=True))


def distances_of(rows):
    spec = PermutationSpec({"h": Group(len(rows))}, {"w": TensorSpec(tuple(rows.shape), (on("h", len(rows)), ()))})
    return dict(distances(spec, {"w": rows}))["h"]


def test_beyond_the_reach_that_is_derived_a_pair_of_units_fails_the_exact_bound():
    """Two nodes of equal weight whose units drift towards each other: the constant is not far from the largest."""
    rows = torch.tensor([[0.0, 0.0], [1.0, 0.0]], dtype=torch.float64)
    for factor, holds in ((1 / 7, True), (0.26, False)):
        drifts = factor * torch.tensor([[[1.0, 0.0], [-1.0, 0.0]], [[-1.0, 0.0], [1.0, 0.0]]], dtype=torch.float64)
        norms = drifts.norm(dim=2)
        half = torch.full((2,), 0.5, dtype=torch.float64)
        assert all(_bound_holds(rows @ rows.T, norm, half) for norm in norms) == holds


@pytest.mark.parametrize("scale", [1.0, 1e-17, 1e-22, 1e15])
@pytest.mark.parametrize("common", [0.0, 300.0])
def test_nodes_in_different_orders_are_not_proven_at_any_scale(scale, common):
    spec = mlp(8, 16, 16, 4)
    nodes, _ = planted(spec, 3, 0.1, seed=0)
    nodes = [{name: ((value + common) * scale).float() for name, value in node.items()} for node in nodes]
    found, numbers = seen(spec, nodes[0], nodes, [1.0] * 3)
    assert not found.still(numbers, [1.0] * 3)


@each_spec
def test_idle_nodes_are_proven_even_where_units_coincide(spec):
    (start,) = draws(spec, 1, seed=3, dtype=torch.float32)
    same = {name: torch.ones_like(value) if value.is_floating_point() else value for name, value in start.items()}
    found, numbers = seen(spec, same, [same] * 3, [1.0, 2.0, 3.0])
    assert found.still(numbers, [1.0, 2.0, 3.0])
    twin = {name: value + 1e-3 if value.is_floating_point() else value for name, value in same.items()}
    found, numbers = seen(spec, same, [same, twin], [1.0, 1.0])
    assert not found.still(numbers, [1.0, 1.0])  # which of two equal units moved is not known


def test_some_of_the_nodes_with_other_weights_are_those_nodes_with_those_weights():
    spec = mlp(8, 16, 16, 4)
    start, *drifts = draws(spec, 4, seed=0)
    nodes = around(start, drifts, 0.9 * largest(spec, start, drifts, [1.0, 2.0, 3.0]))
    found, numbers = seen(spec, start, nodes, [1.0, 2.0, 3.0])
    assert found.still(numbers, [1.0, 2.0, 3.0])
    assert found.still([2, 0, 1], [3.0, 1.0, 2.0])
    for order, weights in (([0, 1, 2], [3.0, 2.0, 1.0]), ([0, 1], [1.0, 2.0]), ([1, 1, 0], [1.0, 2.0, 3.0])):
        some = [nodes[place] for place in order]
        fresh, again = seen(spec, start, some, weights)
        assert found.still(order, weights) == fresh.still(again, weights)
        assert found.agreement(order, weights) == pytest.approx(fresh.agreement(again, weights), rel=1e-12)


@pytest.mark.parametrize("spec", [*ALL.values(), LARGE], ids=[*ALL, "large"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_agreement_consensus_and_outliers_follow_from_the_products(spec, dtype):
    start, *drifts = draws(spec, 7, seed=2, dtype=dtype)
    nodes, weights = around(start, drifts, 0.01), [1.0, 2.0, 3.0, 1.5, 0.5, 4.0]
    nodes[2] = {name: value * 1.04 if value.is_floating_point() else value for name, value in nodes[2].items()}
    found, numbers = seen(spec, start, nodes, weights)
    assert found.complete
    order = [3, 1, 5, 0, 2, 4]
    products = found.products([numbers[place] for place in order])
    sorted_nodes, sorted_weights = [nodes[i] for i in order], [weights[i] for i in order]
    share = [weight / sum(weights) for weight in sorted_weights]
    here = [permutation.identity(spec)] * 6
    assert found.agreement(order, sorted_weights) == pytest.approx(
        pairwise_agreement(spec, sorted_nodes, here, share), rel=1e-5 if dtype == torch.float32 else 1e-12
    )
    ours, theirs = consensus_of(products, sorted_weights), consensus(spec, sorted_nodes, sorted_weights)
    torch.testing.assert_close(ours.cosines, theirs.cosines, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours.norms, theirs.norms, rtol=1e-5, atol=0)
    for name, layer in theirs.layers.items():
        torch.testing.assert_close(ours.layers[name], layer, rtol=1e-4, atol=1e-4)
    assert outliers_of(products) == find_outliers(spec, sorted_nodes, start)
    assert list(outliers_of(products)) == [order.index(2)]


@pytest.mark.parametrize("spec", [*ALL.values(), LARGE], ids=[*ALL, "large"])
def test_units_drift_as_far_as_what_carries_them(spec):
    start, drift = draws(spec, 2, seed=4)
    (node,) = around(start, [drift], 0.3)
    layout = Layout(spec, start)
    found = layout.lengths(layout.parts(node), layout.parts(start))
    squares = {name: torch.zeros(1, group.size, dtype=torch.float64) for name, group in spec.groups.items()}
    for name in layout.names:
        _add_squares(spec, name, (node[name] - start[name])[None], slice(None), squares)
    for name, expected in squares.items():
        torch.testing.assert_close(layout.of_group(found, name), expected[0].sqrt())


def test_products_do_not_depend_on_which_nodes_came_before():
    spec = LARGE
    start, *drifts = draws(spec, 6, seed=1, dtype=torch.float32)
    nodes = around(start, drifts, 0.01)
    first, _ = seen(spec, start, nodes, [1.0] * 5)
    second, _ = seen(spec, start, nodes[::-1], [1.0] * 5)
    one, other = first.products([0, 1, 2, 3, 4]), second.products([4, 3, 2, 1, 0])
    assert torch.equal(one.drifts, other.drifts)
    assert torch.equal(one.nodes, other.nodes)


def test_of_groups_too_wide_for_their_distances_the_reach_alone_proves(monkeypatch):
    spec = mlp(8, 16, 16, 4)
    start, *drifts = draws(spec, 4, seed=0)
    factor = largest(spec, start, drifts, [1.0] * 3)
    monkeypatch.setattr("c2m3_fl.core.drift._ROOM", 300)  # one matrix
    less = largest(spec, start, drifts, [1.0] * 3)
    assert 0.2 * factor < less < 0.9 * factor


def test_of_many_nodes_no_products_are_kept(monkeypatch):
    spec = mlp(2, 3, 2)
    (start,) = draws(spec, 1, seed=0)
    found, numbers = seen(spec, start, [start] * (MOST + 1), [1.0] * (MOST + 1))
    assert not found.complete
    assert found.still(numbers, [1.0] * (MOST + 1))
    spec = mlp(8, 16, 16, 4)
    start, *drifts = draws(spec, 7, seed=2)
    few, numbers = seen(spec, start, around(start, drifts, 0.01), weights := [1.0, 2.0, 3.0, 1.5, 0.5, 4.0])
    expected = few.agreement(numbers, weights)
    monkeypatch.setattr("c2m3_fl.core.drift.MOST", 4)
    many, numbers = seen(spec, start, around(start, drifts, 0.01), weights)
    assert not many.complete
    assert many.agreement(numbers, weights) == pytest.approx(expected, rel=1e-12)
    torch.testing.assert_close(many.norms(numbers), few.norms(numbers))
