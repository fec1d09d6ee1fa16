"""Merges of transformers with permutations and with rotations: digits as sequences of rows, from seeds of their own.

    python -m tests.benchmarks.rotations [--width 32] [--depth 2] [--draws 3] [--nodes 2 3]

trains networks, merges draws of 2, 3, … of them, prints a markdown table, accuracy in percent (mean ± standard
deviation over draws), and adds the rows to ``c2m3_fl/merging/results/rotations.json``; ``--redraw`` prints that file's
tables. The recipe is that of `tests.benchmarks.sequences`. A merge is given the inputs of 200 training digits and no
label.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch

from c2m3_fl import merging
from c2m3_fl.merging import ActivationMatching, CycleConsistent, Mean, Method, merge
from c2m3_fl.symmetry.discover import permutation_spec
from tests.benchmarks.records import read_record, write_record
from tests.benchmarks.sequences import CALIBRATION, Digits, Transformer, accuracy, probabilities, trained

RESULTS = Path(merging.__file__).parent / "results" / "rotations.json"
COMMAND = "python -m tests.benchmarks.rotations"
METHODS: dict[str, tuple[bool, Method]] = {  # whether groups rotate, and how nodes are aligned
    "plain mean": (False, Mean()),
    "C2M3, permutations": (False, CycleConsistent()),
    "activations, permutations": (False, ActivationMatching(universe=True)),
    "C2M3, rotations": (True, CycleConsistent()),
    "C2M3, rotations, from the identity": (True, CycleConsistent(start="identity")),
    "C2M3, rotations, from activations": (True, CycleConsistent(start="activations")),
}
RECALIBRATIONS = {"": "none", " + REPAIR": "repair", " + refit": "refit"}


@dataclass(frozen=True)
class Row:
    """One measurement."""

    network: str
    nodes: int
    draw: int
    method: str
    recalibration: str
    accuracy: float


def rows(width: int, depth: int, nodes: int, draw: int, data: Digits) -> Iterator[Row]:
    """Endpoints and every merge of one draw of networks."""
    build = partial(Transformer, width, 2, depth)
    name, model = f"width {width}, {depth} blocks", build().eval()
    found = [trained(build, data, nodes * draw + index) for index in range(nodes)]
    ends = statistics.mean(accuracy(probabilities(model, node, data), data) for node in found)
    yield Row(name, nodes, draw, "mean endpoint", "none", ends)
    specs = {turning: permutation_spec(model, data.calibration[0][:4], rotations=turning) for turning in (False, True)}
    for method, (turning, how) in METHODS.items():
        for recalibrate in RECALIBRATIONS.values():
            done = merge(
                model, found, spec=specs[turning], calibration=data.calibration, method=how, recalibrate=recalibrate
            )
            score = accuracy(probabilities(model, done.state_dict, data), data)
            yield Row(name, nodes, draw, method, recalibrate, score)


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
            spread = f" ± {statistics.stdev(scores):.1f}" if len(scores) > 1 else ""
            cells.append(f"{statistics.mean(scores):.1f}{spread}" if scores else "")
        lines.append(f"| {method} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="Table of merged transformers.")
    parser.add_argument("--width", type=int, default=32)
    parser.add_argument("--depth", type=int, default=2)
    parser.add_argument("--draws", type=int, default=3)
    parser.add_argument("--nodes", type=int, nargs="+", default=[2, 3])
    parser.add_argument("--redraw", action="store_true", help="print the tables of the record and measure nothing")
    arguments = parser.parse_args()
    kept = [Row(**row) for row in read_record(RESULTS)["rows"]] if RESULTS.exists() else []
    if not arguments.redraw:
        torch.set_num_threads(1)
        data = Digits.load()
        for nodes in arguments.nodes:
            for draw in range(arguments.draws):
                new = list(rows(arguments.width, arguments.depth, nodes, draw, data))
                places = {(row.network, row.nodes, row.draw) for row in new}
                kept = [row for row in kept if (row.network, row.nodes, row.draw) not in places] + new
                configuration = {
                    "seeds": "nodes * draw + 0, 1, …",
                    "data": "scikit-learn digits as sequences of rows, 500 held out for the test",
                    "calibration": CALIBRATION,
                    "threads": torch.get_num_threads(),
                }
                write_record(RESULTS, COMMAND, configuration, [asdict(row) for row in kept])
    for network in dict.fromkeys(row.network for row in kept):
        print(f"\n{network}\n\n{table([row for row in kept if row.network == network])}")


if __name__ == "__main__":
    main()
