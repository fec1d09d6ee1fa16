"""Merges of a ViT on CIFAR-10 and of a GPT on Shakespeare, with permutations and with rotations.

    python -m tests.benchmarks.rotations_real vit [--draws 0 1 2] [--nodes 2 3 5] [--device cuda] [--output FILE]

trains networks from seeds of their own, merges draws of 2, 3, … of them, and prints a markdown table after every draw:
what the merge loses to the mean network in loss (the loss barrier at the centre, and for pairs the largest one on the
straight line), accuracy and perplexity. Rows are written after every method, and those that a file has are not measured
again. A merge is given 500 images or 250 windows of the training split and no label. ``--collect FILE ...`` puts rows
of several files into the record ``c2m3_fl/merging/results/rotations_real.json``; ``--redraw`` prints its tables, and
``--picture FILE`` draws it.
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from c2m3_fl import merging
from simulations.sources import ENVIRONMENT
from simulations.verdict import spread
from tests.benchmarks.real_transformers import RECIPES, Characters, Images, Task
from tests.benchmarks.records import read_record, write_record
from tests.benchmarks.rotations_draw import METHODS, RECALIBRATIONS, Merger
from tests.benchmarks.rotations_picture import above_ends, picture

RESULTS = Path(merging.__file__).parent / "results" / "rotations_real.json"
COMMAND = "python -m tests.benchmarks.rotations_real"
ENDS = "mean network"
POINTS = 11  # of the straight line between two networks, ends included


@dataclass(frozen=True)
class Row:
    """One measurement.

    Attributes
    ----------
    line : tuple of float
        Losses at equidistant points between two aligned networks, ends included; empty for other merges.
    """

    network: str
    nodes: int
    draw: int
    method: str
    recalibration: str
    loss: float
    accuracy: float
    line: tuple[float, ...]
    seconds: float
    device: str


def rows(
    task: Task, draw: int, method: str, found: Sequence[dict[str, Tensor]], place: str, merger: Callable[[str], Merger]
) -> list[Row]:
    """Every merge of some networks by one method, or the endpoints."""
    nodes = len(found)
    if method == ENDS:
        scores = [task.score(node) for node in found]
        loss, accuracy = (statistics.mean(getattr(each, name) for each in scores) for name in ("loss", "accuracy"))
        return [Row(task.title, nodes, draw, ENDS, "none", loss, accuracy, (), 0.0, place)]
    made, begin = [], time.perf_counter()
    aligned = merger(place).aligned(found, method)
    for name, merged in merger(place).averages(aligned):
        seconds, score = round(time.perf_counter() - begin, 2), task.score(merged)
        line = tuple(_losses(task, *aligned)) if nodes == 2 and name == "none" else ()
        made.append(Row(task.title, nodes, draw, method, name, score.loss, score.accuracy, line, seconds, place))
        begin = time.perf_counter()
    return made


def _losses(task: Task, first: dict[str, Tensor], second: dict[str, Tensor]) -> Iterator[float]:
    """Losses on the straight line between two networks."""
    for point in range(POINTS):
        between = {name: torch.lerp(first[name], second[name], point / (POINTS - 1)) for name in first}
        yield task.score(between).loss


def table(found: Sequence[Row], of: str) -> str:
    """Markdown: one line per method, one column per number of nodes and recalibration.

    An entry is a mean and standard deviation over draws, with the number of draws where it is less than elsewhere.

    Parameters
    ----------
    found : sequence of Row
        Rows of one network.
    of : {"barrier", "line", "accuracy", "perplexity"}
        The loss above that of the mean network, the highest one on the line between two, accuracy in percent, or the
        exponential of the loss.
    """
    ends = {(row.nodes, row.draw): row for row in found if row.method == ENDS}
    draws = len({row.draw for row in found})

    def value(row: Row) -> float:
        if of == "accuracy":
            return 100 * row.accuracy
        if of == "perplexity":
            return math.exp(row.loss)
        if of == "line":
            return max(above_ends(row.line))
        return row.loss - ends[row.nodes, row.draw].loss

    digits = 2 if of in ("barrier", "line") else 1
    found = [row for row in found if row.line] if of == "line" else found
    columns = [
        (count, suffix.strip() or f"{count} networks", how)
        for count in sorted({row.nodes for row in found})
        for suffix, how in RECALIBRATIONS.items()
        if any((row.nodes, row.recalibration) == (count, how) for row in found)
    ]
    lines = [f"| | {' | '.join(title for _, title, _ in columns)} |", f"| --- |{' ---: |' * len(columns)}"]
    for method in (ENDS, *METHODS):
        cells = []
        for count, _, how in columns:
            place = (count, method, how)
            scores = [value(row) for row in found if (row.nodes, row.method, row.recalibration) == place]
            fewer = f" ({len(scores)})" if len(scores) < draws else ""
            cells.append(f"{spread(scores, digits)}{fewer}" if scores else "")
        if any(cells) and (method != ENDS or of in ("accuracy", "perplexity")):
            lines.append(f"| {method} | {' | '.join(cells)} |")
    return "\n".join(lines)


def tables(found: Sequence[Row]) -> str:
    """All tables of all networks; perplexity is that of text."""
    parts = []
    for network in dict.fromkeys(row.network for row in found):
        own = [row for row in found if row.network == network]
        shown = ("barrier", "line", "accuracy", *(["perplexity"] if network.startswith("GPT") else []))
        parts += [f"{network}: {of}\n\n{table(own, of)}" for of in shown]
    return "\n\n".join(parts)


def load(file: Path) -> list[Row]:
    """Rows of a record; none if there is no file."""
    if not file.exists():
        return []
    return [Row(**{**row, "line": tuple(row["line"])}) for row in read_record(file)["rows"]]


def _save(file: Path, found: Sequence[Row]) -> None:
    configuration = {
        "recipes": {name: asdict(recipe) for name, recipe in RECIPES.items()},
        "seeds": "5 * draw + 0, 1, …",
        "calibration": "500 images, 250 windows",
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
    }
    write_record(file, COMMAND, configuration, [asdict(row) for row in found])


def measure(task: Task, arguments: argparse.Namespace, file: Path) -> None:
    """Measure what a file lacks; where a method fails on the device, it is tried on the CPU."""
    kept = load(file)

    @cache
    def merger(place: str) -> Merger:
        return Merger(task.build(), task.calibration, torch.device(place))

    for draw in arguments.draws:
        found = []
        for node in range(max(arguments.nodes)):
            begin = time.perf_counter()
            found.append(task.trained(5 * draw + node, arguments.cache))
            score = task.score(found[-1])
            print(f"network {5 * draw + node}: {score} ({time.perf_counter() - begin:.1f} s)", flush=True)
        for nodes in arguments.nodes:
            for method in (ENDS, *METHODS):
                if any(
                    (row.network, row.nodes, row.draw, row.method) == (task.title, nodes, draw, method) for row in kept
                ):
                    continue
                for place in dict.fromkeys([arguments.device, "cpu"]):
                    try:
                        new = rows(task, draw, method, found[:nodes], place, merger)
                    except Exception:
                        print(
                            f"{nodes} networks, draw {draw}, {method}, on {place}:\n{traceback.format_exc()}",
                            flush=True,
                        )
                        continue
                    kept += new
                    _save(file, kept)
                    for row in new:
                        print(replace(row, line=()), flush=True)
                    break
        print(tables([row for row in kept if row.network == task.title]), flush=True)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="Merged transformers on images and text.")
    parser.add_argument("task", nargs="?", choices=sorted(RECIPES))
    parser.add_argument("--draws", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--nodes", type=int, nargs="+", default=[2, 3, 5])
    parser.add_argument("--steps", type=int, help="steps of training; by default those of the recipe")
    parser.add_argument("--size", type=int, default=0, help="images of either split; 0 takes all")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--cache", type=Path, default=Path("rotations-cache"), help="folder of trained networks")
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--collect", type=Path, nargs="+", default=[], help="files whose rows go into the record")
    parser.add_argument("--redraw", action="store_true", help="print the tables of the record and measure nothing")
    parser.add_argument("--picture", type=Path, help="draw the record into this file")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.collect:
        _collect(arguments.collect, arguments.output)
    if arguments.picture:
        picture(read_record(arguments.output)["rows"], ENDS, arguments.picture)
    if arguments.redraw or arguments.collect or arguments.picture or arguments.task is None:
        print(tables(load(arguments.output)))
        return
    measure(_task(arguments), arguments, arguments.output)


def _task(arguments: argparse.Namespace) -> Task:
    recipe = RECIPES[arguments.task]
    recipe = recipe if arguments.steps is None else replace(recipe, steps=arguments.steps)
    device = torch.device(arguments.device)
    if arguments.task == "vit":
        return Images(device, recipe, arguments.cache, arguments.size)
    return Characters(device, recipe, Path(os.environ[ENVIRONMENT]))


def _collect(files: Sequence[Path], output: Path) -> None:
    """Put the rows of several files into one; all were measured with the same recipes, versions and machine."""
    first, *others = [read_record(file) for file in files]
    for file, other in zip(files[1:], others, strict=True):
        for name in ("configuration", "versions", "machine"):
            if other[name] != first[name]:
                raise SystemExit(f"{file} has {name} {other[name]}, {files[0]} has {first[name]}")
    found = {
        (row.network, row.nodes, row.draw, row.method, row.recalibration): row for file in files for row in load(file)
    }
    where = {name: first[name] for name in ("date", "versions", "machine")}
    write_record(output, COMMAND, first["configuration"], [asdict(found[key]) for key in sorted(found)], **where)


if __name__ == "__main__":
    main()
