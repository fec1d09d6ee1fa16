"""Adapters on one base: averaged apart, as products, and as products with the rest added to the base.

python -m tests.benchmarks.adapters            writes c2m3_fl/merging/results/adapters.json: a minute on one core
python -m tests.benchmarks.adapters --table    prints the table of the page from it

Digits. A perceptron of 64-64-64-10 units learns the digits upright; five clients adapt it with adapters on all layers
to digits on their side, of two classes each or of all, and the server averages what they send, for five rounds.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch
from torch import Tensor, nn

from c2m3_fl.core.averaging import weighted_mean
from c2m3_fl.core.spec import Params
from c2m3_fl.merging.lora import adapter_pairs, average_adapters, residuals
from tests.benchmarks.records import read_record, write_record
from tests.flower.federation import digits, mlp, train

RECORD = Path("c2m3_fl/merging/results/adapters.json")
COMMAND = "python -m tests.benchmarks.adapters"
CLIENTS, ROUNDS, TRAINING = 5, 5, 1200
SHOWN = ("distance", "round 1", f"round {ROUNDS}")


def with_residual(nodes: Sequence[Params], weights: Sequence[float]) -> dict[str, Tensor]:
    """Adapters averaged as products, and the base to which the rest is added."""
    found = average_adapters(nodes, weights)
    rests = residuals(nodes, weights, found)
    return found | {base_of(down): nodes[0][base_of(down)] + rest for down, rest in rests.items()}


WAYS: dict[str, Callable[[Sequence[Params], Sequence[float]], Mapping[str, Tensor]]] = {
    "apart": weighted_mean,
    "exact": average_adapters,
    "residual": with_residual,
}


class Adapted(nn.Module):
    """A linear layer, frozen, and B A beside it; B is zero at the start."""

    def __init__(self, base: nn.Linear, rank: int) -> None:
        super().__init__()
        self.base = base.requires_grad_(requires_grad=False)
        self.lora_A = nn.Parameter(torch.randn(rank, base.in_features) / base.in_features**0.5)
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, rank))

    def forward(self, inputs: Tensor) -> Tensor:
        """The layer's output and the adapter's."""
        found: Tensor = self.base(inputs) + inputs @ self.lora_A.T @ self.lora_B.T
        return found


def adapters(model: nn.Module) -> dict[str, Tensor]:
    """The adapters of a model."""
    return exchanged(model, [name for name in model.state_dict() if "lora_" in name])


def exchanged(model: nn.Module, names: Sequence[str]) -> dict[str, Tensor]:
    """The tensors of these names, as they are now."""
    state = model.state_dict()
    return {name: state[name].detach().clone() for name in names}


def base_of(down: str) -> str:
    """The name of the weight to which an adapter is added."""
    return down.replace("lora_A", "base.weight")


def federate(seed: int, rank: int, way: str, *, skewed: bool) -> dict[str, Any]:
    """Accuracies after every round, and how far the first average lies from the mean of what the clients add."""
    data, labels = digits()
    aside = data.view(-1, 8, 8).transpose(1, 2).flatten(1)
    base = mlp(seed, 64)
    train(base, data[:TRAINING], labels[:TRAINING], epochs=10, seed=seed)
    torch.manual_seed(seed)
    model = nn.Sequential(*[Adapted(each, rank) if isinstance(each, nn.Linear) else each for each in base.children()])
    shares = [
        (labels[:TRAINING] // 2 == each).nonzero().flatten() if skewed else torch.arange(TRAINING)[each::CLIENTS]
        for each in range(CLIENTS)
    ]
    sent = [name for name in model.state_dict() if "lora_" in name or (way == "residual" and "base.weight" in name)]
    current, accuracies, error = exchanged(model, sent), [], 0.0
    for number in range(ROUNDS):
        replies = []
        for index, share in enumerate(shares):
            model.load_state_dict(current, strict=False)
            train(model, aside[share], labels[share], epochs=5, seed=100 * number + index, rate=0.01)
            replies.append(exchanged(model, sent))
        weights = [float(len(share)) for share in shares]
        current = dict(WAYS[way](replies, weights))
        error = error or distance(current, replies, weights)
        model.load_state_dict(current, strict=False)
        with torch.no_grad():
            found = (model(aside[TRAINING:]).argmax(1) == labels[TRAINING:]).float().mean()
        accuracies.append(round(float(found), 4))
    return {"seed": seed, "rank": rank, "skewed": skewed, "way": way, "accuracy": accuracies, "error": round(error, 4)}


def distance(found: Params, replies: Sequence[Params], weights: Sequence[float]) -> float:
    """Relative distance of what the base gains from the weighted mean of the clients' products, over all layers."""
    missed, whole = 0.0, 0.0
    for down, up in adapter_pairs(found):
        mean = sum(
            (weight / sum(weights) * each[up] @ each[down] for weight, each in zip(weights, replies, strict=True)),
            torch.zeros(()),
        )
        added = found[up] @ found[down]
        if base_of(down) in found:
            added = added + found[base_of(down)] - replies[0][base_of(down)]
        missed += float((added - mean).square().sum())
        whole += float(mean.square().sum())
    return math.sqrt(missed / whole)


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The page's table."""
    lines = [
        "| clients | rank | " + " | ".join(f"{what}, apart | exact | residual" for what in SHOWN) + " |",
        "| --- | ---: |" + " ---: |" * 9,
    ]
    for skewed in (False, True):
        for rank in sorted({row["rank"] for row in rows}):
            of = {
                way: [row for row in rows if (row["skewed"], row["rank"], row["way"]) == (skewed, rank, way)]
                for way in WAYS
            }
            cells = [f"{fmean(row['error'] for row in of[way]):.2f}" for way in WAYS]
            for number in (0, ROUNDS - 1):
                for way in WAYS:
                    values = [100 * row["accuracy"][number] for row in of[way]]
                    cells.append(f"{fmean(values):.1f} ± {stdev(values):.1f}")
            name = "two classes each" if skewed else "all classes"
            lines.append(f"| {name} | {rank} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", action="store_true", help="print the table of the record")
    parser.add_argument("--seeds", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if not options.table:
        rows = [
            federate(seed, rank, way, skewed=skewed)
            for skewed in (False, True)
            for rank in (4,)
            for way in WAYS
            for seed in range(options.seeds)
        ]
        command = f"{COMMAND} --seeds {options.seeds}"
        write_record(RECORD, command, {"clients": CLIENTS, "rounds": ROUNDS}, rows)
    print(table(read_record(RECORD)["rows"]))


if __name__ == "__main__":
    main()
