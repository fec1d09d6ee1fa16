"""An experiment as Markdown, from its record alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from math import isfinite
from statistics import mean

from simulations import method_tables
from simulations.ledger import Measurement, Record
from simulations.settings import TITLES
from simulations.verdict import Pair, accuracies, at, cells, compare, losses, margin, methods, one_round, spread

_SUMMARY = ("fedavg", "c2m3+default", "c2m3+judged", "feddf")  # methods of the README's table
_AROUND = "c2m3-"  # before a strategy's name: the default around that strategy
_PAIRED = "paired: mean over seeds ± its 95 % interval (least of all seeds):"


def markdown(record: Record) -> str:
    """Accuracy and loss of every method on every cell, the acceptance rule, and the source of the numbers.

    Where methods run on some cells only, tables of their own follow; where C2M3 runs around strategies of the record,
    its gain over each of these. An experiment of one round has the tables of `method_tables`.
    """
    if one_round(record):
        return f"{_caption(record)}\n\n{method_tables.markdown(record)}\n"
    everywhere, somewhere = _split(record)
    baseline, around = _named(record, "baseline"), _around(record)
    others = [name for name in everywhere if name != baseline]
    parts = [
        _caption(record),
        "Accuracy after the last round:",
        _table(record, everywhere, _accuracy),
        f"{_title(record, 'judged')} against {_title(record, 'baseline')}, paired over seeds:",
        _rule(record),
    ]
    if others:
        parts += [
            f"Gain over {_title(record, 'baseline')}, {_PAIRED}",
            _table(record, others, _gains(record, lambda _method: baseline)),
        ]
    parts += [
        "Loss after the last round:",
        _table(record, everywhere, _loss),
        "The last round's clients:",
        _table(record, [baseline], _clients),
    ]
    if somewhere:
        parts += [
            "Strategies that run on some cells only, accuracy:",
            _table(record, somewhere, _accuracy),
            f"Their gain over {_title(record, 'baseline')}, {_PAIRED}",
            _table(record, somewhere, _gains(record, lambda _method: baseline)),
        ]
    if around:
        parts += [
            f"Gain of C2M3 over the strategy that it wraps, {_PAIRED}",
            _table(record, list(around), _gains(record, around.__getitem__)),
        ]
    return "\n\n".join(parts) + "\n"


def summary(record: Record) -> str:
    """Accuracy of the README's methods on every cell, and the source of the numbers."""
    names = [name for name in _SUMMARY if name in methods(record)]
    return f"{_caption(record)}\n\n{_table(record, names, _accuracy)}\n"


def page(text: str, name: str, table: str) -> str:
    """A page whose text between the marks of that name is replaced by the table; unchanged without the marks."""
    begin, end = f"<!-- results: {name} -->", f"<!-- end: {name} -->"
    if begin not in text or end not in text:
        return text
    head, rest = text.split(begin, 1)
    return f"{head}{begin}\n\n{table}\n{end}{rest.split(end, 1)[1]}"


def _split(record: Record) -> tuple[list[str], list[str]]:
    """Methods that ran on all cells, and the others."""
    everything, where = methods(record), cells(record)
    full = [name for name in everything if all(at(record, cell, name) for cell in where)]
    return full, [name for name in everything if name not in full]


def _around(record: Record) -> dict[str, str]:
    """By every method that is C2M3 around another one of the record, the name of that one."""
    names = methods(record)
    inner = {name: name.removeprefix(_AROUND) for name in names if name.startswith(_AROUND)}
    return {name: wrapped for name, wrapped in inner.items() if wrapped in names}


def _table(record: Record, names: Sequence[str], write: Callable[[tuple[Measurement, ...]], str]) -> str:
    where = [cell for cell in cells(record) if any(at(record, cell, name) for name in names)]
    axes = list(where[0])
    rows = [[*axes, *(TITLES.get(name, name) for name in names)], ["---"] * (len(axes) + len(names))]
    rows += [[*(cell[axis] for axis in axes), *(write(at(record, cell, name)) for name in names)] for cell in where]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _accuracy(found: tuple[Measurement, ...]) -> str:
    return spread(accuracies(found)) if found else ""


def _loss(found: tuple[Measurement, ...]) -> str:
    values = losses(found)
    return "" if not found else spread(values) if all(map(isfinite, values)) else "not finite"


def _clients(found: tuple[Measurement, ...]) -> str:
    if not found:
        return ""
    return (
        f"mean {mean(mean(each.clients) for each in found):.3f}, best {mean(max(each.clients) for each in found):.3f}, "
        f"ensemble {mean(each.ensemble for each in found):.3f}"
    )


def _gains(record: Record, reference: Callable[[str], str]) -> Callable[[tuple[Measurement, ...]], str]:
    """Writes the paired gain of measurements over the method that `reference` names for theirs."""

    def write(found: tuple[Measurement, ...]) -> str:
        pair = compare(record, found[0].cell, found[0].method, reference(found[0].method)) if found else None
        return "" if pair is None else f"{pair.mean:+.3f}{margin(pair.gains)} ({pair.least:+.3f})"

    return write


def _rule(record: Record) -> str:
    """The acceptance rule, cell by cell, and the number of cells on which it holds."""
    where = cells(record)
    axes = list(where[0])
    rows = [[*axes, "mean", "least", "loss ratio", "accepted"], ["---"] * (len(axes) + 4)]
    verdicts = []
    for cell in where:
        pair = compare(record, cell, _named(record, "judged"), _named(record, "baseline"))
        if pair is None:
            continue
        verdicts.append(pair)
        ratio = f"{pair.loss_ratio:.3f}" if isfinite(pair.loss_ratio) else "not finite"
        rows.append([*(cell[axis] for axis in axes), f"{pair.mean:+.3f}", f"{pair.least:+.3f}", ratio, _verdict(pair)])
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    accepted = sum(not pair.broken for pair in verdicts)
    return f"{table}\n\nThe rule (mean ≥ −.01, every seed ≥ −.03, loss ≤ 1.05) holds on {accepted} of {len(verdicts)}."


def _verdict(pair: Pair) -> str:
    return f"no: {', '.join(pair.broken)}" if pair.broken else "yes"


def _named(record: Record, key: str) -> str:
    design = record.about["design"]
    return str(design[key]) if isinstance(design, Mapping) else ""


def _title(record: Record, key: str) -> str:
    return TITLES.get(_named(record, key), _named(record, key))


def _caption(record: Record) -> str:
    seeds = sorted({each.seed for each in record.measurements})
    counts = Counter(len(at(record, cell, name)) for cell in cells(record) for name in methods(record))
    entries = counts.total() - counts[0]
    short = f" (all of them in {counts[len(seeds)]} of {entries} entries, a single one where there is no ±)"
    measured = record.about["measured"]
    date = str(measured["to"])[:10] if isinstance(measured, Mapping) else ""
    places = Counter(each.place or "2 cores" for each in record.measurements)
    shares = [place if len(places) == 1 else f"{place} ({count} measurements)" for place, count in places.items()]
    name, seconds = str(record.about["name"]), float(str(record.about["seconds"]))
    command = f"{name.removesuffix('-quick')} --quick" if name.endswith("-quick") else name
    return (
        f"{record.about['title']}. Seeds {', '.join(map(str, seeds))}{short if counts[len(seeds)] < entries else ''}; "
        f"{date}; {', '.join(shares)}; {seconds / 60:.0f} minutes of one core. `c2m3-fl experiment {command} --draw` "
        f"writes these tables from `simulations/results/{name}.json`."
    )
