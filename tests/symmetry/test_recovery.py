"""A network and a randomly permuted copy of it: the match brings the copy back, and the merge is the network again."""

from __future__ import annotations

import pytest
import torch

from c2m3_fl.core.averaging import weighted_mean
from c2m3_fl.core.match import match
from c2m3_fl.core.permutation import apply, random
from c2m3_fl.core.spec import Params, PermutationSpec
from tests.benchmarks import recovery
from tests.symmetry.families import SMALL, ZOO, Traced, build, traced

SEEDS = range(20)
RECOVERED = 1 - 1e-5  # of the agreement of a network with itself


def agreement(spec: PermutationSpec, a: Params, b: Params) -> float:
    """Share of the squared norm of `a` that its agreement with `b` reaches."""
    names = [name for name, tensor in spec.tensors.items() if not tensor.buffer]
    whole = sum(float(a[name].double().square().sum()) for name in names)
    return sum(float((a[name].double() * b[name].double()).sum()) for name in names) / whole


def recover(found: Traced, network: torch.nn.Module, seed: int) -> tuple[bool, Params]:
    """Whether the copy is brought back, and the average of both in the network's own basis."""
    params = {name: value.detach().clone() for name, value in network.state_dict().items()}
    copy = apply(found.spec, random(found.spec, torch.Generator().manual_seed(seed)), params)
    result = match(found.spec, [params, copy])
    back = apply(found.spec, result.between(0, 1), copy)
    return agreement(found.spec, params, back) >= RECOVERED, weighted_mean([params, back], None)


@pytest.mark.slow
@pytest.mark.parametrize("family", SMALL)
def test_permuted_copies_are_brought_back(family: str, record_property: pytest.RecordProperty) -> None:
    found = traced(family)
    brought = sum(recover(found, build(family, seed), seed)[0] for seed in SEEDS)
    record_property("recovered", f"{brought} of {len(SEEDS)}")
    assert brought == len(SEEDS)


@pytest.mark.parametrize("family", SMALL)
def test_merge_with_a_recovered_copy_computes_the_same(family: str) -> None:
    found = traced(family)
    network = build(family).double()
    inputs = found.inputs if isinstance(found.inputs, tuple) else (found.inputs,)
    inputs = tuple(x.double() if x.is_floating_point() else x for x in inputs)
    recovered, merged = recover(found, network, seed=0)
    assert recovered
    with torch.no_grad():
        expected = torch.utils._pytree.tree_leaves(network(*inputs))
        network.load_state_dict(merged)
        for a, b in zip(expected, torch.utils._pytree.tree_leaves(network(*inputs)), strict=True):
            torch.testing.assert_close(b, a, rtol=1e-5, atol=1e-5)


# Networks of at most 15 million parameters; the larger ones take minutes, see tests.benchmarks.recovery.
LARGE = ("alexnet", "convnext_tiny", "efficientnet_v2_s", "inception_v3", "maxvit_t", "resnext50_32x4d", "swin_t")
LARGE += ("swin_v2_t", "vgg11", "vgg11_bn", "vit_b_32", "wide_resnet50_2")
_QUICK = ("squeezenet1_1",)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in _QUICK else pytest.mark.slow) for name in ZOO if name not in LARGE]
)
def test_torchvision_networks_are_brought_back_and_compute_the_same(name: str) -> None:
    (row,) = recovery.rows(name, seeds=1, start="auto")
    assert row.recovered
    assert row.difference < 1e-5
