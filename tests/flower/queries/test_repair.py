"""Repair by what the clients measure: the same as with their data pooled on the server."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from flwr.app import Message
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import FedAvg
from torch import nn

from c2m3_fl.errors import CalibrationError, ConfigError
from c2m3_fl.flower.incoming.records import from_params, to_params
from c2m3_fl.flower.queries.moments import ACTION, answer_statistics
from c2m3_fl.flower.queries.repair import ClientStatistics, repair_by_clients
from c2m3_fl.flower.serial_grid import SerialGrid
from c2m3_fl.flower.strategy import C2M3
from c2m3_fl.merging.recalibrate.refit import Refit
from c2m3_fl.merging.recalibrate.repair import BatchNormStatistics, Repair, repair
from c2m3_fl.merging.recalibrate.setting import prepare
from c2m3_fl.merging.recalibrate.shift import channel_moments
from c2m3_fl.network.calibration_set import CalibrationSet
from tests.flower.federation import (
    EXAMPLE,
    accuracy,
    answering,
    calibration,
    digits_app,
    mlp,
    normed,
    pooled,
    same,
    share,
)
from tests.flower.queries.repairs import run

NODES = 3


def convolutional(seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Unflatten(1, (1, 8, 8)),
            nn.Conv2d(1, 6, 3, bias=False),
            nn.BatchNorm2d(6),
            nn.ReLU(),
            nn.Conv2d(6, 5, 3),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(80, 10),
        )


def measured_by_clients(make, endpoints, merged, statistics, recalibration=None):
    return repair_by_clients(
        statistics,
        recalibration or Repair(),
        SerialGrid(answering(make), NODES),
        list(range(1, NODES + 1)),
        CalibrationSet.of(make(), example_inputs=EXAMPLE),
        merged,
        endpoints,
        [1.0, 2.0, 3.0],
    ).state_dict


def networks(make):
    endpoints = [{name: value.clone() for name, value in make(seed).state_dict().items()} for seed in range(NODES)]
    merged = {
        name: sum(endpoint[name] for endpoint in endpoints) / NODES if value.is_floating_point() else value
        for name, value in endpoints[0].items()
    }
    return endpoints, merged


@pytest.mark.parametrize("make", [mlp, normed, convolutional])
def test_it_is_the_repair_that_the_pooled_data_give(make):
    endpoints, merged = networks(make)
    found = measured_by_clients(make, endpoints, merged, ClientStatistics(endpoints="all"))
    expected = repair(make(), merged, endpoints, pooled(), weights=[1.0, 2.0, 3.0], example_inputs=EXAMPLE).state_dict
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-6)
    assert any(not torch.equal(found[name], merged[name]) for name in merged)


@pytest.mark.parametrize("make", [mlp, normed, convolutional])
def test_batch_norm_statistics_are_those_of_the_pooled_data(make):
    endpoints, merged = networks(make)
    found = measured_by_clients(make, endpoints, merged, ClientStatistics(), BatchNormStatistics())
    setting = prepare(make(), merged, endpoints, pooled(), example_inputs=EXAMPLE)
    for name, value in BatchNormStatistics()(setting).state_dict.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-6)


def with_the_data_on_the_server(make, endpoints, merged, recalibration=None):
    """What a server does that holds all data: each endpoint on its client's share, the merged network on all."""
    setting = prepare(make(), merged, endpoints, pooled(), weights=[1.0, 2.0, 3.0], example_inputs=EXAMPLE)
    own = [channel_moments(make(), params, [data]) for params, data in zip(endpoints, pooled(), strict=True)]
    vars(setting)["moments"] = [own[index] for index in setting.order]
    return (recalibration or Repair())(setting).state_dict


@pytest.mark.parametrize("make", [mlp, normed, convolutional])
@pytest.mark.parametrize("recalibration", [Repair(), Repair(final=False)])
def test_by_default_it_is_what_a_server_with_all_data_does_with_each_endpoint_on_its_own_share(make, recalibration):
    endpoints, merged = networks(make)
    found = measured_by_clients(make, endpoints, merged, ClientStatistics(), recalibration)
    expected = with_the_data_on_the_server(make, endpoints, merged, recalibration)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-6)
    assert any(not torch.equal(found[name], merged[name]) for name in merged)


