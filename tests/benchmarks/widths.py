"""One-shot merges of clients of different widths: MLPs on digits, two clients of every width, own initialisations.

    python -m tests.benchmarks.widths [--seeds 0 1 2]

trains the clients, prints a markdown table, accuracy in percent (mean ± standard deviation over seeds), and writes
``c2m3_fl/merging/results/widths.json``; ``--redraw`` prints that file's table. A merge is given the inputs of 300
training digits that no client has, and no label. That missing units count as zeros on axes that read units was chosen
on seeds 10, 11 and 12 (``--seeds 10 11 12 --trial``), which are not in the table. ``--picture FILE`` draws where the
units of the first hidden layer of seed 0 (IID) are in the merged network.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from unittest.mock import patch

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from c2m3_fl import merging
from c2m3_fl.merging import Recalibration, Refit, merge
from c2m3_fl.merging.widths import merge_widths
from simulations.data import FederatedData, derived_seed, federated_data
from simulations.models import build_model
from simulations.settings import Settings
from simulations.training import train
from tests.benchmarks.merging_cases import accuracy, probabilities
from tests.benchmarks.records import read_record, write_record

RESULTS = Path(merging.__file__).parent / "results" / "widths.json"
COMMAND = "python -m tests.benchmarks.widths"
WIDTHS = {"½": "32,32", "1": "64,64", "2": "128,128"}
CLIENTS = [width for width in WIDTHS for _ in range(2)]
SETTINGS = Settings(
    data="digits",
    model="mlp",
    clients=len(CLIENTS),
    calibration_size=300,
    batch_size=16,
    local_epochs=20,
    optimiser="adam",
    learning_rate=1e-3,
)
PARTITIONS = {
    "IID": replace(SETTINGS, partition="iid"),
    "Dirichlet .3": replace(SETTINGS, partition="dirichlet", alpha=0.3),
}
REFIT = Refit(scores=True)
RECALIBRATIONS: dict[str, Recalibration | str] = {"": "none", " + REPAIR": "repair", " + refit": REFIT}


@dataclass(frozen=True)
class Row:
    """One measurement."""

    partition: str
    seed: int
    column: str
    accuracy: float


@dataclass(frozen=True, eq=False)
class Trained:
    """Clients of every width."""

    models: list[nn.Module]
    nodes: list[dict[str, Tensor]]
    weights: list[float]
    data: FederatedData

    @classmethod
    def of(cls, settings: Settings) -> Trained:
        """Train every client on its own images, from its own initialisation."""
        data = federated_data(settings)
        kinds = {
            name: build_model(replace(settings, hidden_widths=hidden), data.shape, data.classes, seed=0).eval()
            for name, hidden in WIDTHS.items()
        }
        nodes = []
        for index, name in enumerate(CLIENTS):
            own = replace(settings, hidden_widths=WIDTHS[name])
            model = build_model(own, data.shape, data.classes, seed=derived_seed(settings.seed, 2, index))
            train(model, data.training_share(index), own, derived_seed(settings.seed, 3, index))
            nodes.append(dict(model.state_dict()))
        return cls([kinds[name] for name in CLIENTS], nodes, [float(len(part)) for part in data.parts], data)

    def merged(self, width: int | None, recalibrate: Recalibration | str, method: str = "c2m3") -> float:
        """Test accuracy of a merge with the width of a client, or the largest."""
        done = merge(
            models=self.models,
            state_dicts=self.nodes,
            weights=self.weights,
            width=width,
            calibration=self.data.calibration,
            recalibrate=recalibrate,
            method=method,
        )
        return accuracy(self.models[-1 if width is None else width], done.state_dict, self.data.held_out)


def rows(partition: str, seed: int, *, trial: bool) -> Iterator[Row]:
    """Clients, their ensemble, and every merge of one seed."""
    found = Trained.of(replace(PARTITIONS[partition], seed=seed))
    test = found.data.held_out
    scores = [accuracy(model, node, test) for model, node in zip(found.models, found.nodes, strict=True)]
    votes = [probabilities(model, node, test.inputs) for model, node in zip(found.models, found.nodes, strict=True)]
    share = torch.tensor(found.weights) / sum(found.weights)
    ensemble = torch.einsum("n,nbc->bc", share, torch.stack(votes)).argmax(1)
    measured = {f"clients of width {name}": statistics.mean(scores[2 * i : 2 * i + 2]) for i, name in enumerate(WIDTHS)}
    measured |= {"best client": max(scores), "ensemble": float((ensemble == test.labels).double().mean())}
    for suffix, recalibrate in RECALIBRATIONS.items():
        measured[f"no match{suffix}"] = found.merged(None, recalibrate, "mean")
        measured[f"universe{suffix}"] = found.merged(None, recalibrate)
        if trial:
            with patch.object(merge_widths, "reading_axes", lambda *_: {}):
                measured[f"universe, means over owners on all axes{suffix}"] = found.merged(None, recalibrate)
    for index, name in enumerate(WIDTHS):
        for suffix, recalibrate in RECALIBRATIONS.items():
            if suffix and name != "2":
                measured[f"universe{suffix}, cut to width {name}"] = found.merged(2 * index, recalibrate)
    return iter([Row(partition, seed, column, value) for column, value in measured.items()])


def table(found: list[Row]) -> str:
    """Markdown: one line per column, one column per partition, mean ± standard deviation over seeds."""
    partitions = list(dict.fromkeys(row.partition for row in found))
    lines = [f"| | {' | '.join(partitions)} |", f"| --- |{' ---: |' * len(partitions)}"]
    for column in dict.fromkeys(row.column for row in found):
        cells = []
        for partition in partitions:
            scores = [100 * row.accuracy for row in found if (row.partition, row.column) == (partition, column)]
            spread = statistics.stdev(scores) if len(scores) > 1 else 0.0
            cells.append(f"{statistics.mean(scores):.1f} ± {spread:.1f}")
        lines.append(f"| {column} | {' | '.join(cells)} |")
    return "\n".join(lines)


def draw(file: Path) -> None:
    """Who maps where: per client and place the cosine of its unit's weights with those of the other owners."""
    found = Trained.of(PARTITIONS["IID"])
    merged = merge(models=found.models, state_dicts=found.nodes, calibration=found.data.calibration, recalibrate="none")
    assert merged.widths is not None
    (name, places), *_ = merged.widths.into[-1].items()
    units = torch.stack([own[name] for own in merged.widths.into])
    rows = torch.zeros(*units.shape, found.nodes[0]["1.weight"].shape[1])
    for client, node in enumerate(found.nodes):
        rows[client] = node["1.weight"][units[client].clamp_min(0)] * (units[client] >= 0)[:, None]
    cosines = torch.cosine_similarity(rows, rows.sum(0) - rows, dim=-1).masked_fill(units < 0, torch.nan)
    order = (units >= 0).sum(0).argsort(descending=True, stable=True)
    figure = Figure(figsize=(9, 2.4), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(cosines[:, order], aspect="auto", cmap="viridis", vmin=0, vmax=1, interpolation="nearest")
    axes.set_facecolor("0.92")
    axes.set_yticks(range(len(CLIENTS)), [f"client {place}, width {width}" for place, width in enumerate(CLIENTS)])
    axes.set_xlabel(
        f"{len(places)} units of the first hidden layer of the merged network, those with most owners first"
    )
    figure.colorbar(image, label="cosine with the others")
    figure.savefig(file, dpi=160)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="Table of merges of different widths.")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--trial", action="store_true", help="measure means over owners on all axes, write no record")
    parser.add_argument("--redraw", action="store_true", help="print the table of the record and measure nothing")
    parser.add_argument("--picture", type=Path, help="draw who maps where, and measure nothing")
    arguments = parser.parse_args()
    if arguments.picture is not None:
        draw(arguments.picture)
        return
    if arguments.redraw:
        print(table([Row(**row) for row in read_record(RESULTS)["rows"]]))
        return
    torch.set_num_threads(1)
    found = [
        row
        for partition in PARTITIONS
        for seed in arguments.seeds
        for row in rows(partition, seed, trial=arguments.trial)
    ]
    if not arguments.trial:
        configuration = {
            "seeds": arguments.seeds,
            "widths": WIDTHS,
            "clients": CLIENTS,
            "settings": {name: asdict(settings) for name, settings in PARTITIONS.items()},
        }
        write_record(RESULTS, COMMAND, configuration, [asdict(row) for row in found])
    print(table(found))


if __name__ == "__main__":
    main()
