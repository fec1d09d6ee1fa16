"""The cheap proof that nothing needs to move never lies, and holds where it is needed."""

from __future__ import annotations

import pytest
import torch

from c2m3_fl.core import permutation
from c2m3_fl.core.assignment import assignment_pool, oracle
from c2m3_fl.core.identity_proof import _bound_holds, prove_identity
from c2m3_fl.core.problem import Problem
from c2m3_fl.core.spec import Group, PermutationSpec, TensorSpec
from c2m3_fl.core.starts import start_point
from c2m3_fl.core.universe import Universe
from tests.core.networks import ALL, draws, mlp, on, pairwise_agreement, planted, shared_keys

each_spec = pytest.mark.parametrize("spec", ALL.values(), ids=ALL.keys())


def drifted(spec, count, drift, seed, dtype=torch.float64):
    base = draws(spec, 1, seed=seed, dtype=dtype)[0]
    noise = draws(spec, count, seed=seed + 1, dtype=dtype)
    return [
        {name: value + drift * other[name] if torch.is_floating_point(value) else value for name, value in base.items()}
        for other in noise
    ]


@each_spec
def test_what_is_proven_is_stationary(spec):
    proven = 0
    for seed in range(10):
        for drift in (0.0, 0.03, 0.1, 0.3, 1.0):
            nodes, weights = drifted(spec, 3, drift, seed), [0.5, 0.2, 0.3]
            value = prove_identity(spec, nodes, torch.tensor(weights, dtype=torch.float64))
            if value is None:
                continue
            proven += 1
            here = [permutation.identity(spec)] * 3
            assert value == pytest.approx(pairwise_agreement(spec, nodes, here, weights), rel=1e-10)
            problem = Problem.of(spec, nodes, torch.tensor(weights, dtype=torch.float64))
            universe = Universe(problem, start_point(problem, "identity", None))
            gradient = universe.gradient(range(3))
            with assignment_pool() as pool:
                vertex = oracle(spec, gradient, pool)
            gap = sum(
                (
                    gradient[name].gather(2, vertex[name][..., None])[..., 0] - gradient[name].diagonal(dim1=1, dim2=2)
                ).sum()
                for name in spec.groups
            )
            assert float(gap) <= 1e-9 * problem.scale
    assert proven >= 10  # identical nodes at the very least


def test_clients_that_drift_little_from_one_network_are_proven_at_once():
    # Units of a random network are about 1.4 norms apart; drifts of a tenth of a norm are far inside the bound.
    spec = mlp(32, 64, 64, 10)
    for dtype in (torch.float32, torch.float64):
        assert prove_identity(spec, drifted(spec, 10, 0.1, 0, dtype), torch.full((10,), 0.1)) is not None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("scale", "common"), [(1.0, 0.0), (1e-15, 0.0), (1.0, 300.0), (1.0, 1000.0)])
def test_nodes_in_different_orders_are_not_proven_at_any_scale(dtype, scale, common):
    """Neither numbers whose squares underflow float32 nor a large common part that rounds the rest away."""
    spec = mlp(8, 16, 16, 4)
    nodes, _ = planted(spec, 3, 0.1, seed=0)
    nodes = [{name: (value * scale + common).to(dtype) for name, value in node.items()} for node in nodes]
    assert prove_identity(spec, nodes, torch.full((3,), 1 / 3, dtype=torch.float64)) is None


def test_small_drifts_are_proven_too():
    """The proof must not hold for identical nodes alone."""
    spec = mlp(8, 16, 16, 4)
    weights = torch.tensor([0.5, 0.2, 0.3], dtype=torch.float64)
    proven = [prove_identity(spec, drifted(spec, 3, 0.03, seed), weights) is not None for seed in range(10)]
    assert all(proven)


