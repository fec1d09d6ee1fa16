"""What a round costs in which nothing moves, and matches of many nodes.

python -m tests.benchmarks.rounds --identity        against Flower's own aggregation
python -m tests.benchmarks.rounds --many 100        whole against batches, objective and CPU seconds
python -m tests.benchmarks.rounds --seeds 5         objective against MergeMany and pairwise matching
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from statistics import mean
from typing import TypeVar

import torch
from flwr.app import ArrayRecord, MetricRecord, RecordDict
from flwr.serverapp.strategy.strategy_utils import aggregate_arrayrecords

from c2m3_fl.core import permutation
from c2m3_fl.core.frank_wolfe import match
from c2m3_fl.core.joining import match_in_batches
from c2m3_fl.core.pairwise import merge_many, pairwise_matching
from c2m3_fl.core.permutation import Permutation
from c2m3_fl.core.running import RunningUniverse
from c2m3_fl.core.spec import PermutationSpec
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


def many(count: int, batch: int) -> list[dict[str, float]]:
    """Objective and CPU seconds of one whole match and of batches."""
    spec = resnet20(1)
    nodes = related_nodes(spec, count)
    rows = []
    start = time.process_time()
    whole = match(spec, nodes)
    rows.append(
        {"batch": count, "passes": 1, "seconds": time.process_time() - start, "objective": whole.objectives[-1]}
    )
    for passes in (1, 2):
        start = time.process_time()
        found = match_in_batches(spec, nodes, batch=batch, passes=passes)
        spent = time.process_time() - start
        rows.append({"batch": batch, "passes": passes, "seconds": spent, "objective": found.objective})
    for row in rows:
        row["share"] = row["objective"] / rows[0]["objective"]
        print(row, flush=True)
    return rows


def agreement(spec: PermutationSpec, nodes: list[dict[str, torch.Tensor]], perms: tuple[Permutation, ...]) -> float:
    """The objective of any permutations."""
    total = RunningUniverse(spec)
    for node, perm in zip(nodes, perms, strict=True):
        total.add(node, perm, 1 / len(nodes))
    return total.agreement(nodes, [1 / len(nodes)] * len(nodes))


def against_baselines(seeds: int, count: int = 5) -> dict[str, list[float]]:
    """Objectives of the baselines and of other starts, relative to the default's, per seed."""
    spec = resnet20(1)
    result: dict[str, list[float]] = {}
    for seed in range(seeds):
        nodes = related_nodes(spec, count, seed=seed)
        default = match(spec, nodes).objectives[-1]
        values = {
            "barycentre": match(spec, nodes, start="barycentre").objectives[-1],
            "frank-wolfe alone": match(spec, nodes, polish=False).objectives[-1],
            "merge many": agreement(spec, nodes, merge_many(spec, nodes)),
            "pairwise": agreement(spec, nodes, pairwise_matching(spec, nodes)),
            "unmatched": agreement(spec, nodes, (permutation.identity(spec),) * count),
        }
        for name, value in values.items():
            result.setdefault(name, []).append(value / default)
    for name, shares in result.items():
        print(f"{name:18s} {min(shares):.4f} {mean(shares):.4f} {max(shares):.4f}", flush=True)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--identity", action="store_true")
    parser.add_argument("--many", type=int, metavar="NODES")
    parser.add_argument("--batch", type=int, default=10)
    parser.add_argument("--seeds", type=int)
    parser.add_argument("--out", type=Path, default=Path("results"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.out.mkdir(parents=True, exist_ok=True)
    found: dict[str, object] = {}
    if options.identity:
        found["identity"] = identity_rounds()
    if options.many:
        found["many"] = many(options.many, options.batch)
    if options.seeds:
        found["seeds"] = against_baselines(options.seeds)
    for name, value in found.items():
        (options.out / f"solver-{name}.json").write_text(json.dumps(value, indent=2))


if __name__ == "__main__":
    main()
