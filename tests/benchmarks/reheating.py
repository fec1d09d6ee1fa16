"""What every reheating gains and costs, for networks of many sizes and for 4 to 20 nodes.

    python -m tests.benchmarks.reheating                what it gained, and the record that c2m3_fl/core/README.md cites

Why `c2m3_fl.core.search.BUDGET` is what it is. Gains are shares of the agreement that the first ascent reached, works
are shares of the first ascent's counted work; every reheating starts from the best end so far.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from statistics import fmean, median

import torch

from c2m3_fl.core.assignment import assignment_pool
from c2m3_fl.core.problem import Problem
from c2m3_fl.core.result import Limits
from c2m3_fl.core.search import PASSES, WARMTHS, ascend
from c2m3_fl.core.spec import PermutationSpec
from c2m3_fl.core.starts import begin, soften
from tests.benchmarks.networks import mlp, related_nodes, resnet20
from tests.benchmarks.records import write_record

RECORD = Path("c2m3_fl/core/results/reheating.json")
CASES = {
    "MLP 64-48-40-10": (mlp(64, 48, 40, 10), (4, 5, 6, 8, 10, 16, 20), 3),
    "MLP 784-256-256-10": (mlp(784, 256, 256, 10), (4, 5, 6, 8, 10), 1),
    "ResNet20": (resnet20(1), (4, 5, 6, 8, 10, 16, 20), 3),
}


def measure(spec: PermutationSpec, count: int, seed: int) -> list[tuple[float, float]]:
    """Per reheating its gain and its work."""
    nodes, weights = related_nodes(spec, count, seed=seed), torch.full((count,), 1 / count, dtype=torch.float64)
    rows = []
    with torch.no_grad(), assignment_pool() as pool:
        problem = Problem.of(spec, nodes, weights)
        first = best = ascend(problem, begin(problem, "auto", None, pool)[0], pool, Limits(100, 1e-4, polish=True))
        for warmth in WARMTHS:
            point = soften(problem, best.permutations, warmth)
            again = ascend(problem, point, pool, Limits(PASSES, 1e-4, polish=True))
            gain = (again.objectives[-1] - best.objectives[-1]) / first.objectives[-1]
            rows.append((gain, again.work / first.work))
            best = again if gain > 0 else best
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for name, (spec, counts, seeds) in CASES.items():
        for count in counts:
            for seed in range(seeds):
                found = measure(spec, count, seed)
                rows.append({"network": name, "nodes": count, "seed": seed, "reheatings": found})
                print(name, count, seed, " ".join(f"{gain:+.3%} for {work:.2f}" for gain, work in found), flush=True)
    for number, warmth in enumerate(WARMTHS):
        gains, works = zip(*(row["reheatings"][number] for row in rows), strict=True)
        print(
            f"reheating {number + 1}, warmth {warmth}: gained in {sum(gain > 0 for gain in gains)} of {len(gains)}, "
            f"{fmean(max(gain, 0.0) for gain in gains):.3%} on average, for {median(works):.2f} of the work (median)"
        )
    write_record(RECORD, "python -m tests.benchmarks.reheating", {"warmths": WARMTHS}, rows)


if __name__ == "__main__":
    main()
