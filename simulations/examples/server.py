"""A Flower server that aligns its clients' networks, then averages them: ``python -m simulations.examples.server``."""

from __future__ import annotations

from flwr.app import ArrayRecord, Context, MetricRecord, RecordDict
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg, Result

from c2m3_fl import C2M3
from c2m3_fl.flower import SerialGrid
from simulations.examples import client
from simulations.examples.digits import Net, accuracy, calibration

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the federation and log the accuracy after every round."""
    federate(grid)


def federate(grid: Grid, rounds: int = 3) -> Result:
    """Run `rounds` rounds with all clients."""
    strategy = C2M3(FedAvg(fraction_evaluate=0.0), model=Net(), calibration=calibration())
    return strategy.start(
        grid=grid, initial_arrays=ArrayRecord(Net().state_dict()), num_rounds=rounds, evaluate_fn=evaluate
    )


def evaluate(server_round: int, arrays: ArrayRecord) -> MetricRecord:
    """Accuracy of the global model on the test images."""
    net = Net()
    net.load_state_dict(arrays.to_torch_state_dict())
    return MetricRecord({"accuracy": accuracy(net)})


if __name__ == "__main__":  # Flower's engine passes grid and context; here the clients run in this process
    app(SerialGrid(client.app, nodes=5), Context(1, 0, {}, RecordDict(), {}))