def slack(base, drift, weight):
    """``C_aa + C_bb - 2 C_ab`` of two units less the part that the dual potentials take up, at the identity."""
    others, own = (1 - weight) * base - weight * drift, base + drift
    gain = others @ own.T
    pull = (base * drift).sum(1)
    return float(gain[0, 0] + gain[1, 1] - 2 * gain[0, 1] - (pull[0] - pull[1]))


def largest_proven(base, drift, weight):
    """The largest factor on a drift for which the bound holds, by bisection."""
    ends, low, high = torch.full((2,), weight, dtype=torch.float64), 0.0, 10.0
    norms, gram = drift.norm(dim=1), base @ base.T
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if _bound_holds(gram, middle * norms, ends) else (low, middle)
    return low


@pytest.mark.parametrize("shares", [(1.0, 1.0), (1.0, 0.01), (0.01, 1.0)], ids=["both", "the first", "the second"])
@pytest.mark.parametrize("weight", [0.0, 0.1, 0.5, 0.9])
def test_up_to_the_bound_no_drift_of_two_units_breaks_it_and_the_worst_comes_close(weight, shares):
    # The worst drift of the second unit is towards the first: what a permutation would gain most from.
    generator = torch.Generator().manual_seed(0)
    closest = 1.0
    for _ in range(20):
        base = torch.randn(2, 3, generator=generator, dtype=torch.float64)
        apart = (base[0] - base[1]) / (base[0] - base[1]).norm()
        drawn = torch.nn.functional.normalize(torch.randn(2, 3, generator=generator, dtype=torch.float64), dim=1)
        for first in (-apart, apart, drawn[0]):
            for second in (-apart, apart, drawn[1]):
                drift = torch.stack([shares[0] * first, shares[1] * second])
                factor = largest_proven(base, drift, weight)
                left = min(slack(base, factor * drift, weight), slack(base.flip(0), factor * drift.flip(0), weight))
                whole = (1 - weight) * float((base[0] - base[1]).square().sum())
                assert left >= -1e-9 * whole
                closest = min(closest, left / whole)
    assert closest <= 0.6


@each_spec
def test_identical_nodes_with_identical_units_are_proven(spec):
    (node,) = draws(spec, 1, seed=3, dtype=torch.float32)
    same = {name: torch.ones_like(value) if torch.is_floating_point(value) else value for name, value in node.items()}
    for count in (2, 3, 5, 7, 10):
        assert prove_identity(spec, [same] * count, torch.full((count,), 1 / count)) is not None


@pytest.mark.parametrize("scale", [1e-18, 1e-20, 1e-23, 1e-30])
def test_squares_that_underflow_prove_nothing(scale):
    spec = mlp(8, 16, 16, 4)
    nodes, _ = planted(spec, 3, 0.1, seed=0)
    nodes = [{name: (value * scale).float() for name, value in node.items()} for node in nodes]
    assert prove_identity(spec, nodes, torch.full((3,), 1 / 3, dtype=torch.float64)) is None


def test_how_the_values_lie_in_memory_does_not_matter():
    spec = PermutationSpec({"c": Group(6)}, {"w": TensorSpec((6, 6, 3, 3), (on("c", 6), (), (), ()))})
    nodes = drifted(spec, 3, 0.05, 0)
    weights = torch.full((3,), 1 / 3, dtype=torch.float64)
    value = prove_identity(spec, nodes, weights)
    turned = [{"w": node["w"].to(memory_format=torch.channels_last)} for node in nodes]
    assert value is not None
    assert prove_identity(spec, turned, weights) == pytest.approx(value, rel=1e-12)


@pytest.mark.parametrize("blocks", [2, 200])
def test_units_with_units_for_slots_are_proven_too(blocks):
    """Whichever coordinates are looked at first: those of most blocks are zero for a unit."""
    spec, weights = shared_keys(blocks), torch.full((3,), 1 / 3, dtype=torch.float64)
    assert prove_identity(spec, drifted(spec, 3, 0.001, 0), weights) is not None
