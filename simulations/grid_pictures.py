"""An experiment as a picture, from its record alone: accuracy against rounds, one panel per cell."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING, Any

from simulations.ledger import Record
from simulations.settings import TITLES
from simulations.verdict import accuracies, at, cells

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_COLOURS = ("#7F7F7F", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")  # Okabe and Ito
_FAINT = "#dddddd"
_PANEL = (2.7, 2.1)  # inches


def draw(record: Record, file: Path) -> None:
    """Draw one column per level of the axis with most levels, and one row per cell of the other axes.

    Lines are means over seeds; the range over seeds is shaded.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    names = _drawn(record)
    across, columns, rows = _layout(cells(record))
    width, height = _PANEL[0] * len(columns) + 0.4, _PANEL[1] * len(rows) + 1.1
    figure, panels = plt.subplots(
        len(rows), len(columns), figsize=(width, height), sharex=True, sharey=True, squeeze=False, layout="constrained"
    )
    for line, row in zip(panels, rows, strict=True):
        for panel, level in zip(line, columns, strict=True):
            _panel(panel, record, {**row, across: level}, names)
            others = ", ".join(f"{axis} {value}" for axis, value in row.items())
            title = f"{across} {level}" if level.isdigit() else level
            panel.set_title(f"{title}: {others}" if others else title, fontsize=8)
        line[0].set_ylabel("test accuracy")
    for panel in panels[-1]:
        panel.set_xlabel("round")
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(4, len(labels)), frameon=False, fontsize=8)
    figure.suptitle(str(record.about["title"]), fontsize=9)
    figure.savefig(file, dpi=130)
    plt.close(figure)


def _panel(panel: Axes, record: Record, cell: Mapping[str, str], names: Sequence[str]) -> None:
    for name, colour in zip(names, _COLOURS, strict=False):
        found = at(record, cell, name)
        if not found:
            continue
        numbers = range(1, len(found[0].accuracy) + 1)
        values = [accuracies(found, number - 1) for number in numbers]
        first = name == names[0]  # dashed and on top, so that equal curves stay visible under it
        style: dict[str, Any] = {"linestyle": "--", "zorder": 5} if first else {"linestyle": "-"}
        style["marker"] = "o" if len(values) == 1 else None  # a line of one round cannot be seen
        means = [mean(each) for each in values]
        panel.plot(numbers, means, color=colour, linewidth=1.6, label=TITLES.get(name, name), **style)
        if len(found) > 1:
            low, high = [min(each) for each in values], [max(each) for each in values]
            panel.fill_between(numbers, low, high, color=colour, alpha=0.13, linewidth=0)
    panel.set_ylim(0, 1.02)
    panel.spines[["top", "right"]].set_visible(False)
    panel.grid(axis="y", color=_FAINT, linewidth=0.6)
    panel.set_axisbelow(True)
    panel.tick_params(labelsize=7)


def _layout(where: Sequence[Mapping[str, str]]) -> tuple[str, list[str], list[dict[str, str]]]:
    """The axis across, its levels, and the cells of the other axes."""
    levels = {axis: list(dict.fromkeys(cell[axis] for cell in where)) for axis in where[0]}
    across = max(levels, key=lambda axis: len(levels[axis]))
    others = [{axis: level for axis, level in cell.items() if axis != across} for cell in where]
    rows = list({tuple(each.items()): each for each in others}.values())
    return across, levels[across], rows


def _drawn(record: Record) -> list[str]:
    design: Any = record.about["design"]
    return list(design["drawn"])
