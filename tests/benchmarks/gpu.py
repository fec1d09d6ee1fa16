"""Whole matches on a GPU and on the CPU of the same machine, on the same nodes: seconds, memory, agreement.

    python -m tests.benchmarks.gpu                          all cases, cheap ones first; c2m3_fl/core/results/gpu.json
    python -m tests.benchmarks.gpu --cases resnet20-3       some of them
    python -m tests.benchmarks.gpu --draw                   the table of the record

Nodes are independent random initialisations. The record is written after every case, and a case that it holds is not
measured again, so a run that was ended goes on. A match that would take longer than `--limit` seconds is ended by the
clock (`max_seconds`) and says so. Where the time goes is measured in a second match, in which the device is waited for
before and after every part; so its parts add up to more than the match takes.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import time
import traceback
from collections import defaultdict
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from c2m3_fl.core import assignment, block_ascent, frank_wolfe, match, permutation, profiles, search
from c2m3_fl.core.problem import Problem
from c2m3_fl.core.spec import PermutationSpec
from c2m3_fl.core.universe import Universe
from tests.benchmarks.networks import mlp, resnet20, resnet50, vgg16
from tests.benchmarks.records import read_record, write_record

RECORD = Path("c2m3_fl/core/results/gpu.json")
NETWORKS: dict[str, Callable[[], PermutationSpec]] = {
    "mlp256": lambda: mlp(784, 256, 256, 10),
    "mlp512": lambda: mlp(784, 512, 512, 512, 10),
    "resnet20x4": lambda: resnet20(4),
    "vgg16": vgg16,
    "resnet50": resnet50,
}
CASES = (
    *("mlp256-3", "resnet20x4-3", "mlp512-3", "resnet20x4-10", "mlp512-10", "vgg16-3", "resnet20x4-11", "vgg16-5"),
    *("resnet50-3", "vgg16-10", "resnet20x4-50", "resnet50-10", "vgg16-50", "resnet50-50"),
)
_PARTS: dict[str, tuple[tuple[object, str], ...]] = {  # what is timed by itself, wherever it is called
    "assignments": ((frank_wolfe, "oracle"), (block_ascent, "oracle"), (search, "oracle"), (profiles, "oracle")),
    "gradients": ((Universe, "gradient"), (block_ascent.BlockAscent, "_gains")),
    "steps": ((Universe, "course"), (Universe, "advance"), (block_ascent.BlockAscent, "_accept")),
    "potentials": ((assignment, "reduced_costs"),),
    "compiling": ((Problem, "of"),),
    "proof": ((import_module("c2m3_fl.core.match"), "prove_identity"),),
}


def initialised(spec: PermutationSpec, count: int, device: torch.device, seed: int = 0) -> list[dict[str, Tensor]]:
    """Independent random networks: weights of variance 2 / fan-in, vectors near one or zero; drawn on the CPU."""
    generator = torch.Generator().manual_seed(seed)
    nodes = []
    for _ in range(count):
        node = {}
        for name, tensor in spec.tensors.items():
            drawn = torch.randn(tensor.shape, generator=generator)
            fan_in = torch.Size(tensor.shape[1:]).numel()
            scaled = (
                drawn * (2 / fan_in) ** 0.5 if drawn.ndim > 1 else 0.1 * drawn + float(name.endswith("norm.weight"))
            )
            node[name] = scaled.to(device)
        nodes.append(node)
    return nodes


def wait(device: torch.device) -> None:
    """Until everything that the device was asked for is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextlib.contextmanager
