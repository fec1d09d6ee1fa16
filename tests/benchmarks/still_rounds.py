"""Rounds in which nothing moves: what is left to do once the last reply has come, next to Flower's own aggregation.

    python -m tests.benchmarks.still_rounds ../older        record and table in c2m3_fl/flower/README.md
    python -m tests.benchmarks.still_rounds --draw          the table of the record

Replies are a network plus noise of a share of every tensor's deviation. Whole calls of `aggregate_train`, CPU seconds
of all threads with one torch thread, FedAvg and C2M3 around it in turn. All replies but the last one have been heard of
and read; reading the last one counts. An older checkout takes turns, in processes of its own; one that cannot read
ahead has everything left to do.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from statistics import median
from typing import Any

from simulations.grid_tables import page
from tests.benchmarks.records import read_record, revision, write_record

_FOLDER = Path("c2m3_fl/flower")
RECORD, PAGE = _FOLDER / "results" / "still_rounds.json", _FOLDER / "README.md"
CASES = [  # network, clients, noise, repeats
    ("mlp", 10, 0.02, 5),
    ("mlp", 10, 0.25, 5),
    ("resnet20", 10, 0.02, 4),
    ("resnet20", 10, 0.25, 4),
    ("resnet20", 1000, 0.02, 1),
    ("vgg16", 10, 0.02, 4),
    ("vgg16", 10, 0.25, 4),
    ("resnet50", 3, 0.02, 2),
    ("resnet50", 3, 0.25, 1),
]
TITLES = {
    "mlp": "MLP 784-256-256-10",
    "resnet20": "ResNet20, BatchNorm",
    "vgg16": "VGG16, a quarter of the width",
    "resnet50": "ResNet50",
}
_ONE = """
import ctypes, gc, json, logging, sys, time
from pathlib import Path
import torch
torch.set_num_threads(1)
from torch import nn
from flwr.serverapp.strategy import FedAvg
from c2m3_fl.flower.strategy import C2M3
from simulations.flower_log import flower_log
from simulations.models import build_model
from simulations.settings import Settings
from tests.flower.federation import reply, send

def build(name):
    if name == "mlp":
        layers = [nn.Linear(784, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10)]
        return nn.Sequential(nn.Flatten(), *layers), (1, 28, 28)
    if name == "resnet50":
        from torchvision.models import resnet50
        return resnet50().eval(), (3, 64, 64)
    settings = Settings(model="resnet20-bn") if name == "resnet20" else Settings(model="vgg16", width=0.25)
    return build_model(settings, (3, 32, 32), 10, seed=0).eval(), (3, 32, 32)

def taken(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(each for each in lines if each.startswith(key)).split()[1]) * 1024

def play(strategy, base, messages):
    send(strategy, base, nodes=len(messages))
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before, ahead = taken("VmRSS"), getattr(getattr(strategy, "server", None), "ahead", None)
    for message in messages[:-1] if ahead is not None else ():
        ahead.hear(message, strategy._expected, "num-examples")
    if ahead is not None:
        ahead._pool.submit(int).result()
    start = time.process_time()
    if ahead is not None:
        ahead.hear(messages[-1], strategy._expected, "num-examples")
    _, metrics = strategy.aggregate_train(1, list(messages))
    cpu = time.process_time() - start
    if metrics.get("c2m3-share-moved", 0.0) or metrics.get("c2m3-kept-previous", 0):
        raise RuntimeError(f"something moved: {metrics}")
    return cpu, max(taken("VmHWM") - before, 0)

for name, clients, noise, repeats in json.loads(sys.argv[1]):
    torch.manual_seed(0)
    model, shape = build(name)
    base = dict(model.state_dict())
    generator = torch.Generator().manual_seed(1)
    def near(key, value):
        if not value.is_floating_point() or "running" in key:
            return value
        return value + noise * value.std(correction=0) * torch.randn(value.shape, generator=generator)
    messages = [reply(node, {key: near(key, value) for key, value in base.items()}) for node in range(clients)]
    size = sum(len(array.data) for array in messages[0].content.array_records["arrays"].values())
    ours = C2M3(FedAvg(), model=model, example_inputs=torch.zeros(2, *shape), recalibrate="none", memory=0)
    with flower_log(logging.ERROR):
        play(ours, base, messages)
        for _ in range(repeats):
            for kind, strategy in (("fedavg", FedAvg()), ("c2m3", ours)):
                cpu, memory = play(strategy, base, messages)
                case = {"network": name, "clients": clients, "noise": noise, "size": size}
                print(json.dumps({**case, "kind": kind, "cpu": cpu, "memory": memory}), flush=True)
