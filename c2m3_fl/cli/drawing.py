"""Comparisons as a picture: accuracy against rounds, or bars if there is only one round."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING

from simulations.results import Comparison, Round
from simulations.settings import TITLES

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_COLOURS = {  # Okabe and Ito's palette, readable for the colour-blind
    "fedavg": "#7F7F7F",
    "fedavgm": "#56B4E9",
    "fedmedian": "#CC79A7",
    "c2m3": "#0072B2",
    "c2m3+repair": "#D55E00",
    "c2m3+default": "#E69F00",
    "c2m3+client-refit+head": "#009E73",
    "c2m3+judged": "#AA3377",
}
_INK, _FAINT = "#333333", "#dddddd"
_REFERENCES: dict[str, tuple[Callable[[Round], float], str]] = {
    "ensemble of the clients": (lambda each: each.ensemble, "--"),
    "best client": (lambda each: each.best_client, ":"),
}


def draw(comparison: Comparison, file: Path) -> None:
    """Every strategy's global model, with the clients' ensemble and the best client as references.

    In every round, a reference is the largest over the strategies. Over several seeds, means are drawn and
    the range is shaded.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import PercentFormatter

    figure, axes = plt.subplots(figsize=(7.6, 4.2), layout="constrained")
    (_lines if comparison.last_round > 1 else _bars)(axes, comparison)
    axes.set_ylim(0, 1.02)
    axes.set_ylabel("test accuracy")
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color=_FAINT, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.set_title(_title(comparison), loc="left", fontsize=9, color=_INK, pad=10)
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)
    figure.savefig(file, dpi=160)
    plt.close(figure)


def _lines(axes: Axes, comparison: Comparison) -> None:
    numbers = list(range(1, comparison.last_round + 1))
    for label, (value, style) in _REFERENCES.items():
        axes.plot(numbers, [_best(comparison, number, value) for number in numbers], style, color=_INK, label=label)
    for strategy in comparison.strategies:
        values = [_accuracies(comparison.at(strategy, number)) for number in numbers]
        colour = _colour(comparison, strategy)
        axes.plot(numbers, [mean(row) for row in values], "o-", color=colour, linewidth=2.2, label=TITLES[strategy])
        if len(comparison.seeds) > 1:
            low, high = [min(row) for row in values], [max(row) for row in values]
            axes.fill_between(numbers, low, high, color=colour, alpha=0.15, linewidth=0)
    axes.set_xticks(numbers)
    axes.set_xlabel("round")


def _bars(axes: Axes, comparison: Comparison) -> None:
    for label, (value, style) in _REFERENCES.items():
        axes.axhline(_best(comparison, 1, value), linestyle=style, color=_INK, label=label)
    for position, strategy in enumerate(comparison.strategies):
        values = _accuracies(comparison.at(strategy, 1))
        height = mean(values)
        spread = [[height - min(values)], [max(values) - height]] if len(values) > 1 else None
        axes.bar(position, height, 0.6, color=_colour(comparison, strategy), yerr=spread, ecolor=_INK, capsize=4)
        axes.annotate(f"{height:.1%}", (position, 0.02), ha="center", color="white", fontweight="bold")
    axes.set_xticks(range(len(comparison.strategies)), [TITLES[name] for name in comparison.strategies])


def _colour(comparison: Comparison, strategy: str) -> str:
    """Colour from the table above; for a strategy that is not in it, one of its own among the others."""
    from matplotlib import colormaps
    from matplotlib.colors import to_hex

    if strategy in _COLOURS:
        return _COLOURS[strategy]
    others = [name for name in comparison.strategies if name not in _COLOURS]
    place = others.index(strategy)
    many = len(others) > colormaps["tab20"].N
    return to_hex(colormaps["turbo"](place / len(others)) if many else colormaps["tab20"](place))


def _accuracies(rounds: Sequence[Round]) -> list[float]:
    return [each.accuracy for each in rounds]


def _best(comparison: Comparison, number: int, value: Callable[[Round], float]) -> float:
    """Largest over strategies of the mean over seeds."""
    return max(mean(value(each) for each in comparison.at(name, number)) for name in comparison.strategies)


def _title(comparison: Comparison) -> str:
    settings = comparison.settings
    partition = str(settings["partition"])
    spread = {"iid": "IID", "dirichlet": f"Dirichlet {settings['alpha']:g}"}.get(partition, partition)
    many = f", {len(comparison.seeds)} seeds" if len(comparison.seeds) > 1 else ""
    return (
        f"{settings['data']}, {settings['model']}: {settings['clients']} clients, "
        f"{spread} partition, {settings['initialisation']} initialisation{many}"
    )
