"""Entries of an average of different widths, by hand."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from c2m3_fl.core import permutation
from c2m3_fl.core.permutation import identity
from c2m3_fl.merging.merge import merge
from c2m3_fl.merging.widths.injections import carry, injection
from c2m3_fl.merging.widths.networks import Widths
from c2m3_fl.merging.widths.select import chosen_units
from c2m3_fl.symmetry.discover import permutation_spec
from tests.merging.networks import CALIBRATION
from tests.merging.widths.networks import WIDTHS

SLOW = ("lstm", "fused", "attention")  # tens of seconds to trace and prove at two widths


def network(units: int) -> nn.Module:
    return nn.Sequential(nn.Linear(3, units), nn.ReLU(), nn.Linear(units, 2))


def test_rows_are_means_over_their_owners_and_columns_of_missing_units_count_as_zeros() -> None:
    wide = {
        "0.weight": torch.tensor([[0.0, 0.0, 4.0], [4.0, 0.0, 0.0], [0.0, 4.0, 0.0]]),
        "0.bias": torch.tensor([3.0, 1.0, 2.0]),
        "2.weight": torch.tensor([[3.0, 1.0, 2.0], [3.0, -1.0, -2.0]]),
        "2.bias": torch.tensor([1.0, 0.0]),
    }
    narrow = {
        "0.weight": torch.tensor([[0.0, 8.0, 0.0], [8.0, 0.0, 0.0]]),  # the last two units of the wide one, swapped
        "0.bias": torch.tensor([2.0, 5.0]),
        "2.weight": torch.tensor([[2.0, 1.0], [-2.0, -1.0]]),
        "2.bias": torch.tensor([5.0, 0.0]),
    }
    models, nodes = [network(3), network(2)], [wide, narrow]
    merged = merge(models=models, state_dicts=nodes, weights=[3, 1], example_inputs=torch.zeros(1, 3))
    assert merged.widths is not None
    assert merged.widths.between(0, 1)["0"].tolist() == [-1, 1, 0]
    assert merged.widths.between(1, 0)["0"].tolist() == [2, 1]
    assert merged.widths.shares == (1.0, 2 / 3)
    found = {name: value.tolist() for name, value in merged.state_dict.items()}
    assert found["0.weight"] == [[0, 0, 4], [5, 0, 0], [0, 5, 0]]  # (3 * 4 + 8) / 4; the first unit has one owner
    assert found["0.bias"] == [3, 2, 2]  # the second: (3 * 1 + 5) / 4
    assert found["2.weight"] == [[2.25, 1, 2], [2.25, -1, -2]]  # 3 * 3 / 4: the narrow network reads no such unit
    assert found["2.bias"] == [2, 0]


def test_entries_that_no_node_with_weight_owns_are_zero() -> None:
    models = [network(4), network(2)]
    nodes = [model.state_dict() for model in models]
    found = merge(models=models, state_dicts=nodes, weights=[0, 1], example_inputs=torch.zeros(1, 3))
    assert found.widths is not None
    missing = found.widths.into[1]["0"] < 0
    assert missing.sum() == 2
    assert not found.state_dict["0.weight"][missing].any()
    assert not found.state_dict["2.weight"][:, missing].any()


def test_of_two_equal_units_one_is_kept_and_of_units_that_nothing_reads_none() -> None:
    """Units 0 and 3 are equal, and nothing reads unit 1: three units are left for a network of three."""
    inputs = torch.randn(200, 3, generator=torch.Generator().manual_seed(0))
    rows = torch.tensor([[1.0, 0.0, 0.0], [5.0, 5.0, 0.0], [0.0, 0.1, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 1.0]])
    columns = torch.tensor([[1.0, 0.0, 1.0, 1.0, 1.0], [1.0, 0.0, 1.0, 1.0, -1.0]])
    wide = {"0.weight": rows, "0.bias": torch.zeros(5), "2.weight": columns, "2.bias": torch.zeros(2)}
    widths = Widths.of([network(5)], network(3), [inputs], example_inputs=None, inputs=None, outputs=None)
    kept = chosen_units(widths.wide, widths.result.spec, wide)["0"].tolist()
    assert kept in ([0, 2, 4], [2, 3, 4])
    result = merge(models=[network(5)], state_dicts=[wide], width=network(3), calibration=[inputs], recalibrate="refit")
    model = network(5)
    model.load_state_dict(wide)
    small = network(3)
    small.load_state_dict(result.state_dict)
    torch.testing.assert_close(small(inputs), model(inputs), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", ["mlp", *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)])
def test_a_network_with_dead_units_is_cut_to_the_live_ones(name: str) -> None:
    """Recurrent layers and split matrices are not refitted; their units are chosen all the same."""
    narrow, wide = WIDTHS[name](2), WIDTHS[name](4)
    specs = [permutation_spec(model.eval(), CALIBRATION[0]) for model in (narrow, wide)]
    padded = carry(specs[0], specs[1], injection(specs[0], specs[1], identity(specs[1])), narrow.state_dict())
    spread = permutation.apply(specs[1], permutation.random(specs[1], torch.Generator().manual_seed(0)), padded)
    merged = merge(models=[wide], state_dicts=[spread], width=narrow, example_inputs=CALIBRATION[0])
    with torch.no_grad():
        expected = narrow(CALIBRATION[0])
        narrow.load_state_dict(merged.state_dict)
        torch.testing.assert_close(narrow(CALIBRATION[0]), expected, rtol=0, atol=1e-5)
