"""Merges of transformers with permutations and with rotations: digits as sequences of rows, from seeds of their own.

    python -m tests.benchmarks.rotations [--width 32] [--depth 2] [--draws 0 1 2] [--nodes 2 3] [--device cuda]

trains networks, merges draws of 2, 3, … of them, prints a markdown table, accuracy in percent (mean ± standard
deviation over draws), and adds the rows to ``c2m3_fl/merging/results/rotations.json`` (``--output``); rows that are
there are not measured again. ``--collect FILE ...`` adds the rows of other files, ``--redraw`` prints the tables. The
recipe is that of `tests.benchmarks.sequences`. A merge is given the inputs of 200 training digits and no label.
"""

from __future__ import annotations

import argparse
import statistics
import traceback
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial
from itertools import chain
from pathlib import Path

import torch

from c2m3_fl import merging
from simulations.verdict import spread
from tests.benchmarks.records import read_record, write_record
from tests.benchmarks.rotations_draw import METHODS, RECALIBRATIONS, Merger
from tests.benchmarks.sequences import CALIBRATION, Digits, Transformer, accuracy, probabilities, trained

RESULTS = Path(merging.__file__).parent / "results" / "rotations.json"
COMMAND = "python -m tests.benchmarks.rotations"
ENDS = "mean endpoint"


@dataclass(frozen=True)
class Row:
    """One measurement."""

    network: str
    nodes: int
    draw: int
    method: str
    recalibration: str
    accuracy: float
    device: str = "cpu"

    @property
    def place(self) -> tuple[str, int, int, str, str]:
        """What was measured."""
        return self.network, self.nodes, self.draw, self.method, self.recalibration


def rows(width: int, depth: int, nodes: int, draw: int, data: Digits, place: torch.device) -> Iterator[Row]:
    """Endpoints and every merge of one draw of networks; where a method fails on the device, it is tried on the CPU."""
    build = partial(Transformer, width, 2, depth)
    name, model = named(width, depth), build().eval()
    found = [trained(build, data, nodes * draw + index) for index in range(nodes)]
    ends = statistics.mean(accuracy(probabilities(model, node, data), data) for node in found)
    yield Row(name, nodes, draw, ENDS, "none", ends, place.type)
    mergers: dict[torch.device, Merger] = {}
    for method in METHODS:
        for where in dict.fromkeys([place, torch.device("cpu")]):
            try:
                merger = mergers.setdefault(where, Merger(model, data.calibration, where))
                merged = dict(merger.averages(merger.aligned(found, method)))
            except Exception:  # one method that fails must not end a long run
                print(
                    f"{name}, {nodes} networks, draw {draw}, {method}, on {where}:\n{traceback.format_exc()}",
                    flush=True,
                )
                continue
            for how, params in merged.items():
                score = accuracy(probabilities(model, params, data), data)
                yield Row(name, nodes, draw, method, how, score, where.type)
            break


def named(width: int, depth: int) -> str:
    """What tables call a network."""
    return f"width {width}, {depth} blocks"


def table(found: list[Row]) -> str:
    """Markdown: one line per method, one column per number of nodes and recalibration."""
    counts = sorted({row.nodes for row in found})
    columns = [(count, suffix, how) for count in counts for suffix, how in RECALIBRATIONS.items()]
    titles = [suffix.strip() or f"{count} networks" for count, suffix, _ in columns]
    lines = [f"| | {' | '.join(titles)} |", f"| --- |{' ---: |' * len(columns)}"]
    for method in dict.fromkeys(row.method for row in found):
        cells = []
        for count, _, how in columns:
            place = (count, method, how)
            scores = [100 * row.accuracy for row in found if (row.nodes, row.method, row.recalibration) == place]
            cells.append(spread(scores, 1))
        lines.append(f"| {method} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="Table of merged transformers.")
    parser.add_argument("--width", type=int, default=32)
    parser.add_argument("--depth", type=int, default=2)
    parser.add_argument("--draws", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--nodes", type=int, nargs="+", default=[2, 3])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--collect", type=Path, nargs="+", default=[], help="files whose rows are added")
    parser.add_argument("--redraw", action="store_true", help="print the tables of the record and measure nothing")
    arguments = parser.parse_args()
    kept = load(arguments.output)
    if arguments.collect:
        kept = list({row.place: row for row in (*kept, *chain.from_iterable(map(load, arguments.collect)))}.values())
        _save(arguments.output, kept)
    elif not arguments.redraw:
        torch.set_num_threads(1)
        kept = _measured(arguments, kept)
    for network in dict.fromkeys(row.network for row in kept):
        print(f"\n{network}\n\n{table([row for row in kept if row.network == network])}")


def load(file: Path) -> list[Row]:
    """Rows of a record; none if there is no file."""
    return [Row(**row) for row in read_record(file)["rows"]] if file.exists() else []


def _measured(arguments: argparse.Namespace, kept: list[Row]) -> list[Row]:
    """The rows of a file, and those that it lacks."""
    place = torch.device(arguments.device)
    data, name = Digits.load().to(place), named(arguments.width, arguments.depth)
    for draw in arguments.draws:
        for nodes in arguments.nodes:
            if any((row.network, row.nodes, row.draw) == (name, nodes, draw) for row in kept):
                continue
            for row in rows(arguments.width, arguments.depth, nodes, draw, data, place):
                kept.append(row)
                print(row, flush=True)
            _save(arguments.output, kept)
    return kept


def _save(file: Path, kept: list[Row]) -> None:
    configuration = {
        "seeds": "nodes * draw + 0, 1, …",
        "data": "scikit-learn digits as sequences of rows, 500 held out for the test",
        "calibration": CALIBRATION,
        "threads": torch.get_num_threads(),
    }
    write_record(file, COMMAND, configuration, [asdict(row) for row in kept])


if __name__ == "__main__":
    main()
