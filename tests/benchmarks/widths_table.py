"""The record of one-shot merges of different widths, as a table and as pictures."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from matplotlib.figure import Figure

from c2m3_fl.merging import merge
from simulations.verdict import spread
from tests.benchmarks.widths_cases import CLIENTS, PARTITIONS, SETTINGS, TITLES, Trained

Cell = tuple[str, str, int]  # case, partition, seed
_DRAWN = {  # columns of the picture: their groups, told apart by colour
    "clients": ("clients of width ½", "clients of width 1", "clients of width 2", "best client"),
    "peers of full width": ("ensemble", "distillation"),
    "merges": ("universe", "universe + REPAIR", "universe + refit"),
    "merges, cut": ("universe + refit, cut to width 1", "universe + refit, cut to width ½"),
}


@dataclass(frozen=True)
class Row:
    """One measurement."""

    partition: str
    seed: int
    column: str
    accuracy: float
    case: str = "digits"

    @property
    def cell(self) -> Cell:
        """What is measured at once."""
        return self.case, self.partition, self.seed


def table(found: Sequence[Row]) -> str:
    """Markdown: one line per column, one column per case and partition, mean ± standard deviation over seeds."""
    groups = list(dict.fromkeys((row.case, row.partition) for row in found))
    lines = [
        f"| | {' | '.join(f'{TITLES[case]}, {partition}' for case, partition in groups)} |",
        f"| --- |{' ---: |' * len(groups)}",
    ]
    for column in dict.fromkeys(row.column for row in found):
        cells = []
        for group in groups:
            scores = [100 * row.accuracy for row in found if (row.case, row.partition, row.column) == (*group, column)]
            cells.append(spread(scores, 1) or "–")
        lines.append(f"| {column} | {' | '.join(cells)} |")
    return "\n".join(lines)


def draw(rows: Sequence[Row], file: Path) -> None:
    """Accuracies, one panel per case and partition: the mean over seeds, and every seed.

    Parameters
    ----------
    rows : sequence of Row
        The measurements.
    file : Path
        The picture.
    """
    cases = list(dict.fromkeys(row.case for row in rows))
    figure = Figure(figsize=(3.2 * len(cases) + 2, 2.7 * len(PARTITIONS)), layout="constrained")
    panels = figure.subplots(len(PARTITIONS), len(cases), squeeze=False, sharey=True)
    names = [name for group in _DRAWN.values() for name in group]
    for line, partition in enumerate(PARTITIONS):
        for column, case in enumerate(cases):
            axes = panels[line][column]
            for number, group in enumerate(_DRAWN.values()):
                for name in group:
                    key = (case, partition, name)
                    found = [100 * row.accuracy for row in rows if (row.case, row.partition, row.column) == key]
                    if not found:
                        continue
                    place = [names.index(name)]
                    axes.plot(found, place * len(found), "o", color=f"C{number}", alpha=0.35, markersize=4)
                    axes.plot(
                        [statistics.mean(found)], place, "|", color=f"C{number}", markersize=13, markeredgewidth=2
                    )
            axes.set_yticks(range(len(names)), names, fontsize=8)
            axes.set_title(f"{TITLES[case]}, {partition}", fontsize=9)
            axes.grid(axis="x", alpha=0.3)
    panels[0][0].invert_yaxis()
    for axes in panels[-1]:
        axes.set_xlabel("test accuracy (%)", fontsize=8)
    figure.savefig(file, dpi=110)


def draw_units(file: Path) -> None:
    """Who maps where: per client and place the cosine of its unit's weights with those of the other owners."""
    found = Trained.of(replace(SETTINGS, **PARTITIONS["IID"]), torch.device("cpu"))
    merged = merge(models=found.models, state_dicts=found.nodes, calibration=found.data.calibration, recalibrate="none")
    assert merged.widths is not None
    (name, places), *_ = merged.widths.into[-1].items()
    units = torch.stack([own[name] for own in merged.widths.into])
    rows = torch.zeros(*units.shape, found.nodes[0]["1.weight"].shape[1])
    for client, node in enumerate(found.nodes):
        rows[client] = node["1.weight"][units[client].clamp_min(0)] * (units[client] >= 0)[:, None]
    cosines = torch.cosine_similarity(rows, rows.sum(0) - rows, dim=-1).masked_fill(units < 0, torch.nan)
    order = (units >= 0).sum(0).argsort(descending=True, stable=True)
    figure = Figure(figsize=(9, 2.4), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(cosines[:, order], aspect="auto", cmap="viridis", vmin=0, vmax=1, interpolation="nearest")
    axes.set_facecolor("0.92")
    axes.set_yticks(range(len(CLIENTS)), [f"client {place}, width {width}" for place, width in enumerate(CLIENTS)])
    axes.set_xlabel(
        f"{len(places)} units of the first hidden layer of the merged network, those with most owners first"
    )
    figure.colorbar(image, label="cosine with the others")
    figure.savefig(file, dpi=160)
