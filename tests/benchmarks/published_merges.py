"""Rows of `merging_table`: the published setting, every method on two to all networks."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from c2m3_fl.core.spec import PermutationSpec
from c2m3_fl.merging.align.base import Alignment, Method, Nodes
from c2m3_fl.merging.align.methods import METHODS, CycleConsistent, MergeMany
from c2m3_fl.merging.merge import merge
from c2m3_fl.merging.recalibrate.refit import Refit
from c2m3_fl.merging.recalibrate.short_names import Recalibration
from tests.benchmarks.merging_cases import Case, Trained, accuracy
from tests.benchmarks.merging_rows import Row

_ORDERS = 3  # random orders that MergeMany is averaged over
_COUNTS = (2, 3, 5)  # numbers of networks of the published setting, beside all there are
_PUBLISHED: dict[str, tuple[Recalibration | str, Sequence[str]]] = {  # all methods for all networks with REPAIR, and
    "REPAIR": ("repair", ("mergemany", "c2m3", "cca")),  # these for fewer
    "batchnorm": ("batchnorm", ("mergemany", "c2m3", "cca")),
    "refit": (Refit(scores=True), ("c2m3", "cca")),
}


@dataclass
class Once:
    """A method that remembers its alignment, for several recalibrations of the same nodes."""

    method: Method
    found: Alignment | None = None

    def __call__(self, nodes: Nodes) -> Alignment:
        """The alignment of the first call."""
        if self.found is None:
            self.found = self.method(nodes)
        return self.found


def published_rows(case: Case, seed: int, found: Trained, spec: PermutationSpec) -> Iterator[Row]:
    """Every method with REPAIR, for all nodes and for the first few; notes say the share of the nodes' accuracy.

    Some of them, for all nodes, with BatchNorm re-estimated and with refit, too.
    MergeMany is the mean over random orders.
    """
    for count in sorted({*(count for count in _COUNTS if count < len(found.nodes)), len(found.nodes)}):
        part = replace(found, nodes=found.nodes[:count], weights=found.weights[:count])
        mean = statistics.mean(accuracy(found.model, node, found.test) for node in part.nodes)
        yield Row(case.title, seed, f"{count} nodes: mean node", mean, 0.0)
        everything = count == len(found.nodes)
        known = {**METHODS, "c2m3 from activations": CycleConsistent(start="activations")}
        for name in known if everything else _PUBLISHED["REPAIR"][1]:
            orders = [MergeMany(order) for order in range(_ORDERS)] if name == "mergemany" else [known[name]]
            methods = [Once(order) for order in orders]
            for column, (recalibrate, wanted) in _PUBLISHED.items():
                if column == "REPAIR" or (everything and name in wanted):
                    yield _published_row(case, seed, part, spec, mean, f"{name} + {column}", methods, recalibrate)


def _published_row(
    case: Case,
    seed: int,
    found: Trained,
    spec: PermutationSpec,
    mean: float,
    column: str,
    methods: Sequence[Method],
    recalibrate: Recalibration | str,
) -> Row:
    options: Any = {"spec": spec, "weights": found.weights, "calibration": found.calibration}
    runs = [merge(found.model, found.nodes, method=each, recalibrate=recalibrate, **options) for each in methods]
    scores = [accuracy(found.model, each.state_dict, found.test) for each in runs]
    score, seconds = statistics.mean(scores), statistics.mean(each.report.seconds for each in runs)
    note = f"{score / mean:.3f} of the nodes' mean"
    if len(scores) > 1:
        note += f"; {len(scores)} random orders: {', '.join(f'{each:.3f}' for each in scores)}"
    return Row(case.title, seed, f"{len(found.nodes)} nodes: {column}", score, seconds, note)


def published_tables(rows: Sequence[Row]) -> str:
    """Markdown: per number of nodes a row per method and recalibration and a column per case.

    Accuracy in percent, mean ± standard deviation over seeds, and its share of the mean node's.
    """
    counts = sorted({int(row.column.split()[0]) for row in rows}, reverse=True)
    return "\n\n".join(_table([row for row in rows if row.column.startswith(f"{count} nodes: ")]) for count in counts)


def _table(rows: Sequence[Row]) -> str:
    cases = list(dict.fromkeys(row.case for row in rows))
    columns = list(dict.fromkeys(row.column for row in rows))
    count, _, first = columns[0].partition(": ")
    means = {case: _mean(rows, case, columns[0]) for case in cases}
    lines = [f"| {count} | {' | '.join(cases)} |", "| --- |" + " ---: |" * len(cases)]
    for column in columns:
        found = [[100 * row.accuracy for row in rows if (row.case, row.column) == (case, column)] for case in cases]
        cells = [
            f"{statistics.mean(values):.1f}{_spread(values)}"
            + ("" if column.endswith(first) else f" ({_mean(rows, case, column) / means[case]:.2f})")
            if values
            else ""
            for case, values in zip(cases, found, strict=True)
        ]
        lines.append(f"| {column.partition(': ')[2]} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _mean(rows: Sequence[Row], case: str, column: str) -> float:
    return statistics.mean(row.accuracy for row in rows if (row.case, row.column) == (case, column))


def _spread(values: Sequence[float]) -> str:
    return f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
