"""The legacy dialect, in Flower's own legacy server loop, says what the current one says."""

from __future__ import annotations

import math

import pytest
import torch
from flwr.common import (
    FitRes,
    Parameters,
)
from flwr.server.client_manager import SimpleClientManager
from flwr.server.strategy import (
    DifferentialPrivacyServerSideFixedClipping,
    FedAdam,
    FedAvg,
    FedAvgM,
    FedMedian,
    FedTrimmedAvg,
    FedYogi,
    Krum,
)

from c2m3_fl.errors import ConfigError, ParamsError
from c2m3_fl.flower import strategy as current
from c2m3_fl.flower.incoming.records import to_params
from c2m3_fl.flower.legacy import C2M3, node_of
from tests.flower.federation import EXAMPLE, calibration, clients, digits, mlp, normed, reply, send, train
from tests.flower.legacy_federation import OK, Local, accuracy, fit_result, legacy, parameters_of, params_of, serve


def test_in_a_real_legacy_server_the_average_is_a_model_instead_of_noise():
    plain, _, _ = serve(FedAvg(fraction_evaluate=0.0))
    ours, history, _ = serve(C2M3(FedAvg(fraction_evaluate=0.0), model=mlp(), calibration=calibration()))
    assert accuracy(plain) < 0.5
    assert accuracy(ours) > 0.85
    assert history.metrics_distributed_fit["c2m3-repaired"] == [(1, 1)]


@pytest.mark.parametrize(
    "make",
    [
        lambda start: FedAvg(initial_parameters=start),
        lambda start: FedAvgM(initial_parameters=start, server_momentum=0.5),
        lambda start: FedAdam(initial_parameters=start, eta=0.1),
        lambda start: FedMedian(initial_parameters=start),
        lambda start: Krum(initial_parameters=start, num_malicious_clients=1),
    ],
    ids=["FedAvg", "FedAvgM", "FedAdam", "FedMedian", "Krum"],
)
def test_every_legacy_strategy_learns_for_several_rounds(make):
    strategy = C2M3(make(parameters_of(mlp().state_dict())), model=mlp(), example_inputs=EXAMPLE)
    parameters, history, _ = serve(strategy, rounds=4)
    assert [value for _, value in history.metrics_distributed_fit["c2m3-kept-previous"]] == [0] * 4
    assert accuracy(parameters) > 0.5


START = parameters_of(mlp().state_dict())
STOCK = {
    "FedAvg": lambda: FedAvg(),
    "FedAvgM": lambda: FedAvgM(initial_parameters=START, server_momentum=0.5),
    "FedAdam": lambda: FedAdam(initial_parameters=START, eta=0.01),
    "FedYogi": lambda: FedYogi(initial_parameters=START, eta=0.01),
    "FedMedian": lambda: FedMedian(),
    "FedTrimmedAvg": lambda: FedTrimmedAvg(beta=0.3),
    "Krum": lambda: Krum(num_malicious_clients=1),
}


@pytest.mark.parametrize("make", STOCK.values(), ids=STOCK.keys())
def test_with_nothing_to_move_every_legacy_strategy_gives_its_own_result_bit_for_bit(make):
    """Round after round: so its momenta, too, are those of a bare server."""
    ours, stock = C2M3(make(), model=mlp(), example_inputs=EXAMPLE), make()
    manager, parameters, bare = SimpleClientManager(), START, START
    for index in range(2):
        manager.register(Local(index, 2))
    for current_round in range(1, 4):
        ours.configure_fit(current_round, parameters, manager)
        stock.configure_fit(current_round, bare, manager)
        results = []
        for node in range(4):
            model = mlp()
            model.load_state_dict(params_of(parameters, model.state_dict()))
            data, labels = (each[node:1200:4] for each in digits())
            train(model, data, labels, epochs=1, seed=node, rate=0.02)
            results.append(fit_result(node, model.state_dict()))
        ordered = [each.source for each in ours._sorted(results).replies]
        bare, _ = stock.aggregate_fit(current_round, ordered, [])
        parameters, metrics = ours.aggregate_fit(current_round, results, [])
        assert (metrics["c2m3-share-moved"], metrics["c2m3-kept-previous"]) == (0, 0)
        assert parameters.tensors == bare.tensors


