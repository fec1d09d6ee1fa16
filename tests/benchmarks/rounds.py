"""What a round costs in which nothing moves, and matches of many nodes.

python -m tests.benchmarks.rounds --identity        against Flower's own aggregation
python -m tests.benchmarks.rounds --many 100        ResNet20: whole against batches, objective and CPU seconds
python -m tests.benchmarks.rounds --many 1000 --network mlp
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch
from flwr.app import ArrayRecord, MetricRecord, RecordDict
from flwr.serverapp.strategy.strategy_utils import aggregate_arrayrecords

from c2m3_fl.core.joining import PASSES, match_in_batches
from c2m3_fl.core.match import match
from tests.benchmarks.networks import mlp, related_nodes, resnet20, resnet50, vgg16

T = TypeVar("T")


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
        ("mlp", mlp(784, 256, 256, 10), count),
        ("resnet20", resnet20(1), count),
        ("vgg16", vgg16(), count),
        ("resnet50", resnet50(), 3),
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
        rows.append({"case": name, "ratio": own / flower, "match": own, "fedavg": flower, "gap": found.gap})
        print(rows[-1], flush=True)
    return rows


def many(network: str, count: int, batch: int) -> list[dict[str, float]]:
    """Objective, CPU seconds and wall seconds of one whole match and of batches."""
    spec = resnet20(1) if network == "resnet20" else mlp(64, 32, 32, 10)
    nodes = related_nodes(spec, count)
    rows: list[dict[str, float]] = []
    for size, passes in ((count, 1), (batch, 1), (batch, 2), (batch, PASSES)):
        start, wall = time.process_time(), time.perf_counter()
        if size == count:
            objective = match(spec, nodes).objectives[-1]
        else:
            objective = match_in_batches(spec, nodes, batch=size, passes=passes).objective
        row = {"batch": size, "passes": passes, "cpu": time.process_time() - start, "wall": time.perf_counter() - wall}
        rows.append({**row, "objective": objective, "share": objective / rows[0]["objective"] if rows else 1.0})
        print(rows[-1], flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--identity", action="store_true")
    parser.add_argument("--many", type=int, metavar="NODES")
    parser.add_argument("--batch", type=int, default=10)
    parser.add_argument("--network", default="resnet20", choices=("resnet20", "mlp"))
    parser.add_argument("--out", type=Path, default=Path("results"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.out.mkdir(parents=True, exist_ok=True)
    found: dict[str, object] = {}
    if options.identity:
        found["identity"] = identity_rounds()
    if options.many:
        found[f"many-{options.network}-{options.many}"] = many(options.network, options.many, options.batch)
    for name, value in found.items():
        (options.out / f"solver-{name}.json").write_text(json.dumps(value, indent=2))


if __name__ == "__main__":
    main()