"""


def run(tree: Path, cases: list[tuple[str, int, float, int]]) -> list[dict[str, Any]]:
    """Rounds of some cases with the code of one checkout."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(tree.resolve())}
    command = [sys.executable, "-c", _ONE, json.dumps(cases)]
    done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"the checkout {tree} failed:\n{done.stderr}")
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def by_case(rows: list[dict[str, Any]]) -> dict[tuple[str, int, float], list[dict[str, Any]]]:
    """The rows of every network, number of clients and noise."""
    found: dict[tuple[str, int, float], list[dict[str, Any]]] = {}
    for row in rows:
        found.setdefault((row["network"], row["clients"], row["noise"]), []).append(row)
    return found


def ratios(rows: list[dict[str, Any]], code: str) -> list[float]:
    """Of one case, C2M3's seconds relative to FedAvg's in the same process; none where the code was not measured."""
    ours, theirs = ([row for row in rows if (row["code"], row["kind"]) == (code, kind)] for kind in ("c2m3", "fedavg"))
    return [one["cpu"] / other["cpu"] for one, other in zip(ours, theirs, strict=True)]


def memory(rows: list[dict[str, Any]], code: str) -> int:
    """Of one case, the most bytes beside the replies that C2M3 took; 0 where the code was not measured."""
    return max((row["memory"] for row in rows if (row["code"], row["kind"]) == (code, "c2m3")), default=0)


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: per case FedAvg's seconds, and the ratios of C2M3's to those of its own process."""
    lines = [
        "| network | clients | noise | FedAvg, s | before, min / median / max | now | FedAvg, models | before | now |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for (name, clients, noise), own in by_case(rows).items():
        cells, memories = [], []
        for code in ("before", "now"):
            found = ratios(own, code)
            cells.append(" / ".join(f"{f(found):.1f}" for f in (min, median, max)) if found else "")
            memories.append(memory(own, code))
        fedavg = [row for row in own if row["kind"] == "fedavg"]
        seconds = min(row["cpu"] for row in fedavg)
        taken = [max(row["memory"] for row in fedavg), *memories]
        models = [f"{each / own[0]['size']:.1f}" if each else "" for each in taken]
        shown = [TITLES[name], str(clients), f"{noise:g}", f"{seconds:.3f}", *cells, *models]
        lines.append(f"| {' | '.join(shown)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path, nargs="?", help="an older checkout")
    parser.add_argument("--draw", action="store_true")
    parser.add_argument("--turns", type=int, default=1)
    parser.add_argument("--networks", nargs="*", default=list(TITLES), choices=list(TITLES))
    parser.add_argument("--clients", type=int, help="of every case, instead of those of the record; writes nothing")
    options = parser.parse_args()
    if not options.draw:
        cases = [each for each in CASES if each[0] in options.networks]
        if options.clients is not None:
            cases = list(dict.fromkeys((name, options.clients, 0.02, 1) for name, *_ in cases))
        trees = {"before": options.before, "now": Path()} if options.before is not None else {"now": Path()}
        rows = []
        for turn in range(options.turns):
            for network in dict.fromkeys(name for name, *_ in cases):
                for code, tree in trees.items():
                    own = run(tree, [case for case in cases if case[0] == network])
                    rows += [{"code": code, "turn": turn, **row} for row in own]
                print(table([row for row in rows if row["network"] == network]), flush=True)
        if options.clients is not None:
            print(table(rows))
            return
        configuration = {"cases": CASES, "turns": options.turns, "before": revision(options.before)}
        write_record(RECORD, "python -m tests.benchmarks.still_rounds OLDER", configuration, rows)
    text = table(read_record(RECORD)["rows"])
    print(text)
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8"), "still-rounds", text), encoding="utf-8")


if __name__ == "__main__":
    main()
