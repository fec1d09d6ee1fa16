"""The legacy dialect, in Flower's own legacy server loop, says what the current one says."""

from __future__ import annotations

import math
from threading import Lock

import numpy as np
import pytest
import torch
from flwr.common import (
    Code,
    DisconnectRes,
    EvaluateRes,
    FitRes,
    GetParametersRes,
    GetPropertiesRes,
    Parameters,
    Status,
    ndarrays_to_parameters,
    parameters_to_ndarrays,
)
from flwr.server.client_manager import SimpleClientManager
from flwr.server.client_proxy import ClientProxy
from flwr.server.server import Server
from flwr.server.strategy import (
    DifferentialPrivacyServerSideFixedClipping,
    FedAdam,
    FedAvg,
    FedAvgM,
    FedMedian,
    Krum,
)

from c2m3_fl.errors import ConfigError, ParamsError
from c2m3_fl.flower import strategy as current
from c2m3_fl.flower.legacy import C2M3, node_of
from c2m3_fl.flower.records import to_params
from tests.flower.federation import EXAMPLE, calibration, clients, digits, mlp, normed, reply, send, train

OK = Status(Code.OK, "")
TURN = Lock()  # the server trains clients in threads, which share torch's global generator


def parameters_of(params) -> Parameters:
    return ndarrays_to_parameters([np.asarray(value.numpy()) for value in params.values()])


def params_of(parameters: Parameters, like) -> dict[str, torch.Tensor]:
    arrays = parameters_to_ndarrays(parameters)
    return {name: torch.from_numpy(np.asarray(array)) for name, array in zip(like, arrays, strict=True)}


class Local(ClientProxy):
    """A client in this process, which starts from an initialisation of its own."""

    def __init__(self, index: int, count: int, make=mlp) -> None:
        super().__init__(str(index))
        self.index, self.count, self.make = index, count, make
        self.sent: list[Parameters] = []

    def get_properties(self, ins, timeout, group_id):
        return GetPropertiesRes(OK, {})

    def get_parameters(self, ins, timeout, group_id):
        return GetParametersRes(OK, parameters_of(self.make().state_dict()))

    def fit(self, ins, timeout, group_id):
        self.sent.append(ins.parameters)
        data, labels = (each[:1200][self.index :: self.count] for each in digits())
        with TURN:
            model = self.make(1000 + self.index)
            if len(self.sent) > 1:
                model.load_state_dict(params_of(ins.parameters, model.state_dict()))
            train(model, data, labels, epochs=10, seed=self.index)
        return FitRes(OK, parameters_of(model.state_dict()), len(data), {})

    def evaluate(self, ins, timeout, group_id):
        return EvaluateRes(OK, 0.0, 1, {})

    def reconnect(self, ins, timeout, group_id):
        return DisconnectRes("")


def accuracy(parameters: Parameters, make=mlp) -> float:
    model = make()
    model.load_state_dict(params_of(parameters, model.state_dict()))
    model.eval()
    data, labels = digits()
    with torch.no_grad():
        return float((model(data[1200:]).argmax(1) == labels[1200:]).float().mean())


def serve(strategy, rounds=1, count=5, make=mlp):
    manager = SimpleClientManager()
    proxies = [Local(index, count, make) for index in range(count)]
    for proxy in proxies:
        manager.register(proxy)
    server = Server(client_manager=manager, strategy=strategy)
    history, _ = server.fit(num_rounds=rounds, timeout=None)
    return server.parameters, history, proxies


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


def fit_result(node, params, examples=10, metrics=None):
    return Local(node, 1), FitRes(OK, parameters_of(params), examples, metrics or {})


def legacy(strategy=None, make=mlp, **options):
    ours = C2M3(strategy, model=make(), example_inputs=EXAMPLE, **options)
    manager = SimpleClientManager()
    for index in range(2):
        manager.register(Local(index, 2))
    ours.configure_fit(1, parameters_of(make().state_dict()), manager)
    return ours


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
    "other types": lambda: fit_result(9, mlp().double().state_dict()),
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
