"""Federations that are killed in the middle of a round."""

from __future__ import annotations

from flwr.app import MetricRecord
from flwr.serverapp.strategy import FedAdam, FedAvg, FedAvgM

from c2m3_fl.flower.incoming.records import from_params
from c2m3_fl.flower.serial_grid import SerialGrid
from c2m3_fl.flower.strategy import C2M3
from tests.flower.federation import EXAMPLE, accuracy, calibration, digits_app, mlp, normed

ROUNDS = 4


class Killed(BaseException):
    """Stands for the end of the server process."""


def c2m3(inner, make=mlp, **options):
    return C2M3(inner, model=make(), example_inputs=EXAMPLE, **options)


STRATEGIES = {
    "bare FedAvg": (lambda: FedAvg(fraction_evaluate=0.5), mlp),
    "bare FedAdam": (lambda: FedAdam(fraction_evaluate=0.0), mlp),
    "C2M3 around FedAvgM": (lambda: c2m3(FedAvgM(fraction_evaluate=0.0, server_momentum=0.5)), mlp),
    "C2M3 around FedAdam, sampling": (lambda: c2m3(FedAdam(fraction_train=0.6, fraction_evaluate=0.5)), mlp),
    "C2M3, own bases, with repair": (
        lambda: C2M3(FedAvg(fraction_evaluate=0.0), model=mlp(), calibration=calibration(), basis="client"),
        mlp,
    ),
    "C2M3 with BatchNorm": (lambda: c2m3(FedAvgM(fraction_evaluate=0.0, server_momentum=0.5), normed), normed),
}


def run(strategy, make, killed_in=None, rounds=ROUNDS, app=None):
    """Train five clients of independent initialisation; `killed_in` a round, after its training."""
    trained = iter(range(1, 100))

    def transit(replies):
        if replies and replies[0].metadata.message_type == "train" and next(trained) == killed_in:
            raise Killed
        return replies

    def evaluate(current, arrays):
        return MetricRecord({"accuracy": accuracy(make, arrays), "round": current})

    grid = SerialGrid(app or digits_app(make, independent=True, epochs=1), 5, transit=transit)
    return strategy.start(grid, from_params(make().state_dict()), num_rounds=rounds, evaluate_fn=evaluate)


def comparable(metrics):
    """Metrics of a run without the seconds that it took."""
    return {
        current: {key: value for key, value in record.items() if "seconds" not in key}
        for current, record in metrics.items()
    }
