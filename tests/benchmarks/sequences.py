"""Merges of trained sequence networks: a transformer and an LSTM that read a digit row by row.

    python -m tests.benchmarks.sequences [NETWORK ...] [--pairs 3]

trains pairs of networks from different seeds, prints a markdown table, accuracy in percent (mean ± standard
deviation over pairs), and writes ``c2m3_fl/merging/results/sequences.json``;
``--redraw`` prints that file's table.
A merge is given the inputs of 200 training digits and no label. The training recipe was chosen on pair 50, which is
not in the table.
"""

from __future__ import annotations

import argparse
import copy
import statistics
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from c2m3_fl import merging
from c2m3_fl.merging import ActivationMatching, CycleConsistent, Mean, Method, merge
from c2m3_fl.symmetry.discover import permutation_spec
from tests.benchmarks.records import read_record, write_record

RESULTS = Path(merging.__file__).parent / "results" / "sequences.json"
COMMAND = "python -m tests.benchmarks.sequences"
CALIBRATION = 200  # unlabelled training inputs that recalibrations see
CLASSES, LENGTH, FEATURES = 10, 8, 8


class Transformer(nn.Module):
    """Pre-norm transformer encoder with learned positions; the mean over positions is classified."""

    def __init__(self, width: int = 32, heads: int = 2, depth: int = 2) -> None:
        super().__init__()
        self.embedding = nn.Linear(FEATURES, width)
        self.positions = nn.Parameter(0.1 * torch.randn(LENGTH, width))
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(width, heads, 2 * width, dropout=0.0, batch_first=True, norm_first=True)
            for _ in range(depth)
        )
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, CLASSES)

    def forward(self, rows: Tensor) -> Tensor:
        """Logits of sequences of shape (batch, length, features)."""
        stream = self.embedding(rows) + self.positions
        for block in self.blocks:
            stream = block(stream)
        return torch.as_tensor(self.head(self.norm(stream).mean(1)))


class Lstm(nn.Module):
    """LSTM whose last step is classified."""

    def __init__(self, hidden: int = 64) -> None:
        super().__init__()
        self.lstm = nn.LSTM(FEATURES, hidden, batch_first=True)
        self.head = nn.Linear(hidden, CLASSES)

    def forward(self, rows: Tensor) -> Tensor:
        """Logits of sequences of shape (batch, length, features)."""
        steps, _ = self.lstm(rows)
        return torch.as_tensor(self.head(steps[:, -1]))


NETWORKS: dict[str, Callable[[], nn.Module]] = {"transformer": Transformer, "LSTM": Lstm}
ALIGNMENTS: dict[str, Method] = {
    "plain mean": Mean(),
    "C2M3": CycleConsistent(),
    "C2M3 from the barycentre": CycleConsistent(start="barycentre"),
    "activation matching": ActivationMatching(),
}
RECALIBRATIONS = {"": "none", " + REPAIR": "repair", " + refit": "refit"}


@dataclass(frozen=True)
class Row:
    """One measurement."""

    network: str
    pair: int
    column: str
    accuracy: float


@dataclass(frozen=True, eq=False)
class Digits:
    """Digits as sequences of their rows, standardised: what networks train on, and what they are tested on."""

    train: Tensor
    train_labels: Tensor
    test: Tensor
    test_labels: Tensor

    @classmethod
    def load(cls, held_out: int = 500) -> Digits:
        """Read scikit-learn's digits; the split is the same for everyone."""
        found = load_digits()
        inputs = torch.tensor(found.data, dtype=torch.float32).reshape(-1, LENGTH, FEATURES)
        labels = torch.tensor(found.target)
        order = torch.randperm(len(inputs), generator=torch.Generator().manual_seed(0))
        test, train = order[:held_out], order[held_out:]
        inputs = (inputs - inputs[train].mean()) / inputs[train].std()
        return cls(inputs[train], labels[train], inputs[test], labels[test])

    def to(self, device: torch.device) -> Digits:
        """The same data elsewhere; networks are trained and evaluated where they are."""
        return Digits(*(getattr(self, each.name).to(device) for each in fields(self)))

    @property
    def calibration(self) -> list[Tensor]:
        """Batches of unlabelled training inputs."""
        return list(self.train[:CALIBRATION].split(50))


