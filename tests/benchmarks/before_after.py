"""Whole matches of two checkouts in turn, on the same nodes: what a change of the solver has saved.

    python -m tests.benchmarks.before_after ../older     record, and tables in c2m3_fl/core/README.md
    python -m tests.benchmarks.before_after --draw       the tables of the record

Every checkout runs in processes of its own, which take turns; CPU seconds of one thread, import and nodes left out. In
the first turn each case is matched once more for the profile: seconds of each part, without the parts inside it.
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

from simulations.grid_tables import page
from tests.benchmarks.records import read_record, revision, write_record

_FOLDER = Path("c2m3_fl/core")
RECORD, PAGE = _FOLDER / "results" / "before_after.json", _FOLDER / "README.md"
PARTS = ("assignments", "gradients", "steps", "start and proof", "rest")
CASES = {  # network, nodes, seeds, and how unlike the nodes are where that is not the default
    "MLP 784-256-256-10, 3 nodes": ("mlp(784, 256, 256, 10)", 3, 3),
    "MLP 784-256-256-10, 10 nodes": ("mlp(784, 256, 256, 10)", 10, 1),
    "MLP 784-512-512-512-10, 3 nodes": ("mlp(784, 512, 512, 512, 10)", 3, 2),
    "MLP 30000-64-128-2, 3 nodes": ("mlp(30000, 64, 128, 2)", 3, 1),
    "MLP 30000-64-128-2, 10 nodes": ("mlp(30000, 64, 128, 2)", 10, 1),
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
import contextlib, importlib, json, sys, time
from collections import defaultdict
from unittest import mock
import torch
torch.set_num_threads(1)
from c2m3_fl.core.match import match
from tests.benchmarks.networks import mlp, related_nodes, resnet20, vgg16

PARTS = {
    "assignments": ["frank_wolfe.oracle", "block_ascent.oracle", "search.oracle", "profiles.oracle"],
    "gradients": ["universe.Universe.gradient", "block_ascent.BlockAscent._gains"],
    "steps": ["universe.Universe.course", "universe.Universe.advance", "block_ascent.BlockAscent._accept"],
    "start and proof": ["match.prove_identity", "problem.Problem.of", "search.begin", "match.begin"],
}

def profiled(spec, nodes):
    spent, inside = defaultdict(float), []
    def timed(part, call):
        def run(*args, **options):
            start = time.process_time()
            inside.append(0.0)
            try:
                return call(*args, **options)
            finally:
                seconds = time.process_time() - start
                spent[part] += seconds - inside.pop()
                if inside:
                    inside[-1] += seconds
        return run
    with contextlib.ExitStack() as stack:
        for part, places in PARTS.items():
            for place in places:
                module, *path = place.split(".")
                owner = importlib.import_module("c2m3_fl.core." + module)
                for name in path[:-1]:
                    owner = getattr(owner, name, None)
                if hasattr(owner, path[-1]):
                    stack.enter_context(mock.patch.object(owner, path[-1], timed(part, getattr(owner, path[-1]))))
        start = time.process_time()
        match(spec, nodes)
        whole = time.process_time() - start
    return {**spent, "rest": whole - sum(spent.values())}

match(mlp(8, 6, 4), related_nodes(mlp(8, 6, 4), 2))
for name, (network, count, seeds, *noise) in json.loads(sys.argv[1]).items():
    for seed in range(seeds):
        spec = eval(network)
        nodes = related_nodes(spec, count, seed=seed, noise=[1.0, *noise][-1])
        start = time.process_time()
        found = match(spec, nodes)
        row = {"case": name, "seed": seed, "cpu": time.process_time() - start, "agreement": found.objectives[-1]}
        if seed == 0 and len(sys.argv) > 2:
            row["parts"] = profiled(spec, nodes)
        print(json.dumps(row), flush=True)
"""


