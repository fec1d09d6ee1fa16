"""An experiment of one round as a picture: one row per method, one dot per federation, one panel per group of them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from textwrap import fill
from typing import TYPE_CHECKING, Any

from simulations.design import Labels
from simulations.ledger import Record
from simulations.method_tables import groups
from simulations.settings import TITLES
from simulations.verdict import accuracies, at

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_COLOURS = ("#0072B2", "#009E73", "#E69F00", "#D55E00", "#CC79A7", "#56B4E9")  # Okabe and Ito, by level
_MARKERS = ("o", "s", "^", "D")  # by level of the last axis
_FAINT = "#dddddd"
_ROW, _PANEL = 0.19, 3.4  # inches: height of a method, width of a panel
_LETTERS = 12  # of the title, to an inch
_ENSEMBLE = "clients' ensemble"


def draw(record: Record, file: Path) -> None:
    """Draw accuracies, means over seeds; the panels share their rows."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    design: Any = record.about["design"]
    names = list(design["drawn"])
    panels = groups(record)
    size = (_PANEL * len(panels) + 1.8, _ROW * (len(names) + 1) + 1.6)
    figure, axes = plt.subplots(1, len(panels), figsize=size, sharey=True, squeeze=False, layout="constrained")
    for panel, (levels, where) in zip(axes[0], panels.items(), strict=True):
        _panel(panel, record, where, names)
        panel.set_title(", ".join(f"{axis} {level}" for axis, level in levels), fontsize=8)
        panel.set_xlabel("test accuracy", fontsize=8)
    first = axes[0][0]
    first.set_yticks(range(len(names) + 1), [*(TITLES.get(name, name) for name in names), _ENSEMBLE], fontsize=7)
    first.invert_yaxis()
    handles, labels = first.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(4, 2 * len(panels)), frameon=False, fontsize=7)
    figure.suptitle(fill(str(record.about["title"]), round(_LETTERS * size[0])), fontsize=9)
    figure.savefig(file, dpi=130)
    plt.close(figure)


def _panel(panel: Axes, record: Record, where: Sequence[Labels], names: Sequence[str]) -> None:
    *_, shade, shape = [None, *where[0]]
    shades, shapes = (list(dict.fromkeys(cell.get(str(axis), "") for cell in where)) for axis in (shade, shape))
    for cell in where:
        rows = [(row, mean(accuracies(found))) for row, name in enumerate(names) if (found := at(record, cell, name))]
        base = at(record, cell, names[0])
        if base:
            rows.append((len(names), mean(each.ensemble for each in base)))
        style: dict[str, Any] = {
            "color": _COLOURS[shades.index(cell.get(str(shade), "")) % len(_COLOURS)],
            "marker": _MARKERS[shapes.index(cell.get(str(shape), "")) % len(_MARKERS)],
        }
        label = ", ".join(f"{axis} {cell[axis]}" for axis in (shade, shape) if axis in cell)
        panel.scatter([value for _, value in rows], [row for row, _ in rows], s=16, alpha=0.85, label=label, **style)
    panel.set_xlim(0, 1)
    panel.spines[["top", "right"]].set_visible(False)
    panel.grid(color=_FAINT, linewidth=0.6)
    panel.set_axisbelow(True)
    panel.tick_params(labelsize=7)
