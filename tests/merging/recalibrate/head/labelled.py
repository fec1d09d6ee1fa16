"""Labelled digits, spread over clients in several ways, and a network that gives scores of their classes."""

from __future__ import annotations

from functools import cache

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from c2m3_fl.merging.recalibrate.head.fit import measure_labels
from c2m3_fl.merging.recalibrate.head.label_sums import LabelSums
from c2m3_fl.network.calibration import Batch
from c2m3_fl.network.program import Program, export_batches

CLIENTS = 5
PARTITIONS = ("iid", "dirichlet", "two classes")


@cache
def digits(count: int = 1300) -> tuple[Tensor, Tensor]:
    data, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(data))[:count]
    return torch.tensor(data[order] / 16, dtype=torch.float32), torch.tensor(labels[order])


def partition(kind: str, labels: Tensor, seed: int = 0) -> list[Tensor]:
    """Rows of every client."""
    generator, known = np.random.default_rng(seed), labels.numpy()
    if kind == "iid":
        parts = np.array_split(generator.permutation(len(known)), CLIENTS)
    elif kind == "two classes":
        shards = np.array_split(np.argsort(known, kind="stable"), 2 * CLIENTS)
        drawn = generator.permutation(2 * CLIENTS)
        parts = [np.concatenate([shards[one], shards[other]]) for one, other in drawn.reshape(-1, 2)]
    else:
        found: list[list[int]] = [[] for _ in range(CLIENTS)]
        for label in range(10):
            shares = np.cumsum(generator.dirichlet([0.1] * CLIENTS))
            rows = generator.permutation(np.flatnonzero(known == label))
            for client, part in enumerate(np.split(rows, (shares * len(rows)).astype(int)[:-1])):
                found[client].extend(part)
        parts = [np.array(rows, dtype=int) for rows in found]
    return [torch.as_tensor(part) for part in parts if len(part) >= 32]


def network(bias: bool = True, seed: int = 0) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10, bias=bias))


@cache
def program(bias: bool = True) -> Program:
    return export_batches(network(bias), [Batch((digits()[0][:2],))])[0]


def sums(rows: Tensor, bias: bool = True, labels: Tensor | None = None, scale: float = 1.0) -> LabelSums:
    """One client's sums; exported for any number of rows by batches of two."""
    data, known = digits()
    model, known = network(bias), known if labels is None else labels
    params = {name: value.clone() for name, value in model.state_dict().items()}
    params["0.weight"] *= scale
    params["0.bias"] *= scale
    batch = Batch((data[rows],), known[rows])
    return measure_labels(export_batches(model, [batch]), params, [batch], 5)


def features(rows: Tensor) -> Tensor:
    """Inputs of the last layer, of float64, as the network computes them."""
    with torch.no_grad():
        hidden: Tensor = network()[:2](digits()[0][rows]).double()
    return hidden
