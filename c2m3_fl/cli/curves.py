"""Barriers, landscapes and the agreement of layers as pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean

from c2m3_fl.merging.evaluate.barrier import Line
from c2m3_fl.merging.evaluate.landscape import Landscape

_COLOURS = ("#7F7F7F", "#0072B2", "#D55E00", "#009E73")  # Okabe and Ito's palette
_LEVELS = 16


def draw_segments(segments: Mapping[str, Line], file: Path) -> None:
    """Loss and accuracy along segments, one line each."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, panels = plt.subplots(1, 2, figsize=(8.4, 3.6), layout="constrained")
    for panel, quantity in zip(panels, ("loss", "accuracy"), strict=True):
        for (name, segment), colour in zip(segments.items(), _COLOURS, strict=False):
            values = [getattr(score, quantity) for score in segment.scores]
            panel.plot(segment.positions, values, marker="o", markersize=3, color=colour, label=name)
        panel.set_xlabel("from the first network to the second")
        panel.set_ylabel(quantity)
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].legend(frameon=False)
    figure.savefig(file, dpi=150)
    plt.close(figure)


def draw_landscapes(landscapes: Mapping[str, Landscape], names: Sequence[str], file: Path) -> None:
    """Loss across the plane through three networks of these names, one panel each, on one scale of colours."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import MaxNLocator

    figure, panels = plt.subplots(1, len(landscapes), figsize=(4.6 * len(landscapes), 4), layout="constrained")
    high = max(float(each.loss.quantile(0.9)) for each in landscapes.values())
    low = min(float(each.loss.min()) for each in landscapes.values())
    levels = MaxNLocator(_LEVELS).tick_values(low, high)
    panels = [panels] if len(landscapes) == 1 else list(panels)
    for panel, (name, each) in zip(panels, landscapes.items(), strict=True):
        drawn = panel.contourf(each.x, each.y, each.loss.numpy(), levels=levels, cmap="viridis", extend="both")
        for network, (x, y) in zip(names, each.corners, strict=True):
            panel.plot(x, y, marker="o", color="white", markeredgecolor="black")
            panel.annotate(network, (x, y), textcoords="offset points", xytext=(6, 6), color="white")
        panel.set_title(name, loc="left", fontsize=10)
        panel.set_aspect("equal")
        panel.set_xlabel("distance in parameter space")
    figure.colorbar(drawn, ax=panels, label="loss", ticks=levels[::3])
    figure.savefig(file, dpi=150)
    plt.close(figure)


def draw_agreement(before: Mapping[str, Sequence[float]], after: Mapping[str, Sequence[float]], file: Path) -> None:
    """How well the nodes agree in every tensor, as they are and in one basis: mean cosine with the others."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    names = list(after)
    figure, axes = plt.subplots(figsize=(7, 1.2 + 0.28 * len(names)), layout="constrained")
    ends = [[mean(rows[name]) for name in names] for rows in (before, after)]
    places = range(len(names))
    axes.hlines(places, ends[0], ends[1], color=_COLOURS[0], linewidth=1, alpha=0.5)
    ring, dot = _COLOURS[:2]  # a dot inside a ring leaves both visible
    axes.plot(
        ends[0], places, "o", color=ring, label="as they are", markersize=9, markerfacecolor="none", clip_on=False
    )
    axes.plot(ends[1], places, "o", color=dot, label="in one basis", clip_on=False)
    axes.set_yticks(places, names, fontsize=8)
    axes.invert_yaxis()
    axes.set_xlim(min(0.0, *ends[0], *ends[1]) - 0.02, 1)
    axes.set_xlabel("mean cosine of a network with the others")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="x", color="#dddddd", linewidth=0.8)
    axes.legend(frameon=False, loc="lower right")
    figure.savefig(file, dpi=150)
    plt.close(figure)
