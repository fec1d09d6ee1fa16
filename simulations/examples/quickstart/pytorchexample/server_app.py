"""The quickstart's server: the strategy that the run config names."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
from flwr.app import ArrayRecord, Context, MetricRecord
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg, Strategy
from torch import Tensor

from c2m3_fl import C2M3
from c2m3_fl.flower import ClientRefit
from pytorchexample.data import SERVER, cifar10, loader
from pytorchexample.task import Net, test

app = ServerApp()


def calibration() -> list[Tensor]:
    """The images that the server holds, without their labels."""
    return [images for images, _ in loader(cifar10("train").select(range(SERVER)), 250)]


STRATEGIES: dict[str, Callable[[FedAvg], Strategy]] = {
    "fedavg": lambda fedavg: fedavg,
    "c2m3": lambda fedavg: C2M3(fedavg, model=Net(), calibration=calibration()),
    "c2m3-head": lambda fedavg: C2M3(fedavg, model=Net(), calibration=calibration(), head="labels"),
    "c2m3-refit": lambda fedavg: C2M3(fedavg, model=Net(), calibration=calibration(), recalibrate=ClientRefit()),
}


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the federation and evaluate every round's model on the test images."""
    config = context.run_config
    torch.manual_seed(int(config["seed"]))
    start = ArrayRecord(Net().state_dict())  # before the strategy, so that all strategies have the same
    build = STRATEGIES[str(config["strategy"])]
    strategy = build(FedAvg(fraction_evaluate=float(config["fraction-evaluate"])))
    result = strategy.start(
        grid=grid,
        initial_arrays=start,
        num_rounds=int(config["num-server-rounds"]),
        evaluate_fn=evaluate,
    )
    if config["output"]:
        rounds = {current: dict(metrics) for current, metrics in result.evaluate_metrics_serverapp.items()}
        Path(str(config["output"])).write_text(json.dumps({"config": dict(config), "rounds": rounds}, indent=1))


def evaluate(server_round: int, arrays: ArrayRecord) -> MetricRecord:
    """Loss and accuracy of the global model on the test images."""
    net = Net()
    net.load_state_dict(arrays.to_torch_state_dict())
    loss, accuracy = test(net, loader(cifar10("test"), 500))
    return MetricRecord({"loss": loss, "accuracy": accuracy})
