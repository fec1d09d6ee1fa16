"""The strategies that a comparison can run, by name."""

from __future__ import annotations

from collections.abc import Callable

from flwr.serverapp.strategy import FedAvg, FedAvgM, FedMedian, Strategy
from torch import nn

from c2m3_fl.flower.strategy import C2M3
from simulations.data import FederatedData
from simulations.settings import STRATEGIES, check_choice

_STOCK: dict[str, Callable[..., Strategy]] = {"fedavg": FedAvg, "fedavgm": FedAvgM, "fedmedian": FedMedian}

TITLES = {
    "fedavg": "FedAvg",
    "fedavgm": "FedAvgM",
    "fedmedian": "FedMedian",
    "c2m3": "C2M3",
    "c2m3+repair": "C2M3 + REPAIR",
}


def build_strategy(name: str, model: nn.Module, data: FederatedData) -> Strategy:
    """The strategy `name`, training on all clients and leaving evaluation to the server.

    Raises
    ------
    ConfigError
        For a name that is not among `STRATEGIES`.
    """
    check_choice("strategy", name, STRATEGIES)
    clients = len(data.parts)
    wrapped = _STOCK.get(name, FedAvg)(fraction_evaluate=0.0, min_train_nodes=clients, min_available_nodes=clients)
    if name in _STOCK:
        return wrapped
    calibration = data.calibration if name == "c2m3+repair" else None
    return C2M3(wrapped, model=model, example_inputs=data.calibration[0][:2], calibration=calibration)
