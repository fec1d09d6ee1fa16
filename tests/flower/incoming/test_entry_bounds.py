"""Claims and values that would steer or freeze a round."""

from __future__ import annotations

import math

import pytest
import torch
from flwr.server.strategy import FedAvg as LegacyFedAvg
from flwr.server.strategy import Krum as LegacyKrum
from flwr.serverapp.strategy import FedAvg, FedMedian, Krum, QFedAvg

from c2m3_fl.errors import ParamsError
from c2m3_fl.flower.incoming.records import from_params, schema_of, to_params
from c2m3_fl.flower.incoming.replies import check_weight, sort_messages
from c2m3_fl.flower.strategy import C2M3
from tests.flower.federation import EXAMPLE, aggregate, clients, good, mlp, reply, same
from tests.flower.legacy_federation import fit_result, legacy

BAD_NODE = 9


def filled(value: float) -> dict[str, torch.Tensor]:
    return {name: torch.full_like(tensor, value) for name, tensor in clients(1)[0].items()}


@pytest.mark.parametrize("claim", [1.7e308, 2.0**54, 10**300, 2**53 + 1])
def test_nobody_has_more_examples_than_floats_can_count(claim):
    assert check_weight(2**53, "num-examples") == 2.0**53
    with pytest.raises(ParamsError, match=r"expected a positive finite number, at most 2\*\*53"):
        check_weight(claim, "num-examples")


def test_two_claims_whose_sum_overflows_cost_these_replies(caplog):
    claim = 1.7e308
    expected, _ = aggregate(good())
    claiming = [reply(node, clients(4)[3], examples=claim) for node in (8, 9)]
    arrays, metrics = aggregate([*good(), *claiming])
    assert same(arrays, expected)
    assert metrics["c2m3-dropped"] == 2
    assert sum("at most 2**53" in text for text in caplog.messages) == 2
    fine = [fit_result(node, params) for node, params in enumerate(clients(3))]
    parameters, metrics = legacy().aggregate_fit(1, [*fine, fit_result(9, clients(4)[3], examples=claim)], [])
    assert metrics["c2m3-dropped"] == 1
    assert parameters.tensors == legacy().aggregate_fit(1, fine, [])[0].tensors


INSIDE = {"FedAvg": FedAvg, "FedMedian": FedMedian, "Krum": lambda: Krum(num_malicious_nodes=1)}


@pytest.mark.parametrize("inside", INSIDE.values(), ids=INSIDE.keys())
def test_one_reply_whose_squares_overflow_costs_that_reply(inside, caplog):
    expected, _ = aggregate(good(), C2M3(inside(), model=mlp(), example_inputs=EXAMPLE))
    strategy = C2M3(inside(), model=mlp(), example_inputs=EXAMPLE)
    arrays, metrics = aggregate([*good(), reply(BAD_NODE, filled(3.4e38))], strategy)
    assert same(arrays, expected)
    assert (metrics["c2m3-dropped"], metrics["c2m3-kept-previous"]) == (1, 0)
    assert any(f"node {BAD_NODE}: its norm is" in text for text in caplog.messages)


@pytest.mark.parametrize(("value", "taken"), [(-3.4e38, False), (1e20, False), (1e18, False), (1e17, True)])
def test_replies_are_taken_up_to_a_norm_whose_square_is_a_float(value, taken):
    """4,000 elements of 1e18 have a norm of 5.4e19."""
    messages = [reply(BAD_NODE, filled(value))]
    found = sort_messages(messages, schema_of(from_params(clients(1)[0])), weighted_by="num-examples")
    assert bool(found.replies) == taken


def test_one_legacy_result_whose_squares_overflow_costs_that_result():
    fine = [fit_result(node, params) for node, params in enumerate(clients(3))]
    expected, _ = legacy(LegacyKrum(num_malicious_clients=1)).aggregate_fit(1, fine, [])
    parameters, metrics = legacy(LegacyKrum(num_malicious_clients=1)).aggregate_fit(
        1, [*fine, fit_result(BAD_NODE, filled(3.4e38))], []
    )
    assert parameters.tensors == expected.tensors
    assert (metrics["c2m3-dropped"], metrics["c2m3-kept-previous"]) == (1, 0)