def profiled(device: torch.device) -> Iterator[dict[str, float]]:
    """Context that adds up the seconds of every part; an outer part is without the parts inside."""
    spent: dict[str, float] = defaultdict(float)
    inside: list[float] = []

    def timed(part: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            wait(device)
            start = time.perf_counter()
            inside.append(0.0)
            try:
                return call(*args, **kwargs)
            finally:
                wait(device)
                seconds = time.perf_counter() - start
                spent[part] += seconds - inside.pop()
                if inside:
                    inside[-1] += seconds

        return run

    with contextlib.ExitStack() as stack:
        for part, places in _PARTS.items():
            for owner, name in places:
                stack.enter_context(mock.patch.object(owner, name, timed(part, getattr(owner, name))))
        yield spent


def one(spec: PermutationSpec, count: int, device: torch.device, limit: float, *, profile: bool) -> dict[str, Any]:
    """Match a case on one device."""
    nodes = initialised(spec, count, device)
    _warm_up(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    held = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
    wait(device)
    start = time.perf_counter()
    found = match(spec, nodes, max_seconds=limit)
    wait(device)
    row: dict[str, Any] = {
        "seconds": time.perf_counter() - start,
        "objective": found.objectives[-1],
        "steps": found.steps,
        "gap": found.gap if found.gap < float("inf") else None,
        "timed_out": found.timed_out,
        "permutations": found.permutations,
    }
    if device.type == "cuda":
        row["nodes_gib"] = held / 2**30
        row["peak_gib"] = torch.cuda.max_memory_allocated(device) / 2**30
    if profile and row["seconds"] < limit / 2:
        with profiled(device) as spent:
            start = time.perf_counter()
            match(spec, nodes, max_seconds=limit)
            whole = time.perf_counter() - start
        row["parts"] = {**spent, "rest": whole - sum(spent.values()), "whole": whole}
    return row


def _warm_up(device: torch.device) -> None:
    spec = mlp(8, 6, 4)
    match(spec, initialised(spec, 4, device))


def measure(case: str, device: torch.device, limits: tuple[float, float], *, cpu: bool) -> dict[str, Any]:
    """A case on the device and, where that is asked for and the device was not too slow, on the CPU."""
    network, count = case.rsplit("-", 1)
    spec = NETWORKS[network]()
    numbers = sum(torch.Size(tensor.shape).numel() for tensor in spec.tensors.values())
    row: dict[str, Any] = {"case": case, "network": network, "nodes": int(count), "parameters": numbers}
    there = one(spec, int(count), device, limits[0], profile=True)
    perms = there.pop("permutations")
    row["device"] = there
    if cpu:
        here = one(spec, int(count), torch.device("cpu"), limits[1], profile=False)
        own = here.pop("permutations")
        row["cpu"] = here
        row["objective_ratio"] = there["objective"] / here["objective"]
        moved = [permutation.share_moved(permutation.between(a, b)) for a, b in zip(perms, own, strict=True)]
        row["units_elsewhere"] = sum(moved) / len(moved)
    return row


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown."""
    lines = [
        "| match | GPU, s | CPU, s | | agreement, GPU / CPU | peak GiB (nodes) | assignments / gradients / steps |",
        "| --- | ---: | ---: | ---: | ---: | ---: | --- |",
    ]
    for row in rows:
        if "error" in row:
            lines.append(f"| {row['case']} | failed: {row['error'].splitlines()[-1][:80]} | | | | | |")
            continue
        there, here = row["device"], row.get("cpu")
        seconds = f"{there['seconds']:.2f}{'*' if there['timed_out'] else ''}"
        other = "–" if here is None else f"{here['seconds']:.1f}{'*' if here['timed_out'] else ''}"
        times = "–" if here is None else f"{here['seconds'] / there['seconds']:.1f}×"
        ratio = f"{row['objective_ratio']:.6f}" if "objective_ratio" in row else "–"
        memory = f"{there['peak_gib']:.2f} ({there['nodes_gib']:.2f})" if "peak_gib" in there else "–"
        parts = there.get("parts", {})
        shares = " / ".join(f"{parts.get(p, 0) / parts['whole']:.0%}" for p in list(_PARTS)[:3]) if parts else "–"
        lines.append(f"| {row['case']} | {seconds} | {other} | {times} | {ratio} | {memory} | {shares} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="*", default=list(CASES), choices=list(CASES))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of torch, on the CPU")
    parser.add_argument("--limit", type=float, default=60.0, help="seconds of a match on the device")
    parser.add_argument("--cpu-limit", type=float, default=60.0, help="seconds of a match on the CPU")
    parser.add_argument("--no-cpu", nargs="*", default=[], choices=list(CASES), help="cases for the device alone")
    parser.add_argument("--output", type=Path, default=RECORD)
    parser.add_argument("--draw", action="store_true")
    options = parser.parse_args()
    rows: list[dict[str, Any]] = read_record(options.output)["rows"] if options.output.is_file() else []
    torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    known = {row["case"] for row in rows if "error" not in row}
    for case in [] if options.draw else [each for each in options.cases if each not in known]:
        print(f"{case} ...", flush=True)
        try:
            row = measure(case, device, (options.limit, options.cpu_limit), cpu=case not in options.no_cpu)
        except Exception:  # one case must not end the others
            row = {"case": case, "error": traceback.format_exc()}
            print(row["error"], flush=True)
        rows = [each for each in rows if each["case"] != case] + [row]
        configuration = {
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
            "cuda": torch.version.cuda,
            "threads": options.threads,
            "limits": [options.limit, options.cpu_limit],
        }
        write_record(options.output, "python -m tests.benchmarks.gpu", configuration, rows)
        print(table([row]).splitlines()[-1], flush=True)
        if device.type == "cuda":
            torch.cuda.empty_cache()
    print(table(rows))


if __name__ == "__main__":
    main()