def test_a_wrapped_strategy_that_raises_costs_the_round_not_the_run(caplog):
    trimming = FedTrimmedAvg(initial_parameters=START)
    trimming.beta = 0.6  # which the constructor refuses today
    parameters, history, _ = serve(C2M3(trimming, model=mlp(), example_inputs=EXAMPLE), rounds=2)
    assert parameters.tensors == START.tensors
    assert [value for _, value in history.metrics_distributed_fit["c2m3-kept-previous"]] == [1, 1]
    assert any("the wrapped strategy FedTrimmedAvg failed: ValueError: " in text for text in caplog.messages)
    assert any("nothing was aggregated in the last 2 rounds" in text for text in caplog.messages)


def test_a_wrapped_strategy_that_fails_to_evaluate_costs_the_evaluation(caplog):
    def failing(metrics):
        raise KeyError("accuracy")

    strategy = FedAvg(initial_parameters=START, evaluate_metrics_aggregation_fn=failing)
    _, history, _ = serve(C2M3(strategy, model=mlp(), example_inputs=EXAMPLE), rounds=2)
    assert not history.losses_distributed
    assert any("the evaluation of FedAvg failed: KeyError" in text for text in caplog.messages)


def test_clients_may_reply_in_the_type_that_they_were_sent_or_in_the_models_own():
    strategy = legacy(FedAdam(initial_parameters=START))
    manager = SimpleClientManager()
    for index in range(2):
        manager.register(Local(index, 2))
    strategy.configure_fit(1, parameters_of(mlp().double().state_dict()), manager)
    wide = {name: value.double() for name, value in clients(2)[1].items()}
    _, metrics = strategy.aggregate_fit(1, [fit_result(0, clients(2)[0]), fit_result(1, wide)], [])
    assert (metrics["c2m3-replies"], metrics["c2m3-dropped"], metrics["c2m3-kept-previous"]) == (2, 0, 0)


@pytest.mark.parametrize("strategy", [FedAvg, current.FedAvg()], ids=["class", "current"])
def test_what_is_no_legacy_strategy_is_refused(strategy):
    with pytest.raises(ConfigError, match=r"strategy is .* expected an instance of"):
        C2M3(strategy, model=mlp(), example_inputs=EXAMPLE)


def test_the_minimum_of_replies_holds_after_outliers_are_dropped():
    *honest, odd = clients(6)
    results = [fit_result(node, params) for node, params in enumerate(honest)]
    results.append(fit_result(9, {name: 10 * value for name, value in odd.items()}))
    for least, kept in ((5, 0), (6, 1)):
        strategy = legacy(outliers="drop", min_replies=least)
        parameters, metrics = strategy.aggregate_fit(1, results, [])
        assert (metrics["c2m3-kept-previous"], metrics["c2m3-dropped"]) == (kept, 1)
        assert (parameters == strategy.sent) == bool(kept)


def test_both_dialects_give_the_same_model():
    trained = clients(4)
    modern = current.C2M3(model=mlp(), example_inputs=EXAMPLE)
    send(modern, mlp().state_dict())
    arrays, _ = modern.aggregate_train(1, [reply(node, params) for node, params in enumerate(trained)])
    parameters, _ = legacy().aggregate_fit(1, [fit_result(node, params) for node, params in enumerate(trained)], [])
    expected, found = to_params(arrays), params_of(parameters, mlp().state_dict())
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-6, atol=1e-7)


def test_counters_keep_their_dtype_and_take_the_largest_reply():
    sent = normed().state_dict()
    results = [
        fit_result(node, {**sent, "1.num_batches_tracked": torch.tensor(count)}) for node, count in enumerate([3, 8])
    ]
    parameters, _ = legacy(make=normed).aggregate_fit(1, results, [])
    back = params_of(parameters, sent)
    assert {name: value.dtype for name, value in back.items()} == {name: value.dtype for name, value in sent.items()}
    assert back["1.num_batches_tracked"] == 8


def without_last():
    params = dict(clients(4)[3])
    params.popitem()
    return params


