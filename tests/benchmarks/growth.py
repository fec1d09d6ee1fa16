"""How the solver's time grows with nodes, width and depth.

    python -m tests.benchmarks.growth            writes c2m3_fl/core/results/growth.json and .gallery/solver-growth.png
    python -m tests.benchmarks.growth --draw     measures nothing

CPU seconds of one thread: of a pass, which moves every node once, the least of three, and of a whole match. Nodes are
one random network plus as much noise, each in an order of its own.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from math import log
from pathlib import Path

import torch

from c2m3_fl.core.match import match
from c2m3_fl.core.problem import Problem
from c2m3_fl.core.spec import PermutationSpec
from c2m3_fl.core.starts import start_point
from c2m3_fl.core.universe import Universe
from tests.benchmarks.networks import mlp, related_nodes, resnet20
from tests.benchmarks.records import read_record, write_record
from tests.benchmarks.solver import cpu, one_pass

_ROOT = Path(__file__).parents[2]
RECORD, PICTURE = _ROOT / "c2m3_fl" / "core" / "results" / "growth.json", _ROOT / ".gallery" / "solver-growth.png"


@dataclass(frozen=True)
class Series:
    """Networks that grow along one axis: by its values, the spec and the number of nodes."""

    title: str
    axis: str
    values: tuple[int, ...]
    build: Callable[[int], tuple[PermutationSpec, int]]


SERIES = (
    Series("MLP 64-32-32-10", "nodes", (3, 10, 30, 100, 300, 1000), lambda count: (mlp(64, 32, 32, 10), count)),
    Series("ResNet20", "nodes", (3, 10, 30, 100), lambda count: (resnet20(1), count)),
    Series("ResNet20, 3 nodes", "width", (1, 2, 4, 8), lambda width: (resnet20(width), 3)),
    Series("layers of 8 units, 3 nodes", "depth", (10, 30, 100, 300), lambda depth: (mlp(8, *[8] * depth, 4), 3)),
)


@dataclass(frozen=True)
class Row:
    """One point of a series; CPU seconds."""

    series: str
    axis: str
    value: int
    one_pass: float
    match: float


def measure(series: Series, value: int) -> Row:
    """A pass and a whole match of one size."""
    spec, count = series.build(value)
    nodes = related_nodes(spec, count)
    problem = Problem.of(spec, nodes, torch.full((count,), 1 / count, dtype=torch.float64))
    universe = Universe(problem, start_point(problem, "identity", None))
    passes = [one_pass(universe)[0] for _ in range(3)]
    del problem, universe
    return Row(series.title, series.axis, value, min(passes), cpu(lambda: match(spec, nodes)))


def exponent(rows: Sequence[Row]) -> float:
    """The power of the size with which a whole match grows, between a series' last two points."""
    before, last = rows[-2:]
    return log(last.match / before.match) / log(last.value / before.value)


def table(rows: Sequence[Row]) -> str:
    """One row per point."""
    lines = ["| networks | axis | | a pass, s | whole match, s |", "| --- | --- | ---: | ---: | ---: |"]
    lines += [f"| {row.series} | {row.axis} | {row.value:,} | {row.one_pass:.3f} | {row.match:.2f} |" for row in rows]
    return "\n".join(lines) + "\n"


def draw(rows: Sequence[Row]) -> None:
    """A panel per axis, both scales logarithmic: whole matches, passes dashed, and a line of slope one."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    axes = tuple(dict.fromkeys(series.axis for series in SERIES))
    figure, panels = plt.subplots(1, len(axes), figsize=(10, 3.6), layout="constrained")
    for panel, axis in zip(panels, axes, strict=True):
        for series, colour in zip([each for each in SERIES if each.axis == axis], ("#0072B2", "#D55E00"), strict=False):
            found = [row for row in rows if row.series == series.title]
            x = [row.value for row in found]
            panel.loglog(x, [row.match for row in found], "o-", color=colour, label=series.title)
            panel.loglog(x, [row.one_pass for row in found], "o--", color=colour, alpha=0.5)
            panel.loglog(x, [found[0].match * value / x[0] for value in x], ":", color="grey")
        ticks = sorted({value for series in SERIES if series.axis == axis for value in series.values})
        panel.set(xlabel=axis, title=f"growth in {axis}")
        panel.set_xticks(ticks, [f"{value:,}" for value in ticks])
        panel.xaxis.minorticks_off()
        panel.yaxis.set_major_formatter("{x:g}")
        panel.yaxis.set_minor_formatter("")
        panel.spines[["top", "right"]].set_visible(False)
        panel.legend(frameon=False, fontsize=8)
    panels[0].set_ylabel("CPU seconds")
    figure.suptitle("Whole matches (solid), one pass (dashed), linear growth (dotted)", fontsize=9)
    figure.savefig(PICTURE, dpi=130)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draw", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.draw:
        rows = [Row(**each) for each in read_record(RECORD)["rows"]]
    else:
        rows = []
        for series in SERIES:
            for value in series.values:
                rows.append(measure(series, value))
                print(rows[-1], flush=True)
        write_record(RECORD, "python -m tests.benchmarks.growth", {"threads": 1}, [asdict(each) for each in rows])
    draw(rows)
    print(table(rows))
    for series in SERIES:
        power = exponent([row for row in rows if row.series == series.title])
        print(f"{series.title}: a whole match grows with the power {power:.2f} of {series.axis} at the end")


if __name__ == "__main__":
    main()
