"""A wrapped strategy that returns nothing of use, or raises, costs its round and no more."""

from __future__ import annotations

import math
from logging import DEBUG, ERROR

import numpy as np
import pytest
import torch
from flwr.app import Array
from flwr.serverapp.strategy import Bulyan, FedAvg, FedAvgM, FedTrimmedAvg, QFedAvg

from c2m3_fl.flower.incoming.records import from_params, to_params
from c2m3_fl.flower.resuming.resumable import Resumable
from c2m3_fl.flower.serial_grid import SerialGrid
from c2m3_fl.flower.strategy import C2M3
from tests.flower.federation import (
    EXAMPLE,
    aggregate,
    clients,
    digits_app,
    good,
    mlp,
    reply,
    same,
    send,
)


class ReturnsNothing(FedAvg):
    def aggregate_train(self, server_round, replies):
        return None, None


def test_a_wrapped_strategy_that_returns_nothing_leaves_the_previous_model():
    arrays, metrics = aggregate(good(), C2M3(ReturnsNothing(), model=mlp(), example_inputs=EXAMPLE))
    assert same(arrays, from_params(mlp().state_dict()))
    assert metrics["c2m3-kept-previous"] == 1


def test_too_few_replies_for_bulyan_leave_the_previous_model():
    arrays, metrics = aggregate(good(), C2M3(Bulyan(num_malicious_nodes=1), model=mlp(), example_inputs=EXAMPLE))
    assert same(arrays, from_params(mlp().state_dict()))
    assert metrics["c2m3-kept-previous"] == 1


class Overflowing(FedAvgM):
    """Momentum that blows up in round one only."""

    def aggregate_train(self, server_round, replies):
        arrays, metrics = super().aggregate_train(server_round, replies)
        if server_round == 1:
            self.momentum_vector = [np.full_like(each, np.nan) for each in self.momentum_vector]
            arrays = from_params({name: value * math.nan for name, value in to_params(arrays).items()})
        return arrays, metrics


def test_a_result_that_is_not_finite_is_refused_together_with_the_state_that_made_it():
    strategy = C2M3(Overflowing(server_momentum=0.5), model=mlp(), example_inputs=EXAMPLE)
    first, metrics = aggregate(good(), strategy)
    assert same(first, from_params(mlp().state_dict()))
    assert metrics["c2m3-kept-previous"] == 1
    send(strategy, to_params(first), round_number=2)
    second, metrics = strategy.aggregate_train(2, good())
    assert metrics["c2m3-kept-previous"] == 0
    assert all(torch.isfinite(value).all() for value in to_params(second).values())


def test_the_loss_that_q_fed_avg_needs_is_checked_like_the_weight():
    strategy = C2M3(QFedAvg(client_learning_rate=0.1), model=mlp(), example_inputs=EXAMPLE)
    losses = [0.5, 0.4, math.nan]
    messages = [
        reply(node, params, metrics={"train_loss": loss})
        for node, (params, loss) in enumerate(zip(clients(3), losses, strict=True))
    ]
    _, metrics = aggregate(messages, strategy)
    assert (metrics["c2m3-replies"], metrics["c2m3-dropped"]) == (2, 1)


class Raising(FedAvgM):
    """Fails in some rounds, when its state has already moved on."""

    def __init__(self, *rounds, **options):
        super().__init__(server_momentum=0.5, fraction_evaluate=0.0, **options)
        self.rounds = rounds

    def aggregate_train(self, server_round, replies):
        arrays, metrics = super().aggregate_train(server_round, replies)
        if server_round in self.rounds:
            self.momentum_vector = [np.full_like(each, np.nan) for each in self.momentum_vector]
            raise ZeroDivisionError("all weights are zero")
        return arrays, metrics


class Returning(FedAvg):
    """Returns what it was told to, or FedAvg's own result with one array replaced or added."""

    def __init__(self, result=None, **arrays):
        super().__init__()
        self.result, self.arrays = result, arrays

    def aggregate_train(self, server_round, replies):
        arrays, metrics = super().aggregate_train(server_round, replies)
        for name, array in self.arrays.items():
            arrays[name.replace("_", ".")] = array
        return self.result or (arrays, metrics)


def trimming_all():
    strategy = FedTrimmedAvg()
    strategy.beta = 0.6  # which the constructor refuses today
    return strategy


def failing(*args):
    raise KeyError("accuracy")


