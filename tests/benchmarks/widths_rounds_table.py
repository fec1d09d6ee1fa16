"""The record of ten rounds of clients of five widths, as a table and as a picture."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.figure import Figure

from simulations.verdict import spread

WIDTHS = {"1": 1.0, "1/2": 0.5, "1/4": 0.25, "1/8": 0.125, "1/16": 0.0625}
SHOWN = (1, 4, 7, 10)
METHODS = {
    "C2M3": "C2M3, one start",
    "own": "C2M3, starts of their own",
    "fed back": "C2M3, one start, refit before it is sent",
    "own, fed back": "C2M3, starts of their own, refit before it is sent",
    "heterofl": "HeteroFL without Scaler",
    "scaler": "HeteroFL",
    "refit": "HeteroFL without Scaler, slices refit",
}
_TRIED = "before it is sent"
NORMED = "-bn"  # ends the names of cases whose networks have BatchNorm
_TITLES = {"digits": "digits", "cifar10": "CIFAR-10"}
_TITLES |= {f"{name}{NORMED}": f"{title}, BatchNorm" for name, title in _TITLES.items()}
Cell = tuple[str, int, str]  # data, seed, method


@dataclass(frozen=True)
class Row:
    """One measurement."""

    data: str
    method: str
    seed: int
    round: int
    width: str
    accuracy: float

    @property
    def case(self) -> str:
        """The data set."""
        return self.data

    @property
    def cell(self) -> Cell:
        """The run."""
        return self.data, self.seed, self.method


def table(rows: Sequence[Row]) -> str:
    """Markdown: one line per method and round, one column per width; mean and standard deviation, in percent."""
    lines = [
        f"| | round | {' | '.join(f'width {width}' for width in WIDTHS)} |",
        f"| --- | ---: |{' ---: |' * len(WIDTHS)}",
    ]
    for data, method, current in dict.fromkeys((row.data, row.method, row.round) for row in rows):
        cells = []
        for width in WIDTHS:
            key = (data, method, current, width)
            found = [100 * row.accuracy for row in rows if (row.data, row.method, row.round, row.width) == key]
            cells.append(spread(found, 1))
        lines.append(f"| {_TITLES[data]}, {method} | {current} | {' | '.join(cells)} |")
    return "\n".join(lines)


def draw(rows: Sequence[Row], file: Path) -> None:
    """Accuracy by round, one panel per data set and width; the mean over seeds, and their range.

    What was tried and is not what C2M3 does is left out.

    Parameters
    ----------
    rows : sequence of Row
        The measurements.
    file : Path
        The picture.
    """
    rows = [row for row in rows if not row.method.endswith(_TRIED)]
    cases = list(dict.fromkeys(row.data for row in rows))
    figure = Figure(figsize=(11, 2.6 * len(cases)), layout="constrained")
    panels = figure.subplots(len(cases), len(WIDTHS), squeeze=False, sharex=True, sharey="row")
    for line, data in enumerate(cases):
        for column, width in enumerate(WIDTHS):
            axes = panels[line][column]
            for method in dict.fromkeys(row.method for row in rows if row.data == data):
                key = (data, method, width)
                own = [row for row in rows if (row.data, row.method, row.width) == key]
                values = [[100 * row.accuracy for row in own if row.round == current] for current in SHOWN]
                (drawn,) = axes.plot(SHOWN, [statistics.mean(each) for each in values], marker=".", label=method)
                low, high = [min(each) for each in values], [max(each) for each in values]
                axes.fill_between(SHOWN, low, high, color=drawn.get_color(), alpha=0.15, linewidth=0)
            axes.set_title(f"{_TITLES[data]}, width {width}", fontsize=9)
            axes.set_xticks(SHOWN)
            axes.grid(alpha=0.3)
        panels[line][0].set_ylabel("test accuracy (%)")
    for axes in panels[-1]:
        axes.set_xlabel("round")
    figure.legend(*panels[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=9)
    figure.savefig(file, dpi=130)
