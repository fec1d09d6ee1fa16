"""An experiment of one round as Markdown: one row per method, one column per federation."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import exp, inf, isfinite
from statistics import mean

from simulations.design import Labels
from simulations.ledger import Measurement, Record
from simulations.settings import TITLES
from simulations.verdict import accuracies, at, cells, losses, margin, methods, spread

_ACROSS = 2  # the last axes, whose levels are columns; there is one table per cell of the others
_OVERVIEW = ("start", "partition")  # axes that stay apart where an experiment has more of them

Values = Callable[[Sequence[Measurement]], list[float]]


def markdown(record: Record) -> str:
    """Accuracy of every method on every federation, then gains and costs on average.

    Where there are more axes than two, accuracies on average over all but start and partition come first.
    """
    parts = _overview(record)
    for group, where in groups(record).items():
        table = f"{_per_cell(record, where, lambda found: accuracies(tuple(found)), max)}\n{_clients(record, where)}"
        parts += [f"{_title(group)}Accuracy:", table]
        if _is_text(record):
            parts += ["Perplexity of a character:", _per_cell(record, where, _perplexities, min)]
        parts += ["On average over these federations:", _averages(record, where)]
    return "\n\n".join(parts)


def _overview(record: Record) -> list[str]:
    """Accuracies averaged over all axes but `_OVERVIEW`, with their spread over the seeds that have all of them."""
    pooled: dict[tuple[str, ...], list[Labels]] = {}
    for cell in cells(record):
        pooled.setdefault(tuple(cell[axis] for axis in _OVERVIEW if axis in cell), []).append(cell)
    over = [axis for axis in cells(record)[0] if axis not in _OVERVIEW]
    if len(cells(record)[0]) - len(over) < len(_OVERVIEW) or not over:
        return []
    first, *_ = methods(record)
    read: dict[str, list[list[float]]] = {
        TITLES.get(name, name): [_by_seed(record, where, name, _accuracy) for where in pooled.values()]
        for name in methods(record)
    }
    tops = [
        max((mean(values) for values in column if values), default=0.0) for column in zip(*read.values(), strict=True)
    ]
    rows = [["method", *(", ".join(levels) for levels in pooled)], ["---"] + ["---:"] * len(pooled)]
    rows += [[title, *(_cell(*pair) for pair in zip(found, tops, strict=True))] for title, found in read.items()]
    for title, alone in _ALONE.items():
        rows.append([f"*{title}*", *(spread(_by_seed(record, where, first, alone)) for where in pooled.values())])
    return [f"Accuracy on average over {' and '.join(over)}:", _lines(rows)]


def _by_seed(record: Record, where: Sequence[Labels], name: str, read: Callable[[Measurement], float]) -> list[float]:
    """A method's mean over some cells, for each seed that has all of them."""
    found: dict[int, list[float]] = {}
    for cell in where:
        for each in at(record, cell, name):
            found.setdefault(each.seed, []).append(read(each))
    return [mean(values) for values in found.values() if len(values) == len(where)]


def _accuracy(found: Measurement) -> float:
    return accuracies((found,))[0]


def groups(record: Record) -> dict[tuple[tuple[str, str], ...], list[Labels]]:
    """The cells by their levels on all axes but the last ones."""
    found: dict[tuple[tuple[str, str], ...], list[Labels]] = {}
    for cell in cells(record):
        found.setdefault(tuple(cell.items())[: max(len(cell) - _ACROSS, 0)], []).append(cell)
    return found


def _is_text(record: Record) -> bool:
    design = record.about["design"]
    return isinstance(design, Mapping) and design.get("settings", {}).get("data") == "shakespeare"


def _title(group: Sequence[tuple[str, str]]) -> str:
    return "".join(f"**{axis} {level}**. " for axis, level in group)


def _per_cell(record: Record, where: Sequence[Labels], read: Values, best: Callable[[Sequence[float]], float]) -> str:
    """One row per method, one column per cell; the best method of a column is bold."""
    names = [name for name in methods(record) if any(at(record, cell, name) for cell in where)]
    columns = [", ".join(f"{axis} {level}" for axis, level in tuple(cell.items())[-_ACROSS:]) for cell in where]
    tops = [best([mean(read(found)) for name in names if (found := at(record, cell, name))]) for cell in where]
    rows = [["method", *columns], ["---"] + ["---:"] * len(columns)]
    for name in names:
        pairs = zip(where, tops, strict=True)
        rows.append([TITLES.get(name, name), *(_cell(read(at(record, cell, name)), top) for cell, top in pairs)])
    return _lines(rows)


def _cell(values: Sequence[float], best: float) -> str:
    if not values:
        return ""
    return f"**{spread(values)}**" if mean(values) == best else spread(values)


def _perplexities(found: Sequence[Measurement]) -> list[float]:
    """Exponential of the loss after the last round, seed by seed."""
    return [exp(loss) for loss in losses(tuple(found))]


def _clients(record: Record, where: Sequence[Labels]) -> str:
    """Further rows: accuracy of the clients alone, and of their ensemble."""
    found = [at(record, cell, methods(record)[0]) for cell in where]
    return _lines(
        [[f"*{title}*", *(spread([read(each) for each in cell]) for cell in found)] for title, read in _ALONE.items()]
    )


_ALONE: Mapping[str, Callable[[Measurement], float]] = {
    "mean client": lambda each: mean(each.clients),
    "best client": lambda each: max(each.clients),
    "ensemble": lambda each: each.ensemble,
}


def _averages(record: Record, where: Sequence[Labels]) -> str:
    """Paired gain over the first method, and loss, calibration error and costs, of every method."""
    first, *_ = methods(record)
    rows = [
        [
            "method",
            f"gain over {TITLES.get(first, first)}",
            "loss",
            "calibration error",
            "server CPU s",
            "MB down",
            "MB up",
        ],
        ["---"] + ["---:"] * 6,
    ]
    for name in methods(record):
        found = [each for cell in where for each in at(record, cell, name)]
        if not found:
            continue
        rows.append(
            [
                TITLES.get(name, name),
                "" if name == first else _gain(record, where, name, first),
                _mean(losses(found), ".2f"),
                _mean(
                    [inf if not each.calibration_error else each.calibration_error[-1] or 0.0 for each in found], ".3f"
                ),
                _mean([each.server_seconds for each in found], ".1f"),
                _mean([each.down / 1e6 for each in found], ".2f"),
                _mean([each.up / 1e6 for each in found], ".2f"),
            ]
        )
    return _lines(rows)


def _gain(record: Record, where: Sequence[Labels], name: str, first: str) -> str:
    """Mean gain in accuracy with its interval: seeds are the sample, cells are averaged within a seed."""
    gains: dict[int, list[float]] = {}
    for cell in where:
        base = {each.seed: accuracies([each])[0] for each in at(record, cell, first)}
        for each in at(record, cell, name):
            if each.seed in base:
                gains.setdefault(each.seed, []).append(accuracies([each])[0] - base[each.seed])
    means = [mean(each) for each in gains.values()]
    return f"{mean(means):+.3f}{margin(means)}" if means else ""


def _mean(values: Sequence[float], form: str) -> str:
    return format(mean(values), form) if all(map(isfinite, values)) else "–"


def _lines(rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)
