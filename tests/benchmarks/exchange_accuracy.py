"""Accuracy of a refit from clients with few exchanges.

    python -m tests.benchmarks.exchange_accuracy        table and record (LeNet needs C2M3_DATA)

The federations are cells of the experiments `digits` and `cifar10`, the latter in three rounds of two local epochs. All
methods deploy the same last round. The record is ``c2m3_fl/flower/results/exchange_accuracy.json``; ``--redraw`` prints
its table.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from c2m3_fl import C2M3, flower
from c2m3_fl.flower.incoming.records import from_params, to_params
from c2m3_fl.flower.queries.refit import ClientRefit, RegMean, price
from c2m3_fl.flower.serial_grid import SerialGrid
from simulations.client_app import build_app
from simulations.data import federated_data
from simulations.design import load_design
from simulations.flower_log import flower_log
from simulations.settings import Settings
from simulations.simulated_server import SimulatedServer
from simulations.start import start_model
from simulations.strategies import fedavg
from simulations.training import log_probabilities, score
from simulations.trial import RememberingTrainer
from tests.benchmarks.records import read_record, write_record

RESULTS = Path(flower.__file__).parent / "results" / "exchange_accuracy.json"
COMMAND = "python -m tests.benchmarks.exchange_accuracy"
CELLS = (
    ("digits", "shared", "Dirichlet .1", "5"),
    ("digits", "shared", "two classes", "5"),
    ("digits", "own", "two classes", "5"),
    ("cifar10", "shared", "Dirichlet .1", "1"),
    ("cifar10", "own", "two classes", "1"),
)
NETWORKS = {"digits": "MLP, digits", "cifar10": "LeNet, CIFAR-10"}
ROUNDS, EPOCHS = 3, 2  # of the federations on CIFAR-10
METHODS: dict[str, ClientRefit | RegMean | None] = {
    "aggregate": None,
    "RegMean()": RegMean(),
    "exchanges=1": ClientRefit(exchanges=1),
    "exchanges=2": ClientRefit(exchanges=2),
    "all": ClientRefit(),
}


def federations(seeds: int) -> Iterator[tuple[dict[str, str], Settings]]:
    """Labels and settings of every federation."""
    for name, *levels in CELLS:
        design = load_design(name)
        cell = next(each for each in design.cells if list(each.labels.values()) == levels)
        for seed in range(seeds):
            settings = replace(cell.settings, seed=seed)
            if name == "cifar10":
                settings = replace(settings, rounds=ROUNDS, local_epochs=EPOCHS)
            about = {"network": NETWORKS[name], **cell.labels, "local epochs": str(settings.local_epochs)}
            yield about, settings


def measure(settings: Settings) -> Iterator[dict[str, Any]]:
    """Exchanges and test accuracy of every method's last model."""
    data = federated_data(settings)
    app = build_app(RememberingTrainer())
    for method, recalibrate in METHODS.items():
        model = start_model(settings)
        server = SimulatedServer(model, data.calibration, len(data.parts))
        example, asked = data.calibration[0][:2], recalibrate or "none"
        grid = SerialGrid(app, settings.clients, run_config=settings.to_run_config())
        with flower_log(logging.ERROR):
            strategy = C2M3(
                fedavg(server), model=model, example_inputs=example, recalibrate=asked, head=None, judge=None
            )
            result = strategy.start(grid, from_params(model.state_dict()), settings.rounds)
        predicted = log_probabilities(model, to_params(result.arrays), data.held_out.inputs)
        exchanges = price(recalibrate, strategy.setup.data.program, model.state_dict()).exchanges if recalibrate else 0
        yield {
            "method": method,
            "exchanges": exchanges,
            "accuracy": round(score(predicted, data.held_out.labels).accuracy, 5),
        }


def table(rows: Iterable[Mapping[str, Any]]) -> str:
    """Mean accuracy over seeds, as a markdown table."""
    places = ("network", "start", "partition", "local epochs")
    found: dict[tuple[str, ...], dict[str, list[float]]] = {}
    most: dict[tuple[str, ...], int] = {}
    for row in rows:
        where = tuple(row[place] for place in places)
        found.setdefault(where, {}).setdefault(row["method"], []).append(row["accuracy"])
        most[where] = max(most.get(where, 0), row["exchanges"])
    titles = [name if name in ("aggregate", "all") else f"`{name}`" for name in METHODS]
    lines = ["| " + " | ".join([*places, *titles]) + " |", "|" + " --- |" * len(places) + " ---: |" * len(METHODS)]
    for where, methods in found.items():
        means = [f"{fmean(methods[name]):.3f}".lstrip("0") for name in METHODS]
        lines.append("| " + " | ".join([*where, *means]) + f" ({most[where]}) |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--redraw", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.redraw:
        print(table(read_record(RESULTS)["rows"]))
        return
    rows = []
    for about, settings in federations(options.seeds):
        for found in measure(settings):
            rows.append({**about, "seed": settings.seed, **found})
            print(*rows[-1].values(), flush=True)
    write_record(RESULTS, COMMAND, {"cells": CELLS, "rounds": ROUNDS, "epochs": EPOCHS, "seeds": options.seeds}, rows)
    print(table(rows))


if __name__ == "__main__":
    main()
