"""Results of a comparison: plain records, written as JSON and read back."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from simulations.settings import Value

PROGRESS = "progress.jsonl"  # a server app's output: one line per finished round
RESULTS = "results.json"  # all rounds at the end, with the strategies' own metrics


@dataclass(frozen=True)
class Round:
    """One round of one strategy, every model evaluated on the same test images.

    Attributes
    ----------
    strategy : str
        Its name among `simulations.settings.TITLES`.
    seed : int
        Seed of the run.
    round : int
        From 1.
    accuracy, loss : float
        Of the global model after aggregation.
    clients : tuple of float
        Accuracy of each client's reply.
    ensemble : float
        Accuracy of the clients' mean probabilities.
    seconds : float
        Wall-clock time of the round, its evaluation included.
    metrics : mapping
        The strategy's own metrics.
    """

    strategy: str
    seed: int
    round: int
    accuracy: float
    loss: float
    clients: tuple[float, ...]
    ensemble: float
    seconds: float
    metrics: Mapping[str, float] = field(default_factory=dict)

    @property
    def mean_client(self) -> float:
        """Mean accuracy of the clients."""
        return sum(self.clients) / len(self.clients)

    @property
    def best_client(self) -> float:
        """Accuracy of the best client."""
        return max(self.clients)


@dataclass(frozen=True)
class Comparison:
    """All rounds of all strategies and seeds, and their settings."""

    settings: Mapping[str, Value]
    rounds: tuple[Round, ...]

    @property
    def strategies(self) -> tuple[str, ...]:
        """Names of the strategies, in the order in which they ran."""
        return tuple(dict.fromkeys(each.strategy for each in self.rounds))

    @property
    def seeds(self) -> tuple[int, ...]:
        """Seeds, in the order in which they ran."""
        return tuple(dict.fromkeys(each.seed for each in self.rounds))

    @property
    def last_round(self) -> int:
        """Number of rounds."""
        return max(each.round for each in self.rounds)

    def at(self, strategy: str, number: int) -> tuple[Round, ...]:
        """Round `number` of `strategy`, one per seed."""
        return tuple(each for each in self.rounds if each.strategy == strategy and each.round == number)


def save(comparison: Comparison, file: Path) -> None:
    """Write as JSON, with the mean and the best client beside the clients' accuracies."""
    rows = [
        {**asdict(each), "mean_client": each.mean_client, "best_client": each.best_client} for each in comparison.rounds
    ]
    file.write_text(json.dumps({"settings": dict(comparison.settings), "rounds": rows}, indent=2) + "\n")


def load(file: Path) -> Comparison:
    """Read what `save` wrote."""
    stored = json.loads(file.read_text())
    return Comparison(stored["settings"], tuple(_round(row) for row in stored["rounds"]))


def append(rounds: Sequence[Round], file: Path) -> None:
    """Add rounds to a file of one JSON record per line."""
    with file.open("a") as lines:
        lines.writelines(json.dumps(asdict(each)) + "\n" for each in rounds)


def read_lines(file: Path) -> tuple[Round, ...]:
    """Rounds that `append` has written completely; none if there is no file."""
    if not file.exists():
        return ()
    lines = file.read_text().splitlines(keepends=True)
    return tuple(_round(json.loads(line)) for line in lines if line.endswith("\n"))


def _round(row: Mapping[str, object]) -> Round:
    known = {name: value for name, value in row.items() if name in Round.__dataclass_fields__}
    return Round(**{**known, "clients": tuple(known["clients"])})  # type: ignore[arg-type]  # from JSON
