"""The strategies that a comparison can run, by name."""

from __future__ import annotations

from collections.abc import Callable

from flwr.serverapp.strategy import FedAvg, FedAvgM, FedMedian, Strategy
from torch import nn

from c2m3_fl.flower.strategy import C2M3
from simulations.data import FederatedData
from simulations.settings import TITLES, check_choice

_STOCK: dict[str, Callable[..., Strategy]] = {"fedavg": FedAvg, "fedavgm": FedAvgM, "fedmedian": FedMedian}


def build_strategy(name: str, model: nn.Module, data: FederatedData) -> Strategy:
    """The strategy `name`, training on all clients and leaving evaluation to the server.

    Raises
    ------
    ConfigError
        For a name that is not among `TITLES`.
    """
    check_choice("strategy", name, tuple(TITLES))
    clients = len(data.parts)
    wrapped = _STOCK.get(name, FedAvg)(fraction_evaluate=0.0, min_train_nodes=clients, min_available_nodes=clients)
    if name in _STOCK:
        return wrapped
    calibration = data.calibration if name == "c2m3+repair" else None
    return C2M3(wrapped, model=model, example_inputs=data.calibration[0][:2], calibration=calibration)