def test_the_largest_reply_that_is_taken_can_be_computed_with():
    """Just below the bound the match still ends, and the reply is named."""
    size = math.sqrt(sum(value.numel() for value in clients(1)[0].values()))
    arrays, metrics = aggregate([*good(), reply(BAD_NODE, filled(1.8e19 / size))])
    flags = dict(zip(metrics["c2m3-nodes"], metrics["c2m3-node-outlier"], strict=True))
    assert flags[BAD_NODE] == 1
    assert metrics["c2m3-dropped"] == 0
    assert all(bool(torch.isfinite(value).all()) for value in to_params(arrays).values())


def with_loss(node: int, loss: float, params=None):
    return reply(node, clients(4)[node % 4] if params is None else params, metrics={"train_loss": loss})


@pytest.mark.parametrize("loss", [1e308, 1e13, -1.0, -1e-9, math.nan, math.inf, 1e9])
def test_losses_that_would_decide_q_fed_avg_alone_are_dropped(loss):
    messages = [*(with_loss(node, 0.5 + node) for node in range(3)), with_loss(BAD_NODE, loss)]
    schema = schema_of(from_params(mlp().state_dict()))
    found = sort_messages(messages, schema, weighted_by="num-examples", required=["train_loss"])
    assert sorted(each.node for each in found.replies) == [0, 1, 2]
    (dropped,) = found.dropped
    assert dropped.node == BAD_NODE
    assert dropped.reason.startswith("metric 'train_loss' is")


def test_a_huge_loss_changes_nothing_of_q_fed_avg():
    fine = [with_loss(node, 0.5 + node) for node in range(3)]
    strategy = C2M3(QFedAvg(client_learning_rate=0.1, q=0.5), model=mlp(), example_inputs=EXAMPLE, memory=0)
    expected, _ = aggregate(fine, strategy)
    arrays, metrics = aggregate([*fine, with_loss(BAD_NODE, 1e308)], strategy)
    assert same(arrays, expected)
    assert metrics["c2m3-dropped"] == 1


def test_losses_of_clients_that_have_fitted_their_data_and_of_one_that_has_not_are_taken():
    losses = [0.0, 1e-9, 1e-7, 2.3]
    messages = [with_loss(node, loss) for node, loss in enumerate(losses)]
    schema = schema_of(from_params(mlp().state_dict()))
    found = sort_messages(messages, schema, weighted_by="num-examples", required=["train_loss"])
    assert (len(found.replies), len(found.dropped)) == (4, 0)


def test_training_metrics_that_are_nan_are_left_out_of_the_average_and_the_model_is_not():
    params = clients(3)
    plain = [reply(node, each, examples=10 * (node + 1)) for node, each in enumerate(params)]
    expected, _ = aggregate(plain)
    values = [{"auc": 0.5, "loss": 1.0}, {"auc": 0.8, "loss": 2.0}, {"auc": math.nan, "loss": 3.0}]
    replies = [reply(n, params[n], examples=10 * (n + 1), metrics=values[n]) for n in range(3)]
    arrays, metrics = aggregate(replies)
    assert same(arrays, expected)
    assert metrics["auc"] == pytest.approx((10 * 0.5 + 20 * 0.8) / 30)
    assert metrics["loss"] == pytest.approx((10 * 1 + 20 * 2 + 30 * 3) / 60)
    assert (metrics["c2m3-not-averaged"], metrics["c2m3-dropped"]) == (1, 0)
    _, metrics = aggregate([reply(n, params[n], metrics={"auc": math.nan, "loss": 1.0}) for n in range(3)])
    assert (metrics["loss"], metrics["c2m3-not-averaged"]) == (1.0, 3)
    assert "auc" not in metrics


def test_legacy_training_metrics_that_are_nan_are_left_out_of_the_average():
    mean = lambda found: {"auc": sum(n * each["auc"] for n, each in found) / sum(n for n, _ in found)}  # noqa: E731  # short
    aucs = [0.5, 0.8, math.nan]
    results = [fit_result(n, params, metrics={"auc": aucs[n], "who": "me"}) for n, params in enumerate(clients(3))]
    _, metrics = legacy(LegacyFedAvg(fit_metrics_aggregation_fn=mean)).aggregate_fit(1, results, [])
    assert metrics["auc"] == pytest.approx(0.65)
