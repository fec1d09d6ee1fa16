"""Matches of many nodes, whole and in batches, and the proof of a match in which nothing moves.

    python -m tests.benchmarks.rounds [CASE ...]     record and table in c2m3_fl/core/README.md; other cases stay
    python -m tests.benchmarks.rounds --draw         the table of the record

`identity` compares the proof with Flower's own aggregation of the same replies; the other cases compare the agreement
and CPU seconds of one thread of a whole match with those of batches.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from flwr.app import ArrayRecord, MetricRecord, RecordDict
from flwr.serverapp.strategy.strategy_utils import aggregate_arrayrecords

from c2m3_fl.core.joining import PASSES, match_in_batches
from c2m3_fl.core.match import match
from c2m3_fl.core.spec import PermutationSpec
from simulations.grid_tables import page
from simulations.settings import check_choice
from tests.benchmarks.networks import mlp, related_nodes, resnet20, resnet50, vgg16
from tests.benchmarks.records import read_record, write_record

T = TypeVar("T")

_FOLDER = Path("c2m3_fl/core")
RECORD, PAGE = _FOLDER / "results" / "rounds.json", _FOLDER / "README.md"
MANY = {
    "resnet20-100": ("100 ResNet20", resnet20(1), 100),
    "mlp-1000": ("1,000 MLP 64-32-32-10", mlp(64, 32, 32, 10), 1000),
}
CASES = ("identity", *MANY)
_BATCH = 10
_WAYS = ("one pass", "every node once more", f"{PASSES - 1} times more")


def seconds(action: Callable[[], T], repeats: int = 3) -> tuple[float, T]:
    """Least CPU seconds of an action, and its result."""
    times = []
    for _ in range(repeats):
        start = time.process_time()
        result = action()
        times.append(time.process_time() - start)
    return min(times), result


def identity_rounds(count: int = 10) -> list[dict[str, float | str]]:
    """CPU seconds of a match that proves the identity, relative to Flower's weighted average of the same replies."""
    rows: list[dict[str, float | str]] = []
    for name, spec, nodes_of in (
        ("MLP 784-256-256-10", mlp(784, 256, 256, 10), count),
        ("ResNet20", resnet20(1), count),
        ("VGG16", vgg16(), count),
        ("ResNet50", resnet50(), 3),
    ):
        base = related_nodes(spec, 1)[0]
        generator = torch.Generator().manual_seed(0)
        nodes = [
            {k: v + 0.1 * v.std(correction=0) * torch.randn(v.shape, generator=generator) for k, v in base.items()}
            for _ in range(nodes_of)
        ]
        replies = [RecordDict({"a": ArrayRecord(node), "m": MetricRecord({"n": 1.0})}) for node in nodes]
        own, found = seconds(lambda s=spec, n=nodes: match(s, n))
        flower, _ = seconds(lambda r=replies: aggregate_arrayrecords(r, "n"))
        row = {"case": name, "nodes": nodes_of, "ratio": own / flower, "match": own, "fedavg": flower, "gap": found.gap}
        rows.append(row)
        print(rows[-1], flush=True)
    return rows


def many(spec: PermutationSpec, count: int, batch: int) -> list[dict[str, float]]:
    """Agreement and CPU seconds of one whole match and of batches."""
    nodes = related_nodes(spec, count)
    rows: list[dict[str, float]] = []
    for size, passes in ((count, 1), (batch, 1), (batch, 2), (batch, PASSES)):
        start = time.process_time()
        if size == count:
            agreement = match(spec, nodes).objectives[-1]
        else:
            agreement = match_in_batches(spec, nodes, batch=size, passes=passes).objective
        seconds_taken = time.process_time() - start
        share = agreement / rows[0]["agreement"] if rows else 1.0
        rows.append({"batch": size, "passes": passes, "cpu": seconds_taken, "agreement": agreement, "share": share})
        print(rows[-1], flush=True)
    return rows


def table(found: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """Markdown: many nodes, then the proof."""
    lines = ["| match | whole, s |" + "".join(f" batches of ten, {name}, s |" for name in _WAYS)]
    lines += ["| --- |" + " ---: |" * (1 + len(_WAYS))]
    for name, (title, _, _) in MANY.items():
        whole, *batches = found[name]
        cells = [f"{row['cpu']:.1f} (−{100 * (1 - row['share']):.1f} %)" for row in batches]
        lines.append(f"| {title} | {whole['cpu']:.1f} | {' | '.join(cells)} |")
    lines += ["", "| nothing moves | nodes | proof, ms | of Flower's aggregation |", "| --- | ---: | ---: | ---: |"]
    for row in found["identity"]:
        lines.append(f"| {row['case']} | {row['nodes']} | {1000 * row['match']:.0f} | {row['ratio']:.1f} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", default=list(CASES), metavar="CASE", help=", ".join(CASES))
    parser.add_argument("--draw", action="store_true")
    options = parser.parse_args()
    for name in options.cases:
        check_choice("case", name, CASES)
    torch.set_num_threads(1)
    found = read_record(RECORD)["rows"] if RECORD.exists() else {}
    for name in () if options.draw else options.cases:
        if name == "identity":
            found[name] = identity_rounds()
        else:
            _, spec, count = MANY[name]
            found[name] = many(spec, count, _BATCH)
        write_record(RECORD, "python -m tests.benchmarks.rounds", {"batch": _BATCH, "threads": 1}, found)
    text = table(found)
    print(text)
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8"), "rounds", text), encoding="utf-8")


if __name__ == "__main__":
    main()
