"""A strategy of the user's own: wrapped by C2M3, or derived from it."""

from __future__ import annotations

import torch
from flwr.serverapp.strategy import FedAvg

from c2m3_fl.flower.incoming.records import to_params
from c2m3_fl.flower.resuming.resumable import Resumable
from c2m3_fl.flower.serial_grid import SerialGrid
from c2m3_fl.flower.strategy import C2M3
from tests.flower.federation import EXAMPLE, calibration, digits_app, mlp, same

NODES = 3


class _Keeping:
    """What both ways add: a start of its own, and a checkpoint in every round."""

    def start(self, *args, **kwargs):
        self.started = True
        return super().start(*args, **kwargs)

    def aggregate_train(self, server_round, replies):
        arrays, metrics = super().aggregate_train(server_round, replies)
        self.saved.append(arrays.copy())
        metrics["own"] = float(server_round)
        return arrays, metrics


class Saving(_Keeping, FedAvg):
    """As in Flower's example apps: a start of its own, attributes, and a checkpoint in every round."""

    def __init__(self, **options):
        super().__init__(fraction_evaluate=0.0, **options)
        self.saved = []
        self.started = False


class Derived(_Keeping, C2M3):
    """The other way: what C2M3 returns is the deployed model."""

    def __init__(self, strategy, **options):
        super().__init__(strategy, **options)
        self.saved = []
        self.started = False


def run(strategy, rounds=2, evaluate_fn=None):
    arrays = C2M3(model=mlp(), example_inputs=EXAMPLE).sent
    grid = SerialGrid(digits_app(independent=True, epochs=1), NODES)
    return strategy.start(grid, arrays, rounds, evaluate_fn=evaluate_fn)


def options():
    return {"model": mlp(), "calibration": calibration(), "recalibrate": "repair", "feedback": "never"}


def of_start(caplog):
    return [text for text in caplog.messages if "overrides start(), which never runs inside" in text]


def test_a_wrapped_strategy_aggregates_the_trajectory_and_is_there_by_name(caplog):
    strategy, deployed = C2M3(Saving(), **options()), []
    result = run(strategy, evaluate_fn=lambda number, arrays: deployed.append(arrays))
    (said,) = of_start(caplog)
    assert said.startswith("Saving overrides start()")
    assert said.endswith("or derive Saving from C2M3 and start it itself")
    assert not strategy.wrapped.started
    assert [metrics["own"] for metrics in result.train_metrics_clientapp.values()] == [1, 2]
    assert same(strategy.wrapped.saved[-1], strategy.trajectory)
    assert same(deployed[-1], result.arrays)
    assert not same(deployed[-1], strategy.trajectory)


def test_a_strategy_derived_from_c2m3_starts_and_returns_the_deployed_model(caplog):
    strategy = Derived(FedAvg(fraction_evaluate=0.0), **options())
    result = run(strategy)
    assert strategy.started
    assert not of_start(caplog)
    assert same(strategy.saved[-1], result.arrays)
    assert [metrics["own"] for metrics in result.train_metrics_clientapp.values()] == [1, 2]
    assert same(result.arrays, run(C2M3(FedAvg(fraction_evaluate=0.0), **options())).arrays)


def test_what_runs_inside_of_resumable_is_said_once(tmp_path, caplog):
    Resumable(Saving(), tmp_path)
    assert len(of_start(caplog)) == 1
    Resumable(C2M3(Saving(), model=mlp(), example_inputs=EXAMPLE), tmp_path)
    assert len(of_start(caplog)) == 2
    Resumable(Derived(FedAvg(), model=mlp(), example_inputs=EXAMPLE), tmp_path)
    assert "Derived overrides start()" in of_start(caplog)[2]
    assert isinstance(Resumable(C2M3(Saving(), model=mlp(), example_inputs=EXAMPLE), tmp_path).wrapped.wrapped, Saving)


def test_a_derived_strategy_that_is_resumed_keeps_what_it_saved(tmp_path):
    def make():
        return Resumable(Derived(FedAvg(fraction_evaluate=0.0), **options()), tmp_path)

    run(make(), rounds=1)
    resumed = make()
    run(resumed, rounds=2)
    assert len(resumed.wrapped.saved) == 2
    assert all(torch.isfinite(value).all() for value in to_params(resumed.wrapped.saved[0]).values())