USELESS = {
    "raises": (lambda: Raising(1), "the wrapped strategy Raising failed: ZeroDivisionError: all weights are zero"),
    "trims more than there is": (
        trimming_all,
        "the wrapped strategy FedTrimmedAvg failed: AggregationError: Trimmed mean could not",
    ),
    "the user's function raises": (lambda: FedAvg(train_metrics_aggr_fn=failing), "FedAvg failed: KeyError"),
    "returns no pair": (lambda: Returning(5), "the wrapped strategy Returning failed: TypeError"),
    "returns no metrics": (lambda: Returning((from_params(mlp(1).state_dict()), 5)), "Returning failed: TypeError"),
    "returns one array more": (lambda: Returning(extra=Array(np.zeros(3))), "differs from the replies in keys"),
    "returns another shape": (lambda: Returning(**{"2_bias": Array(np.zeros((1,)))}), "has shape (1,), expected (32,)"),
    "returns text": (lambda: Returning(**{"2_bias": Array(np.array(["w"] * 32))}), "has dtype <U1"),
}


@pytest.mark.parametrize(("make", "reason"), USELESS.values(), ids=USELESS.keys())
def test_a_wrapped_strategy_that_fails_costs_the_round_not_the_run(make, reason, caplog):
    with caplog.at_level(DEBUG, logger="flwr"):
        arrays, metrics = aggregate(good(), C2M3(make(), model=mlp(), example_inputs=EXAMPLE))
    assert same(arrays, from_params(mlp().state_dict()))
    assert (metrics["c2m3-kept-previous"], metrics["c2m3-replies"]) == (1, 3)
    (line,) = [each for each in caplog.records if "the previous global model stays" in each.getMessage()]
    assert reason in line.getMessage()
    if "failed:" in reason:
        assert line.levelno == ERROR
        assert any(each.levelno == DEBUG and each.exc_info for each in caplog.records), "the traceback, to debug"


def test_after_a_failed_round_the_wrapped_strategy_goes_on_from_where_it_was():
    failed, spared = (C2M3(Raising(*when), model=mlp(), example_inputs=EXAMPLE) for when in ([1], []))
    arrays, _ = aggregate(good(), failed)
    send(failed, to_params(arrays), round_number=2)
    send(spared, mlp().state_dict(), round_number=2)
    found, metrics = failed.aggregate_train(2, good())
    expected, _ = spared.aggregate_train(2, good())
    assert metrics["c2m3-kept-previous"] == 0
    assert same(found, expected)


def run(strategy, rounds=3):
    return strategy.start(SerialGrid(digits_app(epochs=1), 3), from_params(mlp().state_dict()), num_rounds=rounds)


@pytest.mark.parametrize("resumable", [False, True])
def test_a_run_in_which_every_round_failed_says_so_loudly(resumable, tmp_path, caplog):
    strategy = C2M3(Raising(1, 2, 3), model=mlp(), example_inputs=EXAMPLE)
    result = run(Resumable(strategy, tmp_path) if resumable else strategy)
    assert same(result.arrays, from_params(mlp().state_dict()))
    assert [metrics["c2m3-kept-previous"] for metrics in result.train_metrics_clientapp.values()] == [1, 1, 1]
    loud = [each.getMessage() for each in caplog.records if each.levelno == ERROR]
    assert any("nothing was aggregated in the last 3 rounds" in text for text in loud)
    assert "NOTHING WAS AGGREGATED in any of the 3 rounds" in loud[-1]


def test_a_run_in_which_some_rounds_failed_says_how_many(caplog):
    result = run(C2M3(Raising(2), model=mlp(), example_inputs=EXAMPLE))
    assert [metrics["c2m3-kept-previous"] for metrics in result.train_metrics_clientapp.values()] == [0, 1, 0]
    assert any("in 1 of 3 rounds nothing was aggregated" in text for text in caplog.messages)


class Unevaluated(FedAvg):
    def aggregate_evaluate(self, server_round, replies):
        raise IndexError("no metrics")


def test_a_wrapped_strategy_that_fails_to_evaluate_costs_the_evaluation(caplog):
    result = run(C2M3(Unevaluated(), model=mlp(), example_inputs=EXAMPLE), rounds=2)
    assert len(result.train_metrics_clientapp) == 2
    assert not result.evaluate_metrics_clientapp
    assert any("the evaluation of Unevaluated failed: IndexError: no metrics" in text for text in caplog.messages)


class Misconfigured(FedAvg):
    def configure_train(self, server_round, arrays, config, grid):
        raise ValueError("fraction_train is 7")


def test_what_can_only_be_a_mistake_in_the_configuration_still_ends_the_run():
    with pytest.raises(ValueError, match="fraction_train is 7"):
        run(C2M3(Misconfigured(), model=mlp(), example_inputs=EXAMPLE))
