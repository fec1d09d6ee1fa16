"""Continue a federation after the server was stopped: ``python -m simulations.examples.resume FOLDER``, repeatedly."""

from __future__ import annotations

import sys
from pathlib import Path

from flwr.app import ArrayRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg, Result

from c2m3_fl import C2M3
from c2m3_fl.flower import Resumable, SerialGrid
from simulations.examples import client
from simulations.examples.digits import Net, calibration
from simulations.examples.server import evaluate


def federate(grid: Grid, folder: Path, rounds: int = 4) -> Result:
    """Run the rounds that are not yet in `folder`; every finished round is saved there."""
    aligned = C2M3(FedAvg(fraction_evaluate=0.0), model=Net(), calibration=calibration())
    strategy = Resumable(aligned, folder.resolve(), keep=2)
    return strategy.start(
        grid=grid, initial_arrays=ArrayRecord(Net().state_dict()), num_rounds=rounds, evaluate_fn=evaluate
    )


if __name__ == "__main__":  # stop it with Ctrl-C and start it again: it continues with the interrupted round
    result = federate(SerialGrid(client.app, nodes=5), Path(sys.argv[1]))
    for number, metrics in sorted(result.evaluate_metrics_serverapp.items()):
        print(f"round {number}: accuracy {metrics['accuracy']:.3f}")
