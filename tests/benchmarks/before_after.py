"""Whole matches of two checkouts in turn, on the same nodes: what a change of the solver has saved.

    python -m tests.benchmarks.before_after ../older        table and c2m3_fl/core/results/before_after.json
    python -m tests.benchmarks.before_after --draw          the table of the record

Every checkout runs in processes of its own, which take turns; CPU seconds of one thread, import and nodes left out.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Any

from tests.benchmarks.records import read_record, revision, write_record

RECORD = Path("c2m3_fl/core/results/before_after.json")
CASES = {  # network, nodes, seeds, and how unlike the nodes are where that is not the default
    "MLP 784-256-256-10, 3 nodes": ("mlp(784, 256, 256, 10)", 3, 3),
    "MLP 784-256-256-10, 10 nodes": ("mlp(784, 256, 256, 10)", 10, 1),
    "MLP 784-512-512-512-10, 3 nodes": ("mlp(784, 512, 512, 512, 10)", 3, 2),
    "ResNet20 width 2, 3 nodes": ("resnet20(2)", 3, 3),
    "ResNet20 width 2, 5 nodes": ("resnet20(2)", 5, 1),
    "ResNet20 width 4, 3 nodes": ("resnet20(4)", 3, 1),
    "MLP 64-32-32-10, 20 nodes": ("mlp(64, 32, 32, 10)", 20, 2),
    "100 layers of 8 units, 3 nodes": ("mlp(8, *[8] * 100, 4)", 3, 1),
    "400 layers of 8 units, 3 nodes": ("mlp(8, *[8] * 400, 4)", 3, 1),
    "ResNet20 width 2, 5 nodes that drifted apart": ("resnet20(2)", 5, 1, 0.3),
    "MLP 784-256-256-10, 10 nodes that drifted apart": ("mlp(784, 256, 256, 10)", 10, 1, 0.3),
}
_ONE = """
import json, sys, time
import torch
torch.set_num_threads(1)
from c2m3_fl.core.match import match
from tests.benchmarks.networks import mlp, related_nodes, resnet20, vgg16
match(mlp(8, 6, 4), related_nodes(mlp(8, 6, 4), 2))
for name, (network, count, seeds, *noise) in json.loads(sys.argv[1]).items():
    for seed in range(seeds):
        spec = eval(network)
        nodes = related_nodes(spec, count, seed=seed, noise=[1.0, *noise][-1])
        start = time.process_time()
        found = match(spec, nodes)
        row = {"case": name, "seed": seed, "cpu": time.process_time() - start, "agreement": found.objectives[-1]}
        print(json.dumps(row), flush=True)
"""


def run(tree: Path, cases: Mapping[str, tuple[Any, ...]]) -> list[dict[str, Any]]:
    """Match all cases with the code of one checkout."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(tree.resolve())}
    command = [sys.executable, "-c", _ONE, json.dumps(cases)]
    done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"the checkout {tree} failed:\n{done.stderr}")
    return [json.loads(line) for line in done.stdout.splitlines()]


def measure(trees: dict[str, Path], cases: Mapping[str, tuple[Any, ...]], turns: int) -> list[dict[str, Any]]:
    """All rows of all checkouts, which take turns."""
    rows = []
    for turn in range(turns):
        for name, tree in trees.items():
            found = run(tree, cases)
            print(f"turn {turn + 1}, {name}: {sum(row['cpu'] for row in found):.1f} CPU seconds", flush=True)
            rows += [{"code": name, "turn": turn, **row} for row in found]
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown; seconds of a case are the sum over its seeds, and the agreement the mean of their ratios."""
    lines = [
        "| match | before, min / median / max | after | ratio | agreement |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for case in dict.fromkeys(row["case"] for row in rows):
        own = [row for row in rows if row["case"] == case]
        sums = {
            code: [
                sum(row["cpu"] for row in own if (row["code"], row["turn"]) == (code, turn))
                for turn in sorted({row["turn"] for row in own})
            ]
            for code in ("before", "after")
        }
        reached = {(row["code"], row["seed"]): row["agreement"] for row in own}
        seeds = sorted({row["seed"] for row in own})
        ratio = sum(reached["after", seed] / reached["before", seed] for seed in seeds) / len(seeds)
        before, after = (" / ".join(f"{f(sums[code]):.2f}" for f in (min, median, max)) for code in ("before", "after"))
        label = case if len(seeds) == 1 else f"{case} ({len(seeds)} seeds)"
        lines.append(f"| {label} | {before} | {after} | {min(sums['after']) / min(sums['before']):.2f} | {ratio:.5f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path, nargs="?", help="an older checkout")
    parser.add_argument("--draw", action="store_true")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--cases", nargs="*", default=list(CASES), choices=list(CASES))
    parser.add_argument("--output", type=Path, default=RECORD)
    options = parser.parse_args()
    if not options.draw:
        if options.before is None:
            parser.error("expected the folder of an older checkout, or --draw")
        cases = {name: CASES[name] for name in options.cases}
        rows = measure({"before": options.before, "after": Path()}, cases, options.turns)
        configuration = {"cases": cases, "turns": options.turns, "before": revision(options.before)}
        write_record(options.output, "python -m tests.benchmarks.before_after OLDER", configuration, rows)
    print(table(read_record(options.output)["rows"]))


if __name__ == "__main__":
    main()
