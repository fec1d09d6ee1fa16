"""A client whose answers to queries are faulty leaves the deployed model to the others."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from flwr.serverapp.strategy import FedAvg

from c2m3_fl.flower.incoming.records import from_params, to_params
from c2m3_fl.flower.queries.refit import ClientRefit, RegMean
from c2m3_fl.flower.queries.repair import ClientStatistics
from c2m3_fl.flower.serial_grid import SerialGrid
from c2m3_fl.flower.strategy import C2M3
from tests.flower.federation import EXAMPLE, answering, digits_app, mlp
from tests.flower.queries.faulty_answers import FAULTS, LIAR, Faulty

WAYS = {
    "refit": {"recalibrate": ClientRefit(first_layer=True)},
    "refit at once": {"recalibrate": ClientRefit(first_layer=True, exchanges=1)},
    "regression mean": {"recalibrate": RegMean(first_layer=True)},
    "head": {"head": "labels"},
    "moments": {"calibration": ClientStatistics(), "recalibrate": "repair"},
}
FAST = ["random bytes", "negative counts", "2**53 examples", "70 dimensions", "NaN", "1e37"]


def deployed(way, transit=None):
    """The deployed model of four clients after one round, and the aggregate."""
    app = answering(app=digits_app(epochs=1, rate=0.02), first_layer=True)
    strategy = C2M3(
        FedAvg(fraction_evaluate=0.0), model=mlp(), example_inputs=EXAMPLE, judge=None, feedback="never", **WAYS[way]
    )
    result = strategy.start(SerialGrid(app, 4, transit=transit), from_params(mlp().state_dict()), num_rounds=1)
    return to_params(result.arrays), to_params(strategy.trajectory)


@cache
def without(way, since=1):
    """What is deployed where the client's answers are lost, and the aggregate."""
    return deployed(way, Faulty(None, since))


def assert_left_to_the_others(way, fault, since=1):
    expected, aggregate = without(way, since)
    assert not all(torch.equal(expected[name], aggregate[name]) for name in expected)
    assert_same(deployed(way, Faulty(FAULTS[fault], since))[0], expected)


def assert_same(found, expected):
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("fault", FAST)
def test_a_refit_with_one_faulty_client_is_that_of_the_others(fault):
    assert_left_to_the_others("refit", fault)


@pytest.mark.parametrize("fault", FAST)
def test_a_head_with_one_faulty_client_is_that_of_the_others(fault):
    assert_left_to_the_others("head", fault)


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("way", WAYS)
def test_whatever_one_client_answers_the_deployed_model_is_that_of_the_others(way, fault):
    assert_left_to_the_others(way, fault)


@pytest.mark.parametrize("way", ["refit", "head"])
def test_a_client_that_answers_garbage_after_the_first_exchange_is_as_if_it_had_vanished_then(way):
    assert_left_to_the_others(way, "random bytes", since=2)


def test_a_client_that_answers_some_operators_only_counts_for_those():
    def transit(replies):
        for each in replies:
            if each.metadata.src_node_id == LIAR and "sums" in each.content:
                record = each.content["sums"]
                for name in [name for name in record if name.startswith("linear_1/")]:
                    del record[name]
        return replies

    (found, _), (everybody, _), (others, _) = (
        deployed("refit at once", transit),
        deployed("refit at once"),
        without("refit at once"),
    )
    expected = {name: (others if name.startswith("2.") else everybody)[name] for name in found}
    assert not torch.equal(everybody["4.weight"], others["4.weight"])
    assert_same(found, expected)