def trained(build: Callable[[], nn.Module], data: Digits, seed: int, epochs: int = 20) -> dict[str, Tensor]:
    """Train a network on all of the data; the seed decides initialisation and batches."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = build().train().to(data.train.device)
    generator = torch.Generator().manual_seed(seed)
    optimiser = torch.optim.AdamW(model.parameters(), weight_decay=0.3)
    steps = epochs * (len(data.train) // 64 + 1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 5e-3, total_steps=steps)
    for _ in range(epochs):
        for batch in torch.randperm(len(data.train), generator=generator).split(64):
            optimiser.zero_grad()
            loss = nn.functional.cross_entropy(model(data.train[batch]), data.train_labels[batch])
            loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
            optimiser.step()
            schedule.step()
    return dict(model.state_dict())


def probabilities(model: nn.Module, params: Mapping[str, Tensor], data: Digits) -> Tensor:
    """Class probabilities on the test inputs."""
    student = copy.deepcopy(model).eval().to(data.test.device)
    student.load_state_dict(params)
    with torch.inference_mode():
        return torch.as_tensor(student(data.test).softmax(1))


def accuracy(votes: Tensor, data: Digits) -> float:
    """Share of test inputs classified correctly."""
    return float((votes.argmax(1) == data.test_labels).double().mean())


def rows(network: str, pair: int, data: Digits) -> Iterator[Row]:
    """Endpoints, their ensemble, and every merge of one pair."""
    build = NETWORKS[network]
    model = build().eval()
    nodes = [trained(build, data, 2 * pair + index) for index in range(2)]
    votes = [probabilities(model, node, data) for node in nodes]
    yield Row(network, pair, "mean endpoint", statistics.mean(accuracy(vote, data) for vote in votes))
    yield Row(network, pair, "ensemble", accuracy(torch.stack(votes).mean(0), data))
    spec = permutation_spec(model, data.calibration[0][:4])
    for name, method in ALIGNMENTS.items():
        if network == "LSTM" and isinstance(method, ActivationMatching):
            continue  # no operator of the traced graph shows an LSTM's hidden units
        for suffix, recalibrate in RECALIBRATIONS.items():
            done = merge(model, nodes, spec=spec, calibration=data.calibration, method=method, recalibrate=recalibrate)
            yield Row(network, pair, name + suffix, accuracy(probabilities(model, done.state_dict, data), data))


def table(found: list[Row]) -> str:
    """Markdown: one line per column, one column per network, mean ± standard deviation over pairs."""
    networks = list(dict.fromkeys(row.network for row in found))
    lines = [f"| | {' | '.join(networks)} |", f"| --- |{' ---: |' * len(networks)}"]
    for column in dict.fromkeys(row.column for row in found):
        cells = []
        for network in networks:
            scores = [100 * row.accuracy for row in found if (row.network, row.column) == (network, column)]
            spread = statistics.stdev(scores) if len(scores) > 1 else 0.0
            cells.append(f"{statistics.mean(scores):.1f} ± {spread:.1f}" if scores else "–")
        lines.append(f"| {column} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="Table of merged sequence networks.")
    parser.add_argument("networks", nargs="*", help=f"of {', '.join(NETWORKS)}")
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--redraw", action="store_true", help="print the table of the record and measure nothing")
    arguments = parser.parse_args()
    if arguments.redraw:
        print(table([Row(**row) for row in read_record(RESULTS)["rows"]]))
        return
    data = Digits.load()
    chosen = arguments.networks or list(NETWORKS)
    found = [row for network in chosen for pair in range(arguments.pairs) for row in rows(network, pair, data)]
    configuration = {
        "networks": chosen,
        "pairs": arguments.pairs,
        "seeds": "2 * pair and 2 * pair + 1",
        "data": "scikit-learn digits as sequences of rows, 500 held out for the test",
        "calibration": CALIBRATION,
        "threads": torch.get_num_threads(),
    }
    write_record(RESULTS, COMMAND, configuration, [asdict(row) for row in found])
    print(table(found))


if __name__ == "__main__":
    main()
