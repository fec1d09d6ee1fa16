"""The group of permutations that a spec allows, and its action on params."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional

from c2m3_fl.core import permutation
from c2m3_fl.core.spec import Group, PermutationSpec, Segment, TensorSpec
from c2m3_fl.errors import ParamsError, SpecError
from tests.core.networks import ALL, attention, draw, grouped, on

specs = st.sampled_from(list(ALL.values()))
seeds = st.integers(0, 2**31)


def drawn(spec, seed, count):
    generator = torch.Generator().manual_seed(seed)
    return [permutation.random(spec, generator) for _ in range(count)]


def same(left, right):
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


@given(specs, seeds)
def test_group_axioms(spec, seed):
    a, b, c = drawn(spec, seed, 3)
    one = permutation.identity(spec)
    assert same(permutation.compose(a, permutation.compose(b, c)), permutation.compose(permutation.compose(a, b), c))
    assert same(permutation.compose(a, one), a)
    assert same(permutation.compose(one, a), a)
    assert permutation.is_identity(permutation.compose(a, permutation.invert(a)))
    assert permutation.is_identity(permutation.compose(permutation.invert(a), a))


@given(specs, seeds)
def test_the_spec_allows_what_it_draws_and_what_follows(spec, seed):
    a, b = drawn(spec, seed, 2)
    for perm in (a, permutation.identity(spec), permutation.invert(a), permutation.compose(a, b)):
        permutation.validate(spec, perm)


@given(specs, seeds)
def test_the_action_is_a_group_action(spec, seed):
    a, b = drawn(spec, seed, 2)
    params = draw(spec, torch.Generator().manual_seed(seed))
    one_by_one = permutation.apply(spec, a, permutation.apply(spec, b, params))
    assert same(one_by_one, permutation.apply(spec, permutation.compose(a, b), params))
    assert same(permutation.apply(spec, permutation.identity(spec), params), params)
    there = permutation.apply(spec, a, params)
    assert same(permutation.apply(spec, permutation.invert(a), there), params)


@given(specs, seeds)
def test_moved_is_the_action_tensor_by_tensor(spec, seed):
    (perm,), params = drawn(spec, seed, 1), draw(spec, torch.Generator().manual_seed(seed))
    assert same(dict(permutation.Moved(spec, perm, params)), permutation.apply(spec, perm, params))


@given(specs, seeds)
def test_between_goes_through_the_universe(spec, seed):
    a, b = drawn(spec, seed, 2)
    universe = draw(spec, torch.Generator().manual_seed(seed))
    node_a, node_b = (permutation.apply(spec, permutation.invert(perm), universe) for perm in (a, b))
    assert same(permutation.apply(spec, permutation.between(a, b), node_b), node_a)


def test_around_a_cycle_of_three_the_hand_worked_maps_compose():
    # Universe (x, y, z). Node 0 stores (y, z, x), node 1 stores (z, x, y), node 2 stores (y, x, z); perm[u] is where a
    # node keeps unit u: node 0 keeps x at 2, y at 0, z at 1, and so on. between(1, 0) must rewrite (y, z, x) as
    # (z, x, y): place 0 of node 1 is place 1 of node 0, and so on: (1, 2, 0), which differs from its own transpose.
    spec = PermutationSpec({"g": Group(3)}, {"w": TensorSpec((3,), (on("g", 3),))})
    perms = [{"g": torch.tensor(index)} for index in ([2, 0, 1], [1, 2, 0], [1, 0, 2])]
    stored = [torch.tensor([2, 3, 1]), torch.tensor([3, 1, 2]), torch.tensor([2, 1, 3])]
    for perm, node in zip(perms, stored, strict=True):
        assert permutation.apply(spec, perm, {"w": node})["w"].tolist() == [1, 2, 3]
    assert permutation.between(perms[1], perms[0])["g"].tolist() == [1, 2, 0]
    assert permutation.between(perms[2], perms[1])["g"].tolist() == [2, 1, 0]
    assert permutation.between(perms[0], perms[2])["g"].tolist() == [0, 2, 1]
    assert permutation.cycle_error(perms) == 0
    assert permutation.share_moved(permutation.between(perms[1], perms[0])) == 1
    assert permutation.share_moved(permutation.between(perms[0], perms[2])) == pytest.approx(2 / 3)


@given(seeds)
def test_grouped_convolution_computes_the_same_function(seed):
    spec = grouped()
    generator = torch.Generator().manual_seed(seed)
    params, perm = draw(spec, generator), permutation.random(spec, generator)
    x = torch.randn(2, 3, 7, generator=generator, dtype=torch.float64)

    def forward(p):
        hidden = functional.conv1d(x, p["before"][..., None])
        hidden = functional.conv1d(hidden, p["grouped"], groups=2).tanh()
        hidden = functional.conv1d(hidden, p["depthwise"], groups=6).tanh()
        return functional.conv1d(hidden, p["after"][..., None])

    torch.testing.assert_close(forward(permutation.apply(spec, perm, params)), forward(params))


@given(seeds)
def test_heads_compute_the_same_function(seed):
    spec = attention()
    generator = torch.Generator().manual_seed(seed)
    params, perm = draw(spec, generator), permutation.random(spec, generator)
    x = torch.randn(4, 5, generator=generator, dtype=torch.float64)

    def forward(p):
        q, k, v = ((x @ p[name].T).reshape(4, 3, 2).transpose(0, 1) for name in "qkv")
        heads = ((q @ k.transpose(1, 2)) * p["temperature"][:, None, None]).softmax(-1) @ v
        return heads.transpose(0, 1).reshape(4, 6) @ p["o"].T

    torch.testing.assert_close(forward(permutation.apply(spec, perm, params)), forward(params))


def test_blocks_that_are_torn_apart_are_refused():
    spec = attention()
    torn = {**permutation.identity(spec), "qk": torch.tensor([2, 1, 0, 3, 4, 5])}
    with pytest.raises(SpecError, match="'qk' tears apart the blocks of its parent 'head'"):
        permutation.validate(spec, torn)
    unnested = PermutationSpec(
        {"in": Group(4), "out": Group(4)}, {"w": TensorSpec((4, 2), (on("out", 4), on("in", 4)), diagonal=2)}
    )
    apart = {"in": torch.arange(4), "out": torch.tensor([2, 1, 0, 3])}
    with pytest.raises(SpecError, match="move to different blocks"):
        permutation.apply(unnested, apart, {"w": torch.zeros(4, 2)})


@pytest.mark.parametrize(
    ("perm", "message"),
    [
        ({}, "has groups"),
        ({"g": torch.tensor([0, 1])}, "no permutation of its 3 units"),
        ({"g": torch.tensor([0, 1, 1])}, "no permutation of its 3 units"),
        ({"g": torch.tensor([1, 2, 3])}, "no permutation of its 3 units"),
    ],
)
def test_what_is_no_permutation_is_refused(perm, message):
    spec = PermutationSpec({"g": Group(3)}, {"w": TensorSpec((3,), ((Segment.contiguous("g", 3),),))})
    with pytest.raises(SpecError, match=message):
        permutation.validate(spec, perm)


def test_what_is_of_another_network_is_refused() -> None:
    spec, params = ALL["mlp"], {"x": torch.zeros(2)}
    identity = permutation.identity(spec)
    with pytest.raises(ParamsError, match="the state dict is not of this spec: got keys such as 'x'"):
        permutation.apply(spec, identity, params)
    with pytest.raises(ParamsError, match=r"the permutation is .* the order is apply\(spec, permutation, "):
        permutation.apply(spec, params, identity)
