"""Comparisons as tables for the terminal and as Markdown for a report."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import mean, stdev

from rich import box
from rich.table import Table

from simulations.results import Comparison, Round
from simulations.settings import TITLES

_COLUMNS: dict[str, Callable[[Round], float]] = {
    "accuracy": lambda each: each.accuracy,
    "loss": lambda each: each.loss,
    "mean client": lambda each: each.mean_client,
    "best client": lambda each: each.best_client,
    "ensemble": lambda each: each.ensemble,
}


def rounds_table(comparison: Comparison) -> Table:
    """One line per strategy and round; over several seeds mean and standard deviation."""
    seeds = comparison.seeds
    title = "Test accuracy" if len(seeds) == 1 else f"Test accuracy, mean ± standard deviation over {len(seeds)} seeds"
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
    table.add_column("strategy", no_wrap=True)
    table.add_column("round", justify="right")
    for name in _COLUMNS:
        table.add_column(name, justify="right", style="bold" if name == "accuracy" else None, no_wrap=True)
    for strategy in comparison.strategies:
        for number in range(1, comparison.last_round + 1):
            row = _row(comparison.at(strategy, number))
            last = number == comparison.last_round
            table.add_row(TITLES[strategy] if number == 1 else "", str(number), *row, end_section=last)
    return table


def markdown(comparison: Comparison) -> str:
    """The last round as a Markdown table, one line per strategy."""
    header = ["strategy", *_COLUMNS]
    lines = [f"| {' | '.join(header)} |", f"| {' | '.join(['---'] * len(header))} |"]
    for strategy in comparison.strategies:
        row = [TITLES[strategy], *_row(comparison.at(strategy, comparison.last_round))]
        lines.append(f"| {' | '.join(row)} |")
    return "\n".join(lines) + "\n"


def _row(rounds: Sequence[Round]) -> list[str]:
    return [_spread([value(each) for each in rounds]) for value in _COLUMNS.values()]


def _spread(values: Sequence[float]) -> str:
    """The value, or mean ± sample standard deviation of several."""
    if len(values) == 1:
        return f"{values[0]:.3f}"
    return f"{mean(values):.3f} ± {stdev(values):.3f}"
