"""A federation of legacy clients in this process, and legacy results made by hand."""

from __future__ import annotations

from threading import Lock

import numpy as np
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

from c2m3_fl.flower.legacy import C2M3
from tests.flower.federation import EXAMPLE, digits, mlp, train

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


def fit_result(node, params, examples=10, metrics=None):
    return Local(node, 1), FitRes(OK, parameters_of(params), examples, metrics or {})


def legacy(strategy=None, make=mlp, **options):
    ours = C2M3(strategy, model=make(), example_inputs=EXAMPLE, **options)
    manager = SimpleClientManager()
    for index in range(2):
        manager.register(Local(index, 2))
    ours.configure_fit(1, parameters_of(make().state_dict()), manager)
    return ours
