"""One-shot merges of clients of different widths: two clients of every width, each from its own initialisation.

    python -m tests.benchmarks.widths [--cases NAME ...] [--partitions NAME ...] [--seeds 0 1 2] [--device cuda]

trains the clients, prints a markdown table, accuracy in percent (mean ± standard deviation over seeds), and writes
``c2m3_fl/merging/results/widths.json`` (``--output FILE``) after every cell: a case, a partition and a seed. Cells that
are in the file are not measured again, and clients are kept in a cache, so that a run that was cut short goes on. A
cell that fails is printed, and the others go on. ``--collect FILE ...`` adds the rows of such files to the record;
``--redraw`` prints the record's table, ``--picture FILE`` draws it.

A merge is given the inputs of 300 training images (1,000 of CIFAR-10) that no client has, and no label; a refit from
clients, of digits and MNIST, sums over the clients' own images instead (`ClientRefit()`). That missing units count as
zeros on axes that read units was chosen on seeds 10, 11 and 12 of digits (``--cases digits --seeds 10 11 12
--trial``), which are not in the table. ``--units FILE`` draws where the units of the first hidden layer of seed 0
(digits, IID) are in the merged network.
"""

from __future__ import annotations

import argparse
import statistics
import time
from dataclasses import asdict, replace
from functools import partial
from itertools import product
from pathlib import Path
from unittest.mock import patch

import torch

from c2m3_fl import merging
from c2m3_fl.merging import CycleConsistent, Mean, Refit, Repair, merge_widths
from c2m3_fl.merging.recalibrate.setting import usable_device
from c2m3_fl.merging.recalibrate.short_names import Recalibration
from tests.benchmarks.cells import Cells, Layout, add_options, run
from tests.benchmarks.widths_cases import CASES, CLIENTS, PARTITIONS, SCALES, WIDTHS, Trained
from tests.benchmarks.widths_clients import refit_from_clients
from tests.benchmarks.widths_table import Cell, Row, draw, draw_units, table

RESULTS = Path(merging.__file__).parent / "results" / "widths.json"
COMMAND = "python -m tests.benchmarks.widths"
REFIT = Refit(scores=True)
RECALIBRATIONS: dict[str, Recalibration | None] = {"": None, " + REPAIR": Repair(), " + refit": REFIT}


def rows(cell: Cell, *, device: torch.device, merging: torch.device, trial: bool) -> list[Row]:
    """Clients, their ensemble, and every merge of one seed.

    Without a match on digits alone; refit from clients on digits and MNIST.

    Parameters
    ----------
    cell : tuple
        Case, partition and seed.
    device, merging : torch.device
        Where to train and evaluate, and where to merge.
    trial : bool
        Whether means over owners on all axes are measured, too.
    """
    case, partition, seed = cell
    found = Trained.of(replace(CASES[case], seed=seed, **PARTITIONS[partition]), device)
    scores = [found.accuracy(client, node) for client, node in enumerate(found.nodes)]
    print("  clients", [f"{score:.3f}" for score in scores], flush=True)
    ensemble = found.votes(found.test.inputs).argmax(1) == found.test.labels
    measured = {f"clients of width {name}": statistics.mean(scores[2 * i : 2 * i + 2]) for i, name in enumerate(WIDTHS)}
    measured |= {"best client": max(scores), "ensemble": float(ensemble.double().mean())}
    measured["distillation"] = found.distilled()
    widths = found.widths()

    def merged(column: str, recalibration: Recalibration | None, *, width: int | None = None) -> None:
        method = Mean() if column.startswith("no match") else CycleConsistent()
        start = time.perf_counter()
        measured[column] = found.merged(widths, width, recalibration, method, merging)
        print(f"  {column} {measured[column]:.3f} ({time.perf_counter() - start:.1f} s)", flush=True)

    for suffix, recalibrate in RECALIBRATIONS.items():
        if case == "digits":
            merged(f"no match{suffix}", recalibrate)
        merged(f"universe{suffix}", recalibrate)
        if trial:
            with patch.object(merge_widths, "reading_axes", lambda *_: {}):
                merged(f"universe, means over owners on all axes{suffix}", recalibrate)
    for index, name in enumerate(WIDTHS):
        for suffix, recalibrate in RECALIBRATIONS.items():
            if suffix and name != "2":
                merged(f"universe{suffix}, cut to width {name}", recalibrate, width=2 * index)
    if case in ("digits", "mnist"):
        measured |= refit_from_clients(found, widths)
    return [Row(partition, seed, column, value, case) for column, value in measured.items()]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="Table of merges of different widths.")
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--partitions", nargs="+", choices=list(PARTITIONS), default=list(PARTITIONS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--merge-device", help="where to merge; by default on the same device")
    parser.add_argument("--trial", action="store_true", help="measure means over owners on all axes, write no record")
    parser.add_argument("--units", type=Path, help="draw who maps where, and measure nothing")
    add_options(parser, RESULTS)
    arguments = parser.parse_args()
    if arguments.units is not None:
        draw_units(arguments.units)
        return

    def measure(known: Cells[Row], device: torch.device) -> Cells[Row]:
        merging = usable_device(arguments.merge_device or device)
        cell = partial(rows, device=device, merging=merging, trial=arguments.trial)
        cells = list(product(arguments.cases, arguments.partitions, arguments.seeds))
        if arguments.trial:
            return Cells(LAYOUT).measure(cells, cell, None, device)
        return known.measure(cells, cell, arguments.output, device)

    print(table(run(LAYOUT, arguments, measure, draw)))


def _order(row: Row) -> tuple[int, int, int]:
    return list(CASES).index(row.case), list(PARTITIONS).index(row.partition), row.seed


LAYOUT = Layout(
    COMMAND,
    {
        "widths": WIDTHS,
        "scales": SCALES,
        "clients": CLIENTS,
        "settings": {name: asdict(settings) for name, settings in CASES.items()},
        "partitions": PARTITIONS,
    },
    Row,
    _order,
)


if __name__ == "__main__":
    main()