def run(tree: Path, cases: Mapping[str, tuple[Any, ...]], *, profile: bool = False) -> list[dict[str, Any]]:
    """Match all cases with the code of one checkout; with a profile, seed 0 of each once more."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(tree.resolve())}
    command = [sys.executable, "-c", _ONE, json.dumps(cases), *(["profile"] if profile else [])]
    done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"the checkout {tree} failed:\n{done.stderr}")
    return [json.loads(line) for line in done.stdout.splitlines()]


def measure(trees: dict[str, Path], cases: Mapping[str, tuple[Any, ...]], turns: int) -> list[dict[str, Any]]:
    """All rows of all checkouts, which take turns."""
    rows = []
    for turn in range(turns):
        for name, tree in trees.items():
            found = run(tree, cases, profile=turn == 0)
            print(f"turn {turn + 1}, {name}: {sum(row['cpu'] for row in found):.1f} CPU seconds", flush=True)
            rows += [{"code": name, "turn": turn, **row} for row in found]
    return rows


def sums(rows: list[dict[str, Any]], code: str) -> list[float]:
    """CPU seconds of one case, per turn: the sum over its seeds."""
    turns = sorted({row["turn"] for row in rows})
    return [sum(row["cpu"] for row in rows if (row["code"], row["turn"]) == (code, turn)) for turn in turns]


def by_case(rows: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """The rows of every case."""
    return {case: [row for row in rows if row["case"] == case] for case in dict.fromkeys(row["case"] for row in rows)}


def ratios(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Per case, the least time after relative to the least time before."""
    return {case: min(sums(own, "after")) / min(sums(own, "before")) for case, own in by_case(rows).items()}


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown; seconds of a case are the sum over its seeds, and the agreement the mean of their ratios."""
    lines = [
        "| match | before, min / median / max | after | ratio | agreement |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    shares = ratios(rows)
    for case, own in by_case(rows).items():
        reached = {(row["code"], row["seed"]): row["agreement"] for row in own}
        seeds = sorted({row["seed"] for row in own})
        kept = sum(reached["after", seed] / reached["before", seed] for seed in seeds) / len(seeds)
        before, after = (
            " / ".join(f"{f(sums(own, code)):.2f}" for f in (min, median, max)) for code in ("before", "after")
        )
        label = case if len(seeds) == 1 else f"{case} ({len(seeds)} seeds)"
        lines.append(f"| {label} | {before} | {after} | {shares[case]:.2f} | {kept:.5f} |")
    return "\n".join(lines)


def profile(rows: list[dict[str, Any]]) -> str:
    """Markdown: CPU seconds of the parts of a match, before and after."""
    lines = [f"| match | {' | '.join(PARTS)} |", "| --- |" + " ---: |" * len(PARTS)]
    parts = {(row["case"], row["code"]): row["parts"] for row in rows if "parts" in row}
    for case in dict.fromkeys(case for case, _ in parts):
        cells = [
            " → ".join(f"{parts[case, code].get(part, 0.0):.2f}" for code in ("before", "after")) for part in PARTS
        ]
        lines.append(f"| {case} | {' | '.join(cells)} |")
    return "\n".join(lines)


def tables(rows: list[dict[str, Any]]) -> str:
    """Both tables, as the page shows them."""
    return f"{table(rows)}\n\nWhere the time goes, CPU seconds of seed 0 before → after:\n\n{profile(rows)}\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path, nargs="?", help="an older checkout")
    parser.add_argument("--draw", action="store_true")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--cases", nargs="*", default=list(CASES), choices=list(CASES))
    options = parser.parse_args()
    if not options.draw:
        if options.before is None:
            parser.error("expected the folder of an older checkout, or --draw")
        cases = {name: CASES[name] for name in options.cases}
        rows = measure({"before": options.before, "after": Path()}, cases, options.turns)
        if options.cases != list(CASES):
            print(tables(rows))
            return
        configuration = {"cases": cases, "turns": options.turns, "before": revision(options.before)}
        write_record(RECORD, "python -m tests.benchmarks.before_after OLDER", configuration, rows)
    text = tables(read_record(RECORD)["rows"])
    print(text)
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8"), "before-after", text), encoding="utf-8")


if __name__ == "__main__":
    main()
