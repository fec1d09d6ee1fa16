"""Tables and picture of `questions`, from the rows of its record."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

Rows = Sequence[Mapping[str, Any]]

_COLOURS = {  # Okabe and Ito
    "mean network": "#000000",
    "ensemble": "#7F7F7F",
    "plain mean": "#56B4E9",
    "plain mean + head": "#56B4E9",
    "C2M3": "#0072B2",
    "C2M3 + head": "#CC79A7",
    "C2M3 + REPAIR": "#D55E00",
    "activation matching + REPAIR": "#F0E442",
    "plain mean + refit": "#E69F00",
    "C2M3 + refit": "#009E73",
    "C2M3 + refit, no labels": "#009E73",
}
_TITLES = {
    "ablation": "Cycle consistency and Frank-Wolfe apart",
    "foreign": "Out of distribution, accuracy",
    "corrupted": "CIFAR-10 corrupted, accuracy",
    "stability": "Stability of the permutations",
    "tasks": "Classes per client, accuracy",
    "decay": "Width and weight decay, accuracy barrier",
    "calibration": "Unlabelled inputs, accuracy",
    "labels": "Labels on the server, accuracy",
}
_CURVES = {"tasks": "classes per client", "calibration": "unlabelled inputs", "labels": "labels on the server"}


def tables(rows: Rows) -> str:
    """Markdown, one table per question; mean ± standard deviation over seeds."""
    parts = []
    for question, title in _TITLES.items():
        here = [row for row in rows if row["question"] == question]
        if not here:
            continue
        columns = list(dict.fromkeys(row["column"] for row in here))
        lines = [f"| {title} | {' | '.join(columns)} |", "| --- |" + " ---: |" * len(columns)]
        for line in dict.fromkeys(row["line"] for row in here):
            cells = [_spread(_values(here, line, column)) for column in columns]
            lines.append(f"| {line} | {' | '.join(cells)} |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def draw(rows: Rows, file: Path) -> None:
    """Curves of the three questions that ask how much, or how little."""
    drawn = [question for question in _CURVES if any(row["question"] == question for row in rows)]
    figure = Figure(figsize=(3.4 * len(drawn), 3.4), layout="constrained")
    for panel, question in zip(figure.subplots(1, len(drawn), squeeze=False)[0], drawn, strict=True):
        _curves(panel, [row for row in rows if row["question"] == question], _CURVES[question])
    entries = [panel.get_legend_handles_labels() for panel in figure.axes]
    handles = {label: handle for pair in entries for handle, label in zip(*pair, strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=4, frameon=False, fontsize=7)
    figure.savefig(file, dpi=120)


def _curves(panel: Axes, rows: Rows, label: str) -> None:
    places = list(dict.fromkeys(row["column"] for row in rows))
    for line in dict.fromkeys(row["line"] for row in rows):
        colour = _COLOURS[line]
        values = [_values(rows, line, place) for place in places]
        panel.plot(range(len(places)), [fmean(each) for each in values], color=colour, label=line, linewidth=1.5)
        low, high = [min(each) for each in values], [max(each) for each in values]
        panel.fill_between(range(len(places)), low, high, color=colour, alpha=0.1, linewidth=0)
    panel.set_xticks(range(len(places)), places)
    panel.set_xlabel(label, fontsize=8)
    panel.set_ylabel("test accuracy", fontsize=8)
    panel.set_ylim(0, 1.02)
    panel.spines[["top", "right"]].set_visible(False)
    panel.tick_params(labelsize=7)


def _values(rows: Rows, line: str, column: str) -> list[float]:
    return [row["value"] for row in rows if (row["line"], row["column"]) == (line, column)]


def _spread(values: Sequence[float]) -> str:
    if not values:
        return ""
    return f"{fmean(values):.3f}" + (f" ± {stdev(values):.3f}" if len(values) > 1 else "")
