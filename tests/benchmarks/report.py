"""The solver and the round on one page: what was aimed at, and every table of the benchmarks that measured it.

    python -m tests.benchmarks.report [--out FOLDER]

reads the records that `make bench-solver` writes and puts them into one JSON file, ``bench.json``, and all their tables
on one page, ``bench.md``; the table of aims goes into tests/README.md, too. Measures nothing.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median
from typing import Any

from simulations.grid_tables import page
from tests.benchmarks import before_after, gpu, growth, quality, rounds, server_costs, solver, still_rounds
from tests.benchmarks.records import read_record

PAGE = Path("tests/README.md")
_FASTER = 100.0, 300.0  # than the published algorithm, with 3 and with 10 nodes
_THOUSAND = 1000  # clients of the case that is there for its memory

Rows = Any  # as each benchmark writes them
Found = Mapping[str, Rows]


@dataclass(frozen=True)
class Part:
    """A benchmark's record and how it is shown."""

    title: str
    record: Path
    table: Callable[[Rows], str]


PARTS = {
    "solver": Part("Beside the published algorithm and an older checkout", solver.RECORD, solver.table),
    "before_after": Part(
        "Whole matches before and after, and where the time goes",
        before_after.RECORD,
        before_after.tables,
    ),
    "growth": Part(
        "Growth in nodes, width and depth",
        growth.RECORD,
        lambda rows: growth.table([growth.Row(**row) for row in rows]) + f"\n![growth]({growth.PICTURE})\n",
    ),
    "rounds": Part("Many nodes in batches; the proof where nothing moves", rounds.RECORD, rounds.table),
    "quality": Part("Agreement and accuracy of trained families", quality.RECORD, quality.table),
    "still_rounds": Part(
        "After the last reply, where nothing moves: seconds and memory", still_rounds.RECORD, still_rounds.table
    ),
    "server_costs": Part(
        "A round's seconds and memory next to FedAvg's",
        server_costs.RECORD,
        lambda rows: server_costs.table([server_costs.Row(**row) for row in rows]),
    ),
    "gpu": Part("On a GPU", gpu.RECORD, gpu.table),
}


def aims(found: Found) -> str:
    """Markdown: aims and what was measured.

    Parameters
    ----------
    found : mapping of str to rows
        The rows of each of `PARTS`.
    """
    lines = ["| aim | measured | |", "| --- | --- | --- |"]
    for text, measured, reached in (*_of_matches(found), *_of_rounds(found)):
        lines.append(f"| {text} | {measured} | {'reached' if reached else '**missed**'} |")
    return "\n".join(lines) + "\n"


def _of_matches(found: Found) -> list[tuple[str, str, bool]]:
    rows, lines = found["solver"], []
    for nodes, wanted in zip((3, 10), _FASTER, strict=True):
        faster = [r["published_match"] / median(r["now"]) for r in rows if solver.CASES[r["case"]].nodes == nodes]
        title = f"{wanted:.0f} times as fast as the published algorithm, {nodes} nodes"
        lines.append((title, f"{min(faster):.0f} to {max(faster):.0f} times", min(faster) >= wanted))
    shares = [min(row["now"]) / min(row["before"]) for row in rows if row["before"]]
    shares += list(before_after.ratios(found["before_after"]).values())
    lines.append(
        ("no match slower than before", f"{min(shares):.2f} to {max(shares):.2f} of the time", max(shares) <= 1)
    )
    kept = [row["objective"] / row["objective_before"] for row in rows if row["before"]]
    lines.append(
        (
            "the agreement of before",
            f"{min(kept):.5f} to {max(kept):.5f} of it",
            fmean(kept) >= 1 and min(kept) > 0.9999,
        )
    )
    above = [row["objective"] / row["published_objective"] for row in rows]
    lines.append(
        ("above the published agreement, random nodes", f"{min(above):.4f} to {max(above):.4f} of it", min(above) > 1)
    )
    families = [fmean(one[0] for one in family["C2M3 (default)"]) for family in found["quality"].values()]
    measured = f"{min(families):.4f} to {max(families):.4f} of it, mean over sets"
    lines.append((f"above the published agreement, {len(families)} trained families", measured, min(families) > 1))
    lost = {name: [1 - row["share"] for row in found["rounds"][name][2:]] for name in rounds.MANY}
    measured = "; ".join(
        f"{rounds.MANY[name][0]} {100 * two:.1f} → {100 * more:.1f} %" for name, (two, more) in lost.items()
    )
    halved = all(more <= two / 2 for two, more in lost.values())
    lines.append(("agreement lost in batches halved by more passes", measured, halved))
    clocks = {row["case"]: row["device"]["seconds"] for row in found["gpu"]}
    for title, case, limit in (("11 ResNet20×4", "resnet20x4-11", 2.0), ("five VGG16", "vgg16-5", 5.0)):
        measured = f"{clocks[case]:.1f} s (NVIDIA H200; not run again since)"
        lines.append((f"{title} in {limit:.0f} s on a GPU", measured, clocks[case] <= limit))
    return lines


def _of_rounds(found: Found) -> list[tuple[str, str, bool]]:
    (ten,) = (
        row
        for row in found["server_costs"]
        if (row["network"], row["clients"], row["case"]) == ("resnet18", 10, "all units move")
    )
    lines = [("ten ResNet18 that all move in 15 CPU s", f"{ten['c2m3']:.1f}", ten["c2m3"] <= 15)]
    still: list[float] = []
    memories: list[float] = []
    for (_, clients, _), own in still_rounds.by_case(found["still_rounds"]).items():
        if clients == _THOUSAND:
            memories.append(still_rounds.memory(own, "now") / own[0]["size"])
        else:
            still.append(median(still_rounds.ratios(own, "now")))
    measured = f"{min(still):.1f} to {max(still):.1f} times"
    lines.append(
        ("still rounds at most 1.2 times FedAvg's aggregation after the last reply", measured, max(still) <= 1.2)
    )
    lines += [
        ("1,000 still ResNet20 in four models beside the replies", f"{memory:.0f} models", memory <= 4)
        for memory in memories
    ]
    return lines


def whole(records: Mapping[str, Mapping[str, Any]]) -> str:
    """The page: aims, and per benchmark its command, date and tables."""
    parts = ["# The solver and the round, measured", aims({name: record["rows"] for name, record in records.items()})]
    for name, record in records.items():
        parts += [f"## {PARTS[name].title}", f"`{record['command']}`, {record['date']}."]
        parts.append(PARTS[name].table(record["rows"]).strip())
    return "\n\n".join(part.strip() for part in parts) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("results"), help="folder of bench.json and bench.md")
    options = parser.parse_args()
    records = {name: read_record(part.record) for name, part in PARTS.items()}
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "bench.json").write_text(json.dumps(records, indent=1) + "\n", encoding="utf-8")
    (options.out / "bench.md").write_text(whole(records), encoding="utf-8")
    text = aims({name: record["rows"] for name, record in records.items()})
    print(text)
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8"), "aims", text), encoding="utf-8")


if __name__ == "__main__":
    main()
