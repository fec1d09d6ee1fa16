"""The legacy dialect has both models: clients train the trajectory, what is returned is the deployed one."""

from __future__ import annotations

import pytest
import torch
from flwr.server.client_manager import SimpleClientManager
from flwr.server.strategy import FedAdam, FedAvg, FedAvgM

from c2m3_fl.errors import ConfigError
from c2m3_fl.flower import strategy as current
from c2m3_fl.flower.incoming.records import to_params
from c2m3_fl.flower.legacy import C2M3
from c2m3_fl.flower.queries.refit import ClientRefit, RegMean
from c2m3_fl.flower.queries.repair import ClientStatistics
from tests.flower.federation import EXAMPLE, calibration, clients, good, mlp, send
from tests.flower.legacy_federation import Local, accuracy, fit_result, parameters_of, params_of, serve

START = parameters_of(mlp().state_dict())
ASKING = {
    "head": {"head": "labels"},
    "head by default": {"head": "auto"},
    "ClientRefit": {"recalibrate": ClientRefit()},
    "RegMean": {"recalibrate": RegMean()},
    "judging clients": {"judge": "clients"},
    "judging labels": {"judge": "labels"},
    "moments": {"moments": ClientStatistics()},
    "ClientStatistics": {"calibration": ClientStatistics()},
}


@pytest.mark.parametrize("options", ASKING.values(), ids=ASKING.keys())
@pytest.mark.parametrize("given", [{}, {"calibration": calibration()}], ids=["no data", "data"])
def test_whatever_asks_clients_is_refused_with_the_reason(options, given):
    ((name, value),) = options.items()
    with pytest.raises(ConfigError) as raised:
        C2M3(model=mlp(), example_inputs=EXAMPLE, **{**given, **options})
    assert str(raised.value) == (
        f"{name} is {value!r}, which asks the clients, and the legacy dialect has no grid to ask them: "
        "use c2m3_fl.flower.C2M3"
    )


@pytest.mark.parametrize("options", [{"deploy": "every"}, {"judge_key": "loss"}], ids=["deploy", "judge_key"])
def test_options_of_what_is_refused_do_not_exist(options):
    with pytest.raises(ConfigError, match=f"has no option '{next(iter(options))}'"):
        C2M3(model=mlp(), example_inputs=EXAMPLE, **options)


def configure(strategy, parameters, number=1):
    """The parameters that a strategy sends to two clients."""
    manager = SimpleClientManager()
    for index in range(2):
        manager.register(Local(index, 2))
    return [ins.parameters for _, ins in strategy.configure_fit(number, parameters, manager)]


def repairing(inner=None, **options):
    return C2M3(inner, model=mlp(), calibration=calibration(), **{"recalibrate": "repair", **options})


def play(strategy, number=1):
    """One round of three clients with starts of their own: units move."""
    results = [fit_result(node, params) for node, params in enumerate(clients(3))]
    return strategy.aggregate_fit(number, results, [])


@pytest.mark.parametrize("recalibrate", [None, "repair", "refit"])
def test_what_is_returned_is_deployed_and_what_clients_are_sent_next_is_the_trajectory(recalibrate):
    strategy = repairing(recalibrate=recalibrate, feedback="never")
    plain = C2M3(model=mlp(), example_inputs=EXAMPLE)
    for each in (strategy, plain):
        configure(each, START)
    deployed, metrics = play(strategy)
    average, _ = play(plain)
    assert (metrics["c2m3-repaired"], metrics["c2m3-fed-back"]) == (1, 0)
    assert strategy.trajectory.tensors == average.tensors != deployed.tensors
    assert [each.tensors for each in configure(strategy, deployed, 2)] == [average.tensors] * 2
    assert accuracy(deployed) > accuracy(average)


def test_anything_but_what_was_returned_last_is_a_new_start():
    strategy = repairing(feedback="never")
    configure(strategy, START)
    deployed, _ = play(strategy)
    other = parameters_of(mlp(5).state_dict())
    assert [each.tensors for each in configure(strategy, other, 2)] == [other.tensors] * 2
    assert strategy.trajectory is None
    assert [each.tensors for each in configure(strategy, deployed, 3)] == [deployed.tensors] * 2


def test_a_real_legacy_server_evaluates_and_keeps_the_deployed_model_while_clients_train_the_trajectory():
    evaluated, trajectories = [], []

    def evaluate(_number, arrays, _config):
        evaluated.append(arrays)
        trajectories.append(strategy.trajectory)
        return 0.0, {}

    inner = FedAvg(fraction_evaluate=0.0, initial_parameters=START, evaluate_fn=evaluate)
    strategy = repairing(inner, feedback="never")
    parameters, history, proxies = serve(strategy, rounds=2, count=3)
    start, first, second = trajectories
    assert start is None
    assert all(proxy.sent[1].tensors == first.tensors for proxy in proxies)
    assert parameters.tensors != second.tensors
    kept = params_of(parameters, mlp().state_dict()).values()
    assert all(torch.equal(value, torch.from_numpy(array)) for value, array in zip(kept, evaluated[2], strict=True))
    assert history.metrics_distributed_fit["c2m3-repaired"] == [(1, 1), (2, 1)]


@pytest.mark.parametrize(
    "make",
    [
        FedAvg,
        lambda: FedAvgM(initial_parameters=START, server_momentum=0.5),
        lambda: FedAdam(initial_parameters=START, eta=0.01),
    ],
    ids=["FedAvg", "FedAvgM", "FedAdam"],
)
def test_with_nothing_moved_the_trajectory_is_that_without_recalibration_bit_for_bit(make):
    strategies = repairing(make()), C2M3(make(), model=mlp(), example_inputs=EXAMPLE)
    sent, trained = [START, START], clients(3, independent=False)
    for number in (1, 2, 3):
        for place, each in enumerate(strategies):
            configure(each, sent[place], number)
            moved = [{name: value + 0.001 * number for name, value in params.items()} for params in trained]
            sent[place], metrics = each.aggregate_fit(number, [fit_result(*pair) for pair in enumerate(moved)], [])
            assert metrics["c2m3-share-moved"] == 0
        deployed, plain = sent
        assert strategies[0].trajectory.tensors == strategies[1].trajectory.tensors == plain.tensors
        assert deployed.tensors != plain.tensors


@pytest.mark.parametrize("feedback", ["never", "moved", "always"])
def test_feedback_says_when_the_deployed_model_is_what_clients_are_sent(feedback):
    strategy, sent, fed = repairing(feedback=feedback), START, []
    configure(strategy, sent)
    for number in (1, 2):
        deployed, _ = play(strategy, number)
        sent = configure(strategy, deployed, number + 1)[0]
        fed.append(sent.tensors == deployed.tensors)
    assert fed == {"never": [False, False], "moved": [True, False], "always": [True, True]}[feedback]


def test_both_dialects_deploy_the_same_model():
    modern = current.C2M3(model=mlp(), calibration=calibration(), recalibrate="repair")
    send(modern, mlp().state_dict())
    arrays, _ = modern.aggregate_train(1, good())
    strategy = repairing()
    configure(strategy, START)
    found = params_of(play(strategy)[0], mlp().state_dict())
    for name, value in to_params(arrays).items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-6)


def test_the_state_brings_the_trajectory_of_a_legacy_server_back():
    strategy, other = repairing(feedback="never"), repairing(feedback="never")
    configure(strategy, START)
    deployed, _ = play(strategy)
    other.load_state_dict(strategy.state_dict())
    assert [each.tensors for each in configure(other, deployed, 2)] == [strategy.trajectory.tensors] * 2
