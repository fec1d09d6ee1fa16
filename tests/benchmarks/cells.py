"""Measurements cell by cell: a record that is written after every cell, and gathered from several runs."""

from __future__ import annotations

import argparse
import time
import traceback
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import torch

from c2m3_fl.merging.recalibrate.setting import usable_device
from tests.benchmarks.records import here, read_record, write_record


class CellRow(Protocol):
    """One measurement of a cell."""

    @property
    def case(self) -> str:
        """The case that it belongs to."""
        ...

    @property
    def cell(self) -> Hashable:
        """What was measured at once."""
        ...


Row = TypeVar("Row", bound=CellRow)


@dataclass(frozen=True)
class Layout(Generic[Row]):
    """What a record of cells looks like.

    Attributes
    ----------
    command : str
        What writes it.
    configuration : mapping
        What every cell has in common.
    row : callable
        From the fields of a row, by name, to the row.
    order : callable
        By which rows are sorted.
    """

    command: str
    configuration: Mapping[str, Any]
    row: Callable[..., Row]
    order: Callable[[Row], Any]


@dataclass(frozen=True)
class Cells(Generic[Row]):
    """The cells that have been measured.

    Attributes
    ----------
    layout : Layout
        What the record looks like.
    rows : tuple of Row
        All measurements.
    measured : mapping of str to mapping
        By case, when, with which versions and on which machine.
    """

    layout: Layout[Row]
    rows: tuple[Row, ...] = ()
    measured: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    @classmethod
    def read(cls, layout: Layout[Row], file: Path) -> Cells[Row]:
        """Read a record; no cells if there is no such file."""
        if not file.exists():
            return cls(layout)
        record = read_record(file)
        rows = tuple(layout.row(**row) for row in record["rows"])
        own = {name: record[name] for name in here()}
        return cls(layout, rows, record.get("measured") or {row.case: own for row in rows})

    def joined(self, other: Cells[Row]) -> Cells[Row]:
        """With the cells of another record, which replace those of the same name."""
        new = {row.cell for row in other.rows}
        rows = [row for row in self.rows if row.cell not in new]
        return replace(
            self,
            rows=tuple(sorted([*rows, *other.rows], key=self.layout.order)),
            measured={**self.measured, **other.measured},
        )

    def write(self, file: Path) -> None:
        """Write the record."""
        rows = [asdict(row) for row in self.rows]  # type: ignore[call-overload]  # rows are dataclasses
        write_record(file, self.layout.command, self.layout.configuration, rows, measured=dict(self.measured))

    def measure(
        self,
        cells: Sequence[Hashable],
        rows: Callable[[Any], Iterable[Row]],
        file: Path | None,
        device: torch.device,
    ) -> Cells[Row]:
        """Measure the cells that are not there, one after the other, and write the record after each.

        Parameters
        ----------
        cells : sequence
            Their names.
        rows : callable
            From the name of a cell to its rows.
        file : Path, optional
            Where the record is; None to write none.
        device : torch.device
            Where cells are measured.

        Raises
        ------
        SystemExit
            At the end, if a cell failed; its traceback has been printed.
        """
        known, failed, there = self, [], {row.cell for row in self.rows}
        own = {**here(), "accelerator": torch.cuda.get_device_name(device) if device.type == "cuda" else "none"}
        for cell in cells:
            if cell in there:
                continue
            print(cell, flush=True)
            start = time.perf_counter()
            try:
                found = tuple(rows(cell))
            except Exception:  # one cell must not end the run
                failed.append(cell)
                traceback.print_exc()
                continue
            print(f"  {time.perf_counter() - start:.0f} s", flush=True)
            known = known.joined(replace(self, rows=found, measured={found[0].case: own}))
            if file is not None:
                known.write(file)
        if failed:
            raise SystemExit(f"{len(failed)} of {len(cells)} cells failed: {failed}")
        return known


def add_options(parser: argparse.ArgumentParser, output: Path) -> None:
    """The options that `run` reads."""
    parser.add_argument("--device", default="cpu", help="where to train and evaluate")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch on the CPU")
    parser.add_argument("--output", type=Path, default=output, help="the JSON file that is written after every cell")
    parser.add_argument("--collect", nargs="+", type=Path, help="add the cells of these files to the record")
    parser.add_argument("--redraw", action="store_true", help="print the table of the record and measure nothing")
    parser.add_argument("--picture", type=Path, help="draw the record, and measure nothing")


def run(
    layout: Layout[Row],
    options: argparse.Namespace,
    measure: Callable[[Cells[Row], torch.device], Cells[Row]],
    draw: Callable[[Sequence[Row], Path], None],
) -> tuple[Row, ...]:
    """Read the record, and collect, draw or measure as the options say; the rows there are then.

    Parameters
    ----------
    layout : Layout
        What the record looks like.
    options : Namespace
        Those of `add_options`.
    measure : callable
        From the cells that there are and the device to those that there are then.
    draw : callable
        Draws rows into a file.
    """
    known = Cells.read(layout, options.output)
    if options.collect:
        for file in options.collect:
            known = known.joined(Cells.read(layout, file))
        known.write(options.output)
    elif options.picture is not None:
        draw(known.rows, options.picture)
    elif not options.redraw:
        torch.set_num_threads(options.threads)
        torch.backends.cudnn.allow_tf32 = False
        known = measure(known, usable_device(options.device))
    return known.rows
