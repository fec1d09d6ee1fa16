"""Named settings: the demonstration, and the one-shot benchmark on MNIST."""

from __future__ import annotations

from collections.abc import Mapping

from simulations.settings import Value

PRESETS: Mapping[str, Mapping[str, Value]] = {
    # scikit-learn's digits, small enough for a minute on two cores
    "demo": {
        "data": "digits",
        "hidden_widths": "256,256,256",
        "clients": 5,
        "partition": "dirichlet",
        "alpha": 0.3,
        "rounds": 5,
        "local_epochs": 5,
        "holdout": 0.2,
        "strategy": "fedavg,c2m3,c2m3+judged",
    },
    # one-shot federation of independently initialised MLPs
    "mnist": {
        "data": "mnist",
        "train_size": 20_000,
        "clients": 10,
        "partition": "iid",
        "rounds": 1,
        "local_epochs": 2,
        "batch_size": 64,
        "calibration_size": 1_000,
    },
}