@pytest.mark.parametrize("make", [mlp, normed, convolutional])
def test_where_all_shares_are_alike_the_default_is_the_repair_that_the_pooled_data_give(make):
    app = ClientApp()
    answer_statistics(app, model=lambda context: make(), data=lambda context: calibration())
    endpoints, merged = networks(make)
    grid, ids, weights = SerialGrid(app, NODES), list(range(1, NODES + 1)), [1.0, 2.0, 3.0]
    found = repair_by_clients(
        ClientStatistics(),
        Repair(),
        grid,
        ids,
        CalibrationSet.of(make(), example_inputs=EXAMPLE),
        merged,
        endpoints,
        weights,
    ).state_dict
    everything = calibration() * NODES
    expected = repair(make(), merged, endpoints, everything, weights=weights, example_inputs=EXAMPLE).state_dict
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-6)


def test_a_strategy_with_client_statistics_ends_like_one_that_holds_all_data():
    """From the first message to the result, by Flower's own loop."""
    data = [share(SimpleNamespace(node_config={"partition-id": partition})) for partition in range(NODES)]
    pooled_loader = [batch for part in data for batch in part]
    app = answering(app=digits_app(independent=True, epochs=3))
    found = run(SerialGrid(app, NODES), calibration=ClientStatistics(endpoints="all"), rounds=1)
    expected = run(SerialGrid(app, NODES), calibration=pooled_loader, rounds=1)
    assert found.train_metrics_clientapp[1]["c2m3-repaired"] == 1
    for name, value in to_params(expected.arrays).items():
        torch.testing.assert_close(to_params(found.arrays)[name], value, rtol=1e-5, atol=1e-5)


def listening(seen, make=mlp):
    """A federation whose clients note what they are sent in queries."""

    class Grid(SerialGrid):
        def push_messages(self, messages):
            messages = list(messages)
            seen.extend(each for each in messages if each.metadata.message_type == f"query.{ACTION}")
            return super().push_messages(messages)

    return Grid(answering(make, digits_app(make, independent=True, epochs=5)), 4)


def test_nobody_is_sent_another_clients_network_unless_asked_for():
    for endpoints, subjects in (("own", 2), ("all", 5)):
        seen: list[Message] = []
        strategy = C2M3(
            FedAvg(fraction_evaluate=0.0),
            model=mlp(),
            recalibrate="repair",
            example_inputs=EXAMPLE,
            calibration=ClientStatistics(endpoints=endpoints),
        )
        strategy.start(listening(seen), from_params(mlp().state_dict()), num_rounds=1)
        assert len({each.metadata.group_id for each in seen if each.metadata.dst_node_id == 1}) == subjects


def test_a_federation_without_calibration_data_on_the_server_is_repaired():
    app = answering(app=digits_app(independent=True, epochs=5))
    result = run(SerialGrid(app, 4), calibration=ClientStatistics())
    assert [metrics["c2m3-repaired"] for metrics in result.train_metrics_clientapp.values()] == [1, 1]
    assert accuracy(mlp, result.arrays) > 0.8


def test_what_moments_cannot_give_is_refused_at_once():
    with pytest.raises(ConfigError, match="Refit needs inputs, not moments"):
        C2M3(model=mlp(), example_inputs=EXAMPLE, calibration=ClientStatistics(), recalibrate=Refit())
    with pytest.raises(ConfigError, match="endpoints is 'some'"):
        ClientStatistics(endpoints="some")
    with pytest.raises(CalibrationError, match="shows the server no input: pass example_inputs"):
        C2M3(model=mlp(), calibration=ClientStatistics(), recalibrate="repair")


def test_the_result_does_not_depend_on_the_order_of_the_answers():
    def run_in(order):
        app = answering(app=digits_app(independent=True, epochs=3))
        return run(SerialGrid(app, 4, transit=order), calibration=ClientStatistics()).arrays

    assert same(run_in(list), run_in(lambda replies: replies[::-1]))
