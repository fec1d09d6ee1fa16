"""A published one-shot table: CIFAR-10, ten clients, three convolutions, one merge. Needs no Flower.

    python -m simulations.one_shot_table                                            in full, on the GPU that is there
    python -m simulations.one_shot_table --images 2000 --epochs 2 --width 16 --alphas 0.1       scaled, on a CPU

The protocol is that of Co-Boosting (Dai et al. 2024): SGD .01 with momentum .9, batches of 128, 100 local epochs, a
Dirichlet partition of every class; without augmentation. Every cell (start, concentration, seed) is one row of the JSON
file, and a run that was ended goes on with the cells that it lacks. The columns are FedAvg and the average after
matching, each as it is, with the last layer fitted to the clients' labels, with the operators refit to the clients' own
networks on their own data, and with both: what C2M3 deploys with ``head="labels"`` and ``ClientRefit()``.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from itertools import product
from pathlib import Path
from statistics import mean

import numpy as np
import torch
from torch import Tensor, nn

from c2m3_fl.core import permutation
from c2m3_fl.core.averaging import weighted_mean
from c2m3_fl.core.match import match
from c2m3_fl.core.spec import Params
from c2m3_fl.errors import ConfigError
from c2m3_fl.merging.recalibrate.head.fit import FitHead
from c2m3_fl.merging.recalibrate.setting import prepare, usable_device
from c2m3_fl.symmetry.discover import permutation_spec
from simulations.ledger import now, place_of, surroundings
from simulations.models import conv3
from simulations.pooled_refit import Share, in_batches, refit
from simulations.sources import KINDS, open_source
from simulations.verdict import spread

PUBLISHED = {  # test accuracy in the paper, by concentration; its networks are trained with augmentation
    "FedAvg": {0.05: 0.175, 0.1: 0.275, 0.3: 0.464},
    "FedDF": {0.05: 0.375, 0.1: 0.496, 0.3: 0.672},
    "DENSE": {0.05: 0.384, 0.1: 0.478, 0.3: 0.668},
    "Co-Boosting": {0.05: 0.472, 0.1: 0.571, 0.3: 0.702},
}
STARTS, MERGES = ("shared", "own"), ("FedAvg", "C2M3")
COLUMNS = ("average", "+ head", "+ refit", "+ refit + head")
_RATE, _MOMENTUM, _BATCH = 0.01, 0.9, 128
_SCORED = 500  # images that are scored at once
_LEAST = 10  # images of a client


@dataclass(frozen=True)
class Scale:
    """What a run's size is; the defaults are the published protocol.

    Attributes
    ----------
    images : int
        Training images of all clients together.
    epochs : int
        Local epochs.
    width : int
        Channels of each convolution.
    clients : int
        Number of clients.
    """

    images: int = 50_000
    epochs: int = 100
    width: int = 128
    clients: int = 10


@dataclass(frozen=True)
class Cell:
    """One federation.

    Attributes
    ----------
    start, alpha, seed : str, float, int
        Whether the clients start from one network, the concentration of the partition, the seed of everything.
    merged : mapping
        Test accuracy by `MERGES` and `COLUMNS`.
    clients, ensemble : sequence of float, float
        Test accuracy of every client's network, and of their mean probabilities.
    moved : sequence of float
        Share of each client's units that the match moved.
    training_seconds, merging_seconds : float
        Wall-clock times; merging includes tracing and evaluation.
    date : str
        Time of the end, in UTC.
    """

    start: str
    alpha: float
    seed: int
    merged: Mapping[str, Mapping[str, float]]
    clients: Sequence[float]
    ensemble: float
    moved: Sequence[float]
    training_seconds: float
    merging_seconds: float
    date: str


def dirichlet(labels: Tensor, clients: int, alpha: float, seed: int) -> list[Tensor]:
    """Rows of every client: each class is divided by shares from a Dirichlet distribution.

    Drawn again until every client has ten images.
    """
    if clients * _LEAST > len(labels):
        raise ConfigError(f"{len(labels)} images for {clients} clients, expected {_LEAST} for each at least")
    generator = np.random.default_rng(seed)
    while True:
        parts: list[list[int]] = [[] for _ in range(clients)]
        for label in sorted(set(labels.tolist())):
            rows = generator.permutation(np.flatnonzero(labels.numpy() == label))
            cuts = np.cumsum(generator.dirichlet([alpha] * clients))[:-1] * len(rows)
            for part, found in zip(parts, np.split(rows, cuts.astype(int)), strict=True):
                part += found.tolist()
        if min(map(len, parts)) >= _LEAST:
            return [torch.tensor(sorted(part)) for part in parts]


def load(split: str, count: int, device: torch.device) -> Share:
    """The first images of a split of CIFAR-10, normalised, and their labels."""
    source, kind = open_source("cifar10", split), KINDS["cifar10"]
    rows = np.arange(len(source.labels))[:count]
    pixels = torch.from_numpy(source.raw(rows)).permute(0, 3, 1, 2).float() / 255
    centre, spread = (torch.tensor(values).view(1, -1, 1, 1) for values in (kind.mean, kind.std))
    return ((pixels - centre) / spread).to(device), torch.from_numpy(source.labels[rows]).to(device)


def train(model: nn.Module, share: Share, epochs: int, seed: int) -> dict[str, Tensor]:
    """The state dict after local training; the model is trained in place."""
    images, labels = share
    generator = torch.Generator().manual_seed(seed)
    optimiser = torch.optim.SGD(model.parameters(), _RATE, momentum=_MOMENTUM)
    model.train()
    for _ in range(epochs):
        for rows in torch.split(torch.randperm(len(labels), generator=generator).to(labels.device), _BATCH):
            optimiser.zero_grad()
            nn.functional.cross_entropy(model(images[rows]), labels[rows]).backward()  # type: ignore[no-untyped-call]  # torch's
            optimiser.step()
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def head(model: nn.Module, average: Params, shares: Sequence[Share]) -> dict[str, Tensor]:
    """The last layer fitted to all labels."""
    data = [batch for share in shares for batch in in_batches(share)]
    return FitHead()(prepare(model, average, [average], data)).state_dict


def log_probabilities(model: nn.Module, params: Params, images: Tensor) -> Tensor:
    """Shape (images, classes)."""
    model.load_state_dict(params)
    with torch.no_grad():
        return torch.cat([model(batch).log_softmax(dim=1) for batch in torch.split(images, _SCORED)])


def cell(scale: Scale, start: str, alpha: float, seed: int, device: torch.device) -> Cell:
    """Train the clients of one federation, merge them in every way, and evaluate."""
    began = time.perf_counter()
    train_set, (images, labels) = load("train", scale.images, device), load("test", 10_000, device)
    rows = dirichlet(train_set[1].cpu(), scale.clients, alpha, seed)
    shares = [(train_set[0][part], train_set[1][part]) for part in rows]

    def network(number: int) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1000 * seed + number)
            return conv3((3, 32, 32), scale.width, 10).to(device)

    own = [
        train(network(0 if start == "shared" else 1 + index), share, scale.epochs, seed=1000 * seed + index)
        for index, share in enumerate(shares)
    ]
    trained, model = time.perf_counter(), network(0).eval()
    weights = torch.tensor([len(part) for part in rows], dtype=torch.float64)
    weights /= weights.sum()
    spec = permutation_spec(model, images[:2])
    found = match(spec, own, weights=weights)
    aligned = [permutation.apply(spec, perm, node) for perm, node in zip(found.permutations, own, strict=True)]

    def accuracy(params: Params) -> float:
        return round(float((log_probabilities(model, params, images).argmax(1) == labels).double().mean()), 4)

    merged: dict[str, dict[str, float]] = {}
    for name, nodes in {"FedAvg": own, "C2M3": aligned}.items():
        average = weighted_mean(nodes, weights)
        fitted = refit(model, average, nodes, shares, weights.tolist())
        candidates = (average, head(model, average, shares), fitted, head(model, fitted, shares))
        merged[name] = {column: accuracy(each) for column, each in zip(COLUMNS, candidates, strict=True)}
    together = torch.stack([log_probabilities(model, each, images) for each in own]).logsumexp(0)
    return Cell(
        start,
        alpha,
        seed,
        merged,
        clients=[accuracy(each) for each in own],
        ensemble=round(float((together.argmax(1) == labels).double().mean()), 4),
        moved=[round(permutation.share_moved(perm), 4) for perm in found.permutations],
        training_seconds=round(trained - began, 1),
        merging_seconds=round(time.perf_counter() - trained, 1),
        date=now(),
    )


def table(cells: Sequence[Cell], scale: Scale) -> str:
    """Accuracies, mean over seeds, and what head, refit and alignment add; in full, the published ones below."""
    lines = [["start", "α", "merge", *COLUMNS, "best client", "ensemble"], ["---", "---:", "---"] + ["---:"] * 6]
    gains = [["start", "α", "head", "refit", "both", "alignment and both"], ["---"] + ["---:"] * 5]
    for start, alpha in dict.fromkeys((each.start, each.alpha) for each in cells):
        found = [each for each in cells if (each.start, each.alpha) == (start, alpha)]
        got = {name: [[each.merged[name][column] for each in found] for column in COLUMNS] for name in MERGES}
        rest = [[max(each.clients) for each in found], [each.ensemble for each in found]]
        for name, values in got.items():
            lines.append([start, str(alpha), name, *map(spread, (*values, *rest))])
        base, *steps = map(mean, (*got["FedAvg"], got["C2M3"][-1]))
        gains.append([start, str(alpha), *(f"{each - base:+.3f}" for each in steps)])
    if scale == Scale():
        for name, by_alpha in PUBLISHED.items():
            seen = [alpha for alpha in by_alpha if any(each.alpha == alpha for each in cells)]
            lines += [["shared", str(alpha), f"{name}, published", f"{by_alpha[alpha]:.3f}"] for alpha in seen]
    return "\n\n".join("\n".join(f"| {' | '.join(row)} |" for row in each) for each in (lines, gains)) + "\n"


def earlier(file: Path, scale: Scale) -> list[Cell]:
    """Cells of an earlier run, which must have been of the same scale."""
    if not file.exists():
        return []
    stored = json.loads(file.read_text())
    if stored["scale"] != asdict(scale):
        raise ConfigError(f"{file} is of scale {stored['scale']}, expected {asdict(scale)}: name another --output")
    return [Cell(**row) for row in stored["cells"]]


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure the cells that the file lacks, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for each in fields(Scale):
        parser.add_argument(f"--{each.name}", type=int, default=each.default)
    parser.add_argument("--alphas", type=float, nargs="+", default=[0.05, 0.1, 0.3])
    parser.add_argument("--starts", nargs="+", default=list(STARTS), choices=STARTS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, default=Path("results/one-shot-table.json"))
    options = parser.parse_args(arguments)
    scale = Scale(**{each.name: getattr(options, each.name) for each in fields(Scale)})
    device = usable_device(options.device)
    cells = earlier(options.output, scale)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    known = {(each.start, each.alpha, each.seed) for each in cells}
    for place in product(options.starts, options.alphas, options.seeds):
        if place not in known:
            cells.append(cell(scale, *place, device))
            about = {"scale": asdict(scale), "place": place_of(device), **surroundings()}
            record = {**about, "cells": [asdict(each) for each in cells]}
            options.output.write_text(json.dumps(record, indent=1) + "\n")
            print(cells[-1], flush=True)
    print(table(cells, scale))


if __name__ == "__main__":
    main()
