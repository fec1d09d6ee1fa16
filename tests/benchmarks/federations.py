"""Three federations that ran apart on digits, merged, and then continued as one.

    python -m tests.benchmarks.federations             table, ``simulations/results/federations.json`` and its picture
    python -m tests.benchmarks.federations --redraw    table and picture of that record

Twelve clients, Dirichlet .5; four of them each ran FedAvg for ten rounds from a start of their own federation. Their
three networks are merged, and FedAvg goes on for five rounds with all clients, from the merge or from one of the three.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch
from flwr.app import ArrayRecord, MetricRecord
from flwr.serverapp.strategy import FedAvg
from matplotlib.figure import Figure
from torch import nn

from c2m3_fl import merge
from c2m3_fl.core.spec import Params
from c2m3_fl.flower.incoming.records import from_params, to_params
from c2m3_fl.flower.serial_grid import SerialGrid
from simulations.client_app import build_app
from simulations.data import federated_data
from simulations.flower_log import flower_log
from simulations.models import build_model
from simulations.settings import Settings
from simulations.training import ensemble, log_probabilities, score
from simulations.trial import RememberingTrainer
from tests.benchmarks.records import read_record, write_record

RESULTS = Path("simulations/results/federations.json")
COMMAND = "python -m tests.benchmarks.federations"
FEDERATIONS, CLIENTS = 3, 4  # clients of each
APART, TOGETHER = 10, 5  # rounds
SETTINGS = Settings(
    data="digits",
    clients=FEDERATIONS * CLIENTS,
    partition="dirichlet",
    alpha=0.5,
    initialisation="shared",
    hidden_widths="64,64",
    local_epochs=2,
    calibration_size=200,
)
MERGES: Mapping[str, Mapping[str, Any]] = {
    "plain mean": {"method": "mean", "recalibrate": "none"},
    "plain mean + refit": {"method": "mean", "recalibrate": "refit"},
    "Git Re-Basin": {"method": "git-rebasin", "recalibrate": "none"},
    "C2M3": {"recalibrate": "none"},
    "C2M3 + REPAIR": {"recalibrate": "repair"},
    "C2M3 + refit": {"recalibrate": "refit"},
}


@dataclass(frozen=True)
class Row:
    """Accuracy on the test images: `round` 0 is the merge, the others are rounds of all clients after it."""

    seed: int
    series: str
    round: int
    accuracy: float


class SomeNodes(SerialGrid):
    """A grid on which only some of the nodes are there."""

    present: range

    def get_node_ids(self) -> Iterable[int]:
        """Ids of the nodes that are there."""
        return [node for node in super().get_node_ids() if node - 1 in self.present]


@dataclass(frozen=True, eq=False)
class Run:
    """The federation of one seed: its settings, its clients, whose trainings are cached, and a network to evaluate."""

    settings: Settings
    trainer: RememberingTrainer
    model: nn.Module

    def accuracy(self, params: Params) -> float:
        """Accuracy on the test images."""
        images = federated_data(self.settings).held_out
        return score(log_probabilities(self.model, params, images.inputs), images.labels).accuracy

    def fedavg(self, clients: range, start: Params, rounds: int) -> tuple[Params, list[float]]:
        """The last model of FedAvg among these clients, and its accuracy after every round."""
        grid = SomeNodes(build_app(self.trainer), self.settings.clients, run_config=self.settings.to_run_config())
        grid.present, found = clients, []

        def evaluate(server_round: int, arrays: ArrayRecord) -> MetricRecord:
            found.append(self.accuracy(to_params(arrays)))
            return MetricRecord({"accuracy": found[-1]})

        strategy = FedAvg(fraction_evaluate=0.0, min_train_nodes=len(clients), min_available_nodes=len(clients))
        result = strategy.start(grid, from_params(start), rounds, evaluate_fn=evaluate)
        return to_params(result.arrays), found[1:]


def rows(seed: int) -> Iterator[Row]:
    """One federation of federations."""
    settings = Settings(**{**asdict(SETTINGS), "seed": seed})
    data = federated_data(settings)
    starts = [build_model(settings, data.shape, data.classes, 1000 + FEDERATIONS * seed + index) for index in range(3)]
    run = Run(settings, RememberingTrainer(), build_model(settings, data.shape, data.classes, 0))
    nodes, weights = [], []
    for index, start in enumerate(starts):
        clients = range(CLIENTS * index, CLIENTS * (index + 1))
        nodes.append(run.fedavg(clients, start.state_dict(), APART)[0])
        weights.append(sum(len(data.parts[client]) for client in clients))
    scores = [run.accuracy(node) for node in nodes]
    yield Row(seed, "mean federation", 0, fmean(scores))
    together = ensemble(log_probabilities(run.model, node, data.held_out.inputs) for node in nodes)
    yield Row(seed, "ensemble", 0, score(together, data.held_out.labels).accuracy)
    merges = {"best federation": nodes[scores.index(max(scores))]}
    for name, options in MERGES.items():
        given = {} if options["recalibrate"] == "none" else {"calibration": data.calibration}
        example = {} if given else {"example_inputs": data.calibration[0][:2]}
        merges[name] = merge(run.model, nodes, weights=weights, **options, **given, **example).state_dict
    for name, params in merges.items():
        yield Row(seed, name, 0, run.accuracy(params))
        for number, value in enumerate(run.fedavg(range(settings.clients), params, TOGETHER)[1], 1):
            yield Row(seed, name, number, value)


def table(found: list[dict[str, Any]]) -> str:
    """Markdown: accuracy of the merge, and after rounds of all clients, mean ± standard deviation over seeds."""
    numbers = sorted({row["round"] for row in found})
    lines = [f"| rounds after it | {' | '.join(map(str, numbers))} |", "| --- |" + " ---: |" * len(numbers)]
    for series in dict.fromkeys(row["series"] for row in found):
        cells = []
        for number in numbers:
            values = [row["accuracy"] for row in found if (row["series"], row["round"]) == (series, number)]
            cells.append(f"{fmean(values):.3f} ± {stdev(values):.3f}" if len(values) > 1 else "")
        lines.append(f"| {series} | {' | '.join(cells)} |")
    return "\n".join(lines)


def draw(found: list[dict[str, Any]], file: Path) -> None:
    """Accuracy against rounds after the merge."""
    colours = ("#000000", "#7F7F7F", "#E69F00", "#56B4E9", "#0072B2", "#D55E00", "#009E73")
    figure = Figure(figsize=(5.4, 3.2), layout="constrained")
    panel = figure.subplots()
    names = [
        name for name in dict.fromkeys(row["series"] for row in found) if name not in ("mean federation", "ensemble")
    ]
    for name, colour in zip(names, colours, strict=True):
        numbers = sorted({row["round"] for row in found if row["series"] == name})
        values = [[row["accuracy"] for row in found if (row["series"], row["round"]) == (name, n)] for n in numbers]
        panel.plot(numbers, [fmean(each) for each in values], color=colour, label=name, marker="o", markersize=3)
        panel.fill_between(
            numbers, list(map(min, values)), list(map(max, values)), color=colour, alpha=0.1, linewidth=0
        )
    panel.set_xlabel("rounds of all twelve clients after the merge")
    panel.set_ylabel("test accuracy")
    panel.spines[["top", "right"]].set_visible(False)
    panel.legend(frameon=False, fontsize=7, loc="lower right")
    figure.savefig(file, dpi=120)


def main() -> None:
    """Measure, write, draw and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--redraw", action="store_true", help="table and picture of the record, measuring nothing")
    options = parser.parse_args()
    if not options.redraw:
        torch.set_num_threads(1)
        with flower_log(logging.ERROR):
            found = [asdict(row) for seed in options.seeds for row in rows(seed)]
        configuration = {
            "seeds": options.seeds,
            "settings": asdict(SETTINGS),
            "rounds": [APART, TOGETHER],
            "threads": 1,
        }
        write_record(RESULTS, COMMAND, configuration, found)
    found = read_record(RESULTS)["rows"]
    draw(found, RESULTS.with_suffix(".png"))
    print(table(found))


if __name__ == "__main__":
    main()
