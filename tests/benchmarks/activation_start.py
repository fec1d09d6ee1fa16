"""One merge of clients with starts of their own: the search from the weights, and from the activations.

    python -m tests.benchmarks.activation_start         table and record (needs C2M3_DATA)

The record is ``c2m3_fl/flower/results/activation_start.json``, or that file in the folder `--out`.

Why deep networks are matched from their activations in `c2m3_fl.flower.aligning.activation_start`. The federations
are those of the experiments `resnet8` and `cifar10`, after one round.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from c2m3_fl import merge
from c2m3_fl.core.spec import Params
from c2m3_fl.merging.align.methods import MergeStart
from simulations.client_app import Assignment, own_start, train_locally
from simulations.data import federated_data
from simulations.design import load_design
from simulations.models import build_model
from simulations.settings import Settings
from simulations.training import log_probabilities, score
from tests.benchmarks.records import write_record

CASES = (("resnet8", 1), ("cifar10", 5))  # experiment and local epochs
PARTITIONS = ("IID", "Dirichlet .1")
STARTS: tuple[MergeStart, ...] = ("auto", "activations")


def federations(name: str, epochs: int, seeds: int) -> Iterator[tuple[str, Settings]]:
    """Partition and settings of every federation."""
    cells = {cell.labels["partition"]: cell for cell in load_design(name).cells if cell.labels["start"] == "own"}
    for partition in PARTITIONS:
        for seed in range(seeds):
            yield partition, replace(cells[partition].settings, seed=seed, local_epochs=epochs)


def trained(settings: Settings) -> list[Params]:
    """The clients' networks after one round."""
    starts = [own_start(settings, client) for client in range(settings.clients)]
    return [train_locally(Assignment(settings, client, 1, start, 0.0))[0] for client, start in enumerate(starts)]


def measure(settings: Settings, nodes: list[Params]) -> Iterator[dict[str, Any]]:
    """Agreement, accuracy and seconds of the merge with REPAIR, by where the search starts."""
    data = federated_data(settings)
    model = build_model(settings, data.shape, data.classes, 0)
    weights = [len(data.training_share(client)) for client in range(settings.clients)]
    for start in STARTS:
        merged = merge(model, nodes, calibration=data.calibration, weights=weights, recalibrate="repair", start=start)
        predicted = log_probabilities(model, merged.state_dict, data.held_out.inputs)
        yield {
            "start": start,
            "agreement": merged.match.objectives[-1] if merged.match is not None else None,
            "accuracy": score(predicted, data.held_out.labels).accuracy,
            "seconds": merged.report.match_seconds,
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("c2m3_fl/flower/results"))
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for name, epochs in CASES:
        for partition, settings in federations(name, epochs, options.seeds):
            for found in measure(settings, trained(settings)):
                rows.append({"network": name, "partition": partition, "seed": settings.seed, **found})
                print(*rows[-1].values(), flush=True)
    print("| network | partition | " + " | ".join(map(str, STARTS)) + " |\n| --- | --- | ---: | ---: |")
    for name, _ in CASES:
        for partition in PARTITIONS:
            here = [row for row in rows if (row["network"], row["partition"]) == (name, partition)]
            means = [fmean(row["accuracy"] for row in here if row["start"] == start) for start in STARTS]
            print(f"| {name} | {partition} | " + " | ".join(f"{mean:.3f}" for mean in means) + " |")
    options.out.mkdir(parents=True, exist_ok=True)
    configuration = {"cases": CASES, "partitions": PARTITIONS, "seeds": options.seeds}
    write_record(
        options.out / "activation_start.json", "python -m tests.benchmarks.activation_start", configuration, rows
    )


if __name__ == "__main__":
    main()
