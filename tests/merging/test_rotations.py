"""Merges in which streams and the insides of heads rotate."""

from __future__ import annotations

import copy
from functools import cache

import pytest
import torch
from torch import Tensor
from torch.func import functional_call

from c2m3_fl import PermutationSpec, TensorSpec, fold, merge, permutation_spec
from c2m3_fl.core.permutation import apply, random
from c2m3_fl.errors import ConfigError
from tests.symmetry.streams import made

INPUTS = torch.randn(32, 8, 8, generator=torch.Generator().manual_seed(0))
NETWORK = made("pre-norm")
OWN = {name: value.clone() for name, value in NETWORK.state_dict().items()}


@cache
def spec() -> PermutationSpec:
    return permutation_spec(NETWORK, INPUTS[:4], rotations=True)


@cache
def turned() -> dict[str, Tensor]:
    """The same function, every group moved at random."""
    return apply(spec(), random(spec(), torch.Generator().manual_seed(1)), fold(NETWORK, OWN, INPUTS[:4]))


def output(params: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return functional_call(NETWORK, params, (INPUTS,))


@pytest.mark.parametrize("start", ["identity", "activations"])
def test_a_rotated_copy_is_brought_back_and_the_merge_computes_the_same(start: str) -> None:
    merged = merge(
        NETWORK, [OWN, turned()], spec=spec(), calibration=[INPUTS], recalibrate="none", start=start, basis=0
    )
    torch.testing.assert_close(output(merged.state_dict), output(OWN), rtol=0, atol=1e-5)
    assert bool((merged.state_dict["norm.weight"] == 1).all())
    NETWORK.load_state_dict(merged.state_dict)
    NETWORK.load_state_dict(OWN)


def test_where_nothing_moves_the_tensors_are_the_nodes_own() -> None:
    merged = merge(NETWORK, [OWN, OWN], spec=spec(), example_inputs=INPUTS[:4])
    assert all(torch.equal(merged.state_dict[name], value) for name, value in OWN.items())


def trained(seed: int) -> dict[str, Tensor]:
    """Some steps of AdamW from `OWN` on data of its own."""
    generator = torch.Generator().manual_seed(seed)
    network = copy.deepcopy(NETWORK)
    optimiser = torch.optim.AdamW(network.parameters(), 2e-3, weight_decay=0.1)
    for _ in range(30):
        optimiser.zero_grad()
        labels = torch.randint(3, (16,), generator=generator)
        loss = torch.nn.functional.cross_entropy(network(torch.randn(16, 8, 8, generator=generator)), labels)
        loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        optimiser.step()
    return {name: value.detach() for name, value in network.state_dict().items()}


def test_after_training_from_one_start_the_merge_is_the_mean_bit_for_bit() -> None:
    nodes = [trained(seed) for seed in range(3)]
    merged = merge(NETWORK, nodes, spec=spec(), example_inputs=INPUTS[:4])
    assert merged.match is not None
    assert merged.match.gap > 1e-4  # AdamW has turned what may be turned
    expected = merge(NETWORK, nodes, example_inputs=INPUTS[:4], method="mean").state_dict
    assert all(torch.equal(value, expected[name]) for name, value in merged.state_dict.items())


def test_rotations_that_cannot_be_had_are_refused() -> None:
    plain = PermutationSpec({}, {name: TensorSpec(tuple(v.shape), ((),) * v.ndim) for name, v in OWN.items()})
    with pytest.raises(ConfigError, match="the given spec has permutations alone"):
        merge(NETWORK, [OWN, OWN], spec=plain, rotations=True)
    with pytest.raises(ConfigError, match="group 'embedding' of the spec rotates"):
        merge(NETWORK, [OWN, OWN], spec=spec())
