"""What is returned, evaluated and trained in which round, and that asking clients leaves the random numbers alone."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from flwr.app import Context, Message, MetricRecord, RecordDict
from flwr.serverapp.strategy import FedAvg

from c2m3_fl.flower.incoming.records import from_params, to_params
from c2m3_fl.flower.queries.refit import ClientRefit
from c2m3_fl.flower.serial_grid import SerialGrid
from c2m3_fl.flower.strategy import C2M3
from c2m3_fl.merging.recalibrate.repair import Repair
from c2m3_fl.merging.recalibrate.setting import prepare
from tests.flower.deploying.test_candidates import app
from tests.flower.federation import EXAMPLE, answering, calibration, digits_app, mlp, own_loss, same

ROUNDS = 4
REFIT = {"recalibrate": ClientRefit(first_layer=True), "head": None, "judge": None}


class Noting(FedAvg):
    """Notes what it is given to send and to evaluate, and what it aggregates."""

    def __init__(self):
        super().__init__()
        self.sent, self.evaluated, self.aggregated, self.aligned = {}, {}, {}, {}

    def configure_train(self, server_round, arrays, config, grid):
        self.sent[server_round] = arrays.copy()
        return super().configure_train(server_round, arrays, config, grid)

    def aggregate_train(self, server_round, replies):
        replies = list(replies)
        self.aligned[server_round] = [each.content["arrays"].copy() for each in replies]
        arrays, metrics = super().aggregate_train(server_round, replies)
        self.aggregated[server_round] = arrays.copy()
        return arrays, metrics

    def configure_evaluate(self, server_round, arrays, config, grid):
        self.evaluated[server_round] = arrays.copy()
        return super().configure_evaluate(server_round, arrays, config, grid)


# which rounds return another model than the aggregate, and after which clients train that
EXPECTED = {
    ("every", "always"): ([1, 2, 3, 4], [1, 2, 3, 4]),
    (3, "moved"): ([3, 4], []),  # units moved in the first round alone
    ("every", "moved"): ([1, 2, 3, 4], [1]),
    ("last", "never"): ([4], []),
}


@pytest.mark.parametrize(("how", "expected"), EXPECTED.items(), ids=str)
def test_what_is_returned_is_evaluated_and_what_is_trained_is_the_aggregate_unless_it_is_fed_back(how, expected):
    deploy, feedback = how
    inside, returned, trajectories = Noting(), {}, {}
    strategy = C2M3(inside, model=mlp(), example_inputs=EXAMPLE, deploy=deploy, feedback=feedback, **REFIT)

    def evaluate(current, arrays):
        returned[current], trajectories[current] = arrays.copy(), strategy.trajectory

    grid = SerialGrid(app(independent=True, rate=0.1), 2)
    result = strategy.start(grid, from_params(mlp().state_dict()), num_rounds=ROUNDS, evaluate_fn=evaluate)
    rounds = range(1, ROUNDS + 1)
    changed, fed = [], []
    for current in rounds:
        metrics = result.train_metrics_clientapp[current]
        changed += [current] if not same(returned[current], inside.aggregated[current]) else []
        fed += [current] if metrics.get("c2m3-fed-back") else []
        assert metrics.get("c2m3-repaired", 0) == (current in changed)
        trained = returned if current in fed else inside.aggregated
        assert same(trajectories[current], trained[current])
        assert same(inside.evaluated[current], returned[current])
        assert current == ROUNDS or same(inside.sent[current + 1], trajectories[current])
    assert (changed, fed) == expected
    assert same(result.arrays, returned[ROUNDS])


@pytest.mark.parametrize("judge", [None, "auto"])
def test_before_the_round_that_deploys_repair_is_returned_after_units_moved_and_then_the_aggregate(judge):
    inside, returned = Noting(), {}
    strategy = C2M3(inside, model=mlp(), calibration=calibration(), deploy="last", judge=judge)

    def evaluate(current, arrays):
        returned[current] = arrays.copy()

    asked = []
    grid = SerialGrid(app(independent=True), 3, transit=lambda replies: asked.append(len(replies)) or replies)
    result = strategy.start(grid, from_params(mlp().state_dict()), num_rounds=3, evaluate_fn=evaluate)
    first, second, _ = result.train_metrics_clientapp.values()
    assert (first["c2m3-deployed/repair"], "c2m3-deployed/repair" in second) == (1, False)
    merged, endpoints = to_params(inside.aggregated[1]), [to_params(each) for each in inside.aligned[1]]
    expected = Repair()(prepare(mlp(), merged, endpoints, calibration())).state_dict  # of clients of equal weight
    for name, value in to_params(returned[1]).items():
        torch.testing.assert_close(value, expected[name])
    assert not same(returned[1], inside.aggregated[1])
    assert same(returned[2], inside.aggregated[2])
    assert same(returned[3], inside.aggregated[3]) == (judge is None)
    assert (len(asked) == 6) == (judge is None)  # to train and to evaluate, three times each


def drawing():
    """Clients that draw from all global generators whenever they evaluate, or load data for an answer."""
    found = digits_app(epochs=1, rate=0.02, evaluates="")

    @found.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        random.random()
        np.random.rand()  # noqa: NPY002  # the state that clients' code may draw from
        torch.rand(())
        metrics = MetricRecord({"num-examples": 1, "loss": own_loss(mlp, message, context)})
        return Message(RecordDict({"metrics": metrics}), reply_to=message)

    def network():
        torch.rand(())
        return mlp()

    return answering(network, found, first_layer=True)


@pytest.mark.parametrize("options", [{}, {**REFIT, "judge": "clients", "head": "labels"}], ids=["by default", "asked"])
def test_queries_and_judgements_leave_the_global_random_numbers_as_they_were(options):
    def draws(options):
        random.seed(3)
        np.random.seed(3)  # noqa: NPY002  # as above
        torch.manual_seed(3)
        strategy = C2M3(
            FedAvg(fraction_evaluate=0.0),
            model=mlp(),
            example_inputs=EXAMPLE,
            deploy="every",
            diagnostics=True,
            **options,
        )
        result = strategy.start(SerialGrid(drawing(), 3), from_params(mlp().state_dict()), num_rounds=1)
        drawn = random.random(), float(np.random.rand()), float(torch.rand(()))  # noqa: NPY002  # as above
        return drawn, result.train_metrics_clientapp[1]

    found, metrics = draws(options)
    expected, _ = draws({"recalibrate": "none", "head": None, "judge": None})
    assert metrics["c2m3-judge-chosen/aggregate"] == 0
    assert found == expected