FAULTS = {
    "NaN": lambda: fit_result(9, {name: value * math.nan for name, value in clients(4)[3].items()}),
    "too few tensors": lambda: fit_result(9, without_last()),
    "other shapes": lambda: fit_result(9, mlp(width=8).state_dict()),
    "other types": lambda: fit_result(9, {name: value.long() for name, value in mlp().state_dict().items()}),
    "no npy": lambda: (Local(9, 1), FitRes(OK, Parameters([b"x"] * 6, "numpy.ndarray"), 10, {})),
    "no examples": lambda: fit_result(9, clients(4)[3], examples=0),
    "negative": lambda: fit_result(9, clients(4)[3], examples=-1),
    "duplicate": lambda: fit_result(1, clients(3)[1]),
}


@pytest.mark.parametrize("make", FAULTS.values(), ids=FAULTS.keys())
def test_bad_replies_are_dropped_and_change_nothing(make):
    good = [fit_result(node, params) for node, params in enumerate(clients(3))]
    expected, _ = legacy().aggregate_fit(1, good, [])
    parameters, metrics = legacy().aggregate_fit(1, [make(), *good], [])
    assert parameters.tensors == expected.tensors
    assert (metrics["c2m3-replies"], metrics["c2m3-dropped"]) == (3, 1)


def test_without_valid_replies_the_previous_model_stays():
    parameters, metrics = legacy().aggregate_fit(1, [], [RuntimeError("gone")])
    assert parameters.tensors == parameters_of(mlp().state_dict()).tensors
    assert metrics["c2m3-kept-previous"] == 1


def test_failures_that_the_wrapped_strategy_does_not_accept_leave_the_previous_model():
    good = [fit_result(node, params) for node, params in enumerate(clients(3))]
    ours = legacy(FedAvg(accept_failures=False))
    parameters, metrics = ours.aggregate_fit(1, good, [RuntimeError("gone")])
    assert parameters.tensors == parameters_of(mlp().state_dict()).tensors
    assert metrics["c2m3-kept-previous"] == 1


def test_diagnostics_name_every_tensor_of_every_client():
    results = [fit_result(node, params) for node, params in enumerate(clients(3))]
    _, metrics = legacy(diagnostics=True).aggregate_fit(1, results, [])
    names = [f"c2m3-agreement/{name}" for name in mlp().state_dict()] + ["c2m3-node-moved", "c2m3-node-agreement"]
    assert all(isinstance(metrics[f"{name}/{node}"], float) for name in names for node in range(3))
    brief = legacy().aggregate_fit(1, results, [])[1]
    main = ("replies", "dropped", "kept-previous", "objective-before", "objective-after", "share-moved")
    assert brief.keys() == {f"c2m3-{name}" for name in main}


def test_every_client_is_sent_the_model_in_its_own_basis():
    ours = C2M3(FedAvg(fraction_evaluate=0.0), model=mlp(), example_inputs=EXAMPLE, basis="client")
    _, _, proxies = serve(ours, rounds=2)
    first, *others = [proxy.sent[1].tensors for proxy in proxies]
    assert all(other != first for other in others)
    assert len({round(accuracy(proxy.sent[1]), 6) for proxy in proxies}) == 1


def test_wrappers_for_differential_privacy_are_refused_with_the_reason():
    private = DifferentialPrivacyServerSideFixedClipping(FedAvg(), 1.0, 1.0, 2)
    with pytest.raises(ConfigError, match="every client's permutation depends on all the others"):
        C2M3(private, model=mlp(), example_inputs=EXAMPLE)


def test_a_model_that_does_not_fit_is_not_sent_out():
    ours = C2M3(model=mlp(), example_inputs=EXAMPLE)
    with pytest.raises(ParamsError, match="the parameters to send out"):
        ours.configure_fit(1, parameters_of(mlp(width=8).state_dict()), SimpleClientManager())


def test_ids_that_are_no_numbers_become_stable_ones():
    class Named(Local):
        def __init__(self, cid):
            super().__init__(0, 1)
            self.cid = cid

    assert node_of(Named("17")) == 17
    assert node_of(Named("ipv4:1")) == node_of(Named("ipv4:1")) != node_of(Named("ipv4:2"))
    assert node_of(Named("ipv4:1")) < 2**63
