"""Tables and picture of `figures`, from the rows of its record."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

Rows = Sequence[Mapping[str, Any]]

_COLOURS = {
    "mean network": "#000000",
    "no match": "#7F7F7F",
    "Git Re-Basin": "#56B4E9",
    "MergeMany": "#E69F00",
    "C2M3": "#0072B2",
    "C2M3 + REPAIR": "#D55E00",
    "C2M3 + refit": "#009E73",
}
_CURVES = {"number": "number of networks", "width": "width (1 is 32 units)", "depth": "hidden layers"}
_TITLES = {
    "barrier": "Loss barrier",
    "number": "Accuracy of the merge, by number of networks",
    "width": "Accuracy of the merge, by width",
    "depth": "Accuracy of the merge, by number of hidden layers",
    "start": "Start of the search",
    "cycle": "Units astray around a cycle of three",
}


def tables(rows: Rows) -> str:
    """Markdown, one table per figure: a line per curve, a column per place; mean ± standard deviation over seeds."""
    parts = []
    for figure, title in _TITLES.items():
        here = [row for row in rows if row["figure"] == figure]
        places = list(dict.fromkeys(row["x"] for row in here))
        lines = [f"| {title} | {' | '.join(places)} |", "| --- |" + " ---: |" * len(places)]
        for series in dict.fromkeys(row["series"] for row in here):
            cells = [
                _spread([row["value"] for row in here if (row["series"], row["x"]) == (series, x)]) for x in places
            ]
            lines.append(f"| {series} | {' | '.join(cells)} |")
        parts.append("\n".join(lines))
    parts.append(_orders([row for row in rows if row["figure"] == "order"]))
    return "\n\n".join(parts)


def _orders(rows: Rows) -> str:
    """What chance changes: the spread within a set of networks, mean over sets."""
    lines = ["| Random order | accuracy | standard deviation over orders | range |", "| --- | ---: | ---: | ---: |"]
    for series in dict.fromkeys(row["series"] for row in rows):
        sets = [
            [row["value"] for row in rows if (row["series"], row["seed"]) == (series, seed)]
            for seed in dict.fromkeys(row["seed"] for row in rows)
        ]
        mean, spread = fmean(map(fmean, sets)), fmean(map(stdev, sets))
        lines.append(f"| {series} | {mean:.3f} | {spread:.4f} | {fmean(max(each) - min(each) for each in sets):.4f} |")
    return "\n".join(lines)


def draw(rows: Rows, file: Path) -> None:
    """Three panels of curves; below, barriers, orders and cycles."""
    figure = Figure(figsize=(10, 5.8), layout="constrained")
    panels = figure.subplots(2, 3)
    for panel, (name, label) in zip(panels[0], _CURVES.items(), strict=True):
        _curves(panel, [row for row in rows if row["figure"] == name], label)
    _barriers(panels[1][0], [row for row in rows if row["figure"] == "barrier"])
    _dots(panels[1][1], [row for row in rows if row["figure"] == "order"], "accuracy of the mean, by random order")
    _dots(panels[1][2], [row for row in rows if row["figure"] == "cycle"], "share of units astray around a cycle")
    handles = {
        label: handle for panel in panels[0] for handle, label in zip(*panel.get_legend_handles_labels(), strict=True)
    }
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=7, frameon=False, fontsize=8)
    for panel in panels.flat:
        panel.spines[["top", "right"]].set_visible(False)
        panel.tick_params(labelsize=7)
    figure.savefig(file, dpi=120)


def _curves(panel: Axes, rows: Rows, label: str) -> None:
    places = list(dict.fromkeys(row["x"] for row in rows))
    for series in dict.fromkeys(row["series"] for row in rows):
        values = [[row["value"] for row in rows if (row["series"], row["x"]) == (series, x)] for x in places]
        style: dict[str, Any] = {"color": _COLOURS[series], "linestyle": ":" if series == "mean network" else "-"}
        panel.plot(range(len(places)), [fmean(each) for each in values], label=series, linewidth=1.5, **style)
        low, high = [min(each) for each in values], [max(each) for each in values]
        panel.fill_between(range(len(places)), low, high, color=_COLOURS[series], alpha=0.12, linewidth=0)
    panel.set_xticks(range(len(places)), places)
    panel.set_xlabel(label, fontsize=8)
    panel.set_ylabel("test accuracy", fontsize=8)
    panel.set_ylim(0, 1.02)


def _barriers(panel: Axes, rows: Rows) -> None:
    names = list(dict.fromkeys(row["series"] for row in rows))
    for shift, (x, hatch) in enumerate((("pairs", ""), ("five", "//"))):
        values = [fmean(row["value"] for row in rows if (row["series"], row["x"]) == (name, x)) for name in names]
        colours = [_COLOURS[name] for name in names]
        places = [place + 0.4 * shift for place in range(len(names))]
        bars = panel.bar(places, values, 0.38, color=colours, hatch=hatch, edgecolor="white")
        panel.bar_label(bars, fmt="%.2f", fontsize=6)
    panel.set_xticks([place + 0.2 for place in range(len(names))], [name.replace(" ", "\n") for name in names])
    panel.set_ylabel("loss barrier: pairs, and (hatched) five", fontsize=8)


def _dots(panel: Axes, rows: Rows, label: str) -> None:
    names = list(dict.fromkeys(row["series"] for row in rows))
    for place, name in enumerate(names):
        for row in rows:
            if row["series"] == name:
                panel.scatter(row["value"], place + 0.12 * (row["seed"] % 3 - 1), s=12, color="#0072B2", alpha=0.6)
    panel.set_yticks(range(len(names)), [name.replace(", ", ",\n") for name in names], fontsize=7)
    panel.invert_yaxis()
    panel.set_xlabel(label, fontsize=8)


def _spread(values: Sequence[float]) -> str:
    if not values:
        return ""
    return f"{fmean(values):.3f}" + (f" ± {stdev(values):.3f}" if len(values) > 1 else "")
