"""Picture of `rotations_real`: the loss between two networks, and at the mean of more of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from tests.benchmarks.rotations_draw import METHODS

Rows = Sequence[Mapping[str, Any]]

_COLOURS = dict(  # Okabe and Ito
    zip(METHODS, ("#7F7F7F", "#56B4E9", "#E69F00", "#0072B2", "#CC79A7", "#009E73"), strict=True)
)
_AFTER = {"none": "mean, no data", "repair": "mean + REPAIR", "refit": "mean + refit"}


def above_ends(line: Sequence[float]) -> tuple[float, ...]:
    """Losses at equidistant points between two networks, less the straight line between the losses of the two."""
    first, last, steps = line[0], line[-1], len(line) - 1
    return tuple(loss - first - at * (last - first) / steps for at, loss in enumerate(line))


def picture(rows: Rows, ends: str, file: Path) -> None:
    """One row of panels per network.

    Parameters
    ----------
    rows : sequence of mapping
        Rows of the record.
    ends : str
        The method under which the mean loss of the networks themselves is found.
    file : Path
        Where the picture is written.
    """
    networks = sorted({row["network"] for row in rows}, reverse=True)
    figure = Figure(figsize=(13, 3.4 * len(networks)), layout="constrained")
    panels = figure.subplots(len(networks), 1 + len(_AFTER), squeeze=False)
    for network, (between, *means) in zip(networks, panels, strict=True):
        own = [row for row in rows if row["network"] == network]
        _between(between, own)
        between.set_title(network, fontsize=9, loc="left")
        for panel, (how, title) in zip(means, _AFTER.items(), strict=True):
            _against_nodes(panel, own, ends, how)
            panel.set_title(title, fontsize=9, loc="left")
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(METHODS), frameon=False, fontsize=8)
    figure.savefig(file, dpi=120)


def _between(panel: Axes, rows: Rows) -> None:
    for method, colour in _COLOURS.items():
        lines = [above_ends(row["line"]) for row in rows if row["method"] == method and row["line"]]
        points = list(zip(*lines, strict=True))
        places = [at / (len(points) - 1) for at in range(len(points))]
        _curve(panel, places, points, colour, method)
    _dress(panel, "λ, from one network to the other")


def _against_nodes(panel: Axes, rows: Rows, ends: str, how: str) -> None:
    loss = {(row["nodes"], row["draw"]): row["loss"] for row in rows if row["method"] == ends}
    for method, colour in _COLOURS.items():
        found: dict[int, list[float]] = {}
        for row in rows:
            if (row["method"], row["recalibration"]) == (method, how):
                found.setdefault(row["nodes"], []).append(row["loss"] - loss[row["nodes"], row["draw"]])
        _curve(panel, sorted(found), [found[nodes] for nodes in sorted(found)], colour, method)
    panel.set_xticks(sorted({row["nodes"] for row in rows}))
    _dress(panel, "networks")


def _curve(panel: Axes, places: Sequence[float], values: Sequence[Sequence[float]], colour: str, label: str) -> None:
    """Mean, and a band from the least to the largest value."""
    panel.plot(places, [fmean(each) for each in values], color=colour, label=label, linewidth=1.5, marker=".")
    panel.fill_between(places, [min(e) for e in values], [max(e) for e in values], color=colour, alpha=0.1, linewidth=0)


def _dress(panel: Axes, label: str) -> None:
    panel.set_xlabel(label, fontsize=8)
    panel.set_ylabel("loss above that of the networks", fontsize=8)
    panel.set_ylim(bottom=min(0, panel.get_ylim()[0]))
    panel.spines[["top", "right"]].set_visible(False)
    panel.tick_params(labelsize=7)
