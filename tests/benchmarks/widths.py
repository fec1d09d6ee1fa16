"""One-shot merges of clients of different widths: two clients of every width, each from its own initialisation.

    python -m tests.benchmarks.widths [--cases NAME ...] [--seeds 0 1 2]

trains the clients, prints a markdown table, accuracy in percent (mean ± standard deviation over seeds), and writes
``c2m3_fl/merging/results/widths.json``, in which rows of other cases and seeds stay; ``--redraw`` prints that file's
table. A merge is given the inputs of 300 training images (200 of CIFAR-10) that no client has, and no label. That
missing units count as zeros on axes that read units was chosen on seeds 10, 11 and 12 of digits (``--cases digits
--seeds 10 11 12 --trial``), which are not in the table. ``--picture FILE`` draws where the units of the first hidden
layer of seed 0 (digits, IID) are in the merged network.
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
from simulations.distillation import distil_towards
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
CIFAR = replace(
    SETTINGS, data="cifar10", model="cnn", train_size=3000, test_size=1000, local_epochs=6, calibration_size=200
)
CASES = {
    "digits": SETTINGS,
    "mnist": replace(SETTINGS, data="mnist", train_size=6000, test_size=2000, batch_size=32),
    "cifar10": CIFAR,
    "resnet8": replace(CIFAR, model="resnet8-bn", train_size=1800),
}
SCALES = {"½": 0.5, "1": 1.0, "2": 2.0}  # of networks other than MLPs
PARTITIONS = {
    "IID": {"partition": "iid"},
    "Dirichlet .3": {"partition": "dirichlet", "alpha": 0.3},
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
    case: str = "digits"


def of_width(settings: Settings, name: str) -> Settings:
    """The same settings with the network of one width."""
    return replace(settings, hidden_widths=WIDTHS[name], width=SCALES[name] if settings.model != "mlp" else 1.0)


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
            name: build_model(of_width(settings, name), data.shape, data.classes, seed=0).eval() for name in WIDTHS
        }
        nodes = []
        for index, name in enumerate(CLIENTS):
            own = of_width(settings, name)
            model = build_model(own, data.shape, data.classes, seed=derived_seed(settings.seed, 2, index))
            train(model, data.training_share(index), own, derived_seed(settings.seed, 3, index))
            nodes.append(dict(model.state_dict()))
        return cls([kinds[name] for name in CLIENTS], nodes, [float(len(part)) for part in data.parts], data)

    def distilled(self, share: Tensor) -> float:
        """Test accuracy of a new network of the largest width, trained towards the clients' mean probabilities."""
        inputs = torch.cat(self.data.calibration)
        votes = torch.stack(
            [probabilities(model, node, inputs) for model, node in zip(self.models, self.nodes, strict=True)]
        )
        wanted = torch.einsum("n,nbc->bc", share.to(votes), votes).float()
        student = distil_towards(self.models[-1], self.models[-1].state_dict(), wanted, inputs)
        return accuracy(self.models[-1], student, self.data.held_out)

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


def rows(case: str, partition: str, seed: int, *, trial: bool) -> Iterator[Row]:
    """Clients, their ensemble, and every merge of one seed; without a match on digits alone."""
    found = Trained.of(replace(CASES[case], seed=seed, **PARTITIONS[partition]))
    test = found.data.held_out
    scores = [accuracy(model, node, test) for model, node in zip(found.models, found.nodes, strict=True)]
    votes = [probabilities(model, node, test.inputs) for model, node in zip(found.models, found.nodes, strict=True)]
    share = torch.tensor(found.weights) / sum(found.weights)
    ensemble = torch.einsum("n,nbc->bc", share, torch.stack(votes)).argmax(1)
    measured = {f"clients of width {name}": statistics.mean(scores[2 * i : 2 * i + 2]) for i, name in enumerate(WIDTHS)}
    measured |= {"best client": max(scores), "ensemble": float((ensemble == test.labels).double().mean())}
    measured["distillation"] = found.distilled(share)
    for suffix, recalibrate in RECALIBRATIONS.items():
        if case == "digits":
            measured[f"no match{suffix}"] = found.merged(None, recalibrate, "mean")
        measured[f"universe{suffix}"] = found.merged(None, recalibrate)
        if trial:
            with patch.object(merge_widths, "reading_axes", lambda *_: {}):
                measured[f"universe, means over owners on all axes{suffix}"] = found.merged(None, recalibrate)
    for index, name in enumerate(WIDTHS):
        for suffix, recalibrate in RECALIBRATIONS.items():
            if suffix and name != "2" and (case == "digits" or recalibrate is REFIT):
                measured[f"universe{suffix}, cut to width {name}"] = found.merged(2 * index, recalibrate)
    return iter([Row(partition, seed, column, value, case) for column, value in measured.items()])


def table(found: list[Row]) -> str:
    """Markdown: one line per column, one column per case and partition, mean ± standard deviation over seeds."""
    groups = list(dict.fromkeys((row.case, row.partition) for row in found))
    lines = [
        f"| | {' | '.join(f'{case}, {partition}' for case, partition in groups)} |",
        f"| --- |{' ---: |' * len(groups)}",
    ]
    for column in dict.fromkeys(row.column for row in found):
        cells = []
        for group in groups:
            scores = [100 * row.accuracy for row in found if (row.case, row.partition, row.column) == (*group, column)]
            spread = f" ± {statistics.stdev(scores):.1f}" if len(scores) > 1 else ""
            cells.append(f"{statistics.mean(scores):.1f}{spread}" if scores else "–")
        lines.append(f"| {column} | {' | '.join(cells)} |")
    return "\n".join(lines)


def draw(file: Path) -> None:
    """Who maps where: per client and place the cosine of its unit's weights with those of the other owners."""
    found = Trained.of(replace(SETTINGS, **PARTITIONS["IID"]))
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
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES))
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
    found: list[Row] = []
    for case in arguments.cases:
        for seed in arguments.seeds:
            for partition in PARTITIONS:
                found += rows(case, partition, seed, trial=arguments.trial)
            if not arguments.trial:
                found = _saved(found)
    print(table(found))


def _saved(found: list[Row]) -> list[Row]:
    """The record's rows and these, which replace those of the same case, partition and seed; written."""
    known = [Row(**row) for row in read_record(RESULTS)["rows"]] if RESULTS.exists() else []
    new = {(row.case, row.partition, row.seed) for row in found}
    every = [row for row in known if (row.case, row.partition, row.seed) not in new] + found
    every.sort(key=lambda row: (list(CASES).index(row.case), list(PARTITIONS).index(row.partition), row.seed))
    configuration = {
        "widths": WIDTHS,
        "scales": SCALES,
        "clients": CLIENTS,
        "settings": {name: asdict(settings) for name, settings in CASES.items()},
        "partitions": PARTITIONS,
    }
    write_record(RESULTS, COMMAND, configuration, [asdict(row) for row in every])
    return every


if __name__ == "__main__":
    main()
