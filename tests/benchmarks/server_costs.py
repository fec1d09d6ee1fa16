"""What aligning costs a server: CPU seconds and memory of one aggregation, FedAvg's and C2M3's.

    python -m tests.benchmarks.server_costs [NETWORK ...]    adds to simulations/results/costs.json
    python -m tests.benchmarks.server_costs --draw           measures nothing

Both write the table into simulations/README.md, and the picture beside the record. The replies are random networks that
resemble each other: one network plus noise of a tenth of every tensor's deviation, with its units in one order (nothing
moves: C2M3 proves it and returns FedAvg's average), one of them in a random order (a newcomer), or each in one of its
own (all units move). Nothing is recalibrated. C2M3 exchanges the same messages as FedAvg.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import logging
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from flwr.app import Message
from flwr.serverapp.strategy import FedAvg, Strategy
from torch import Tensor, nn

import simulations
from c2m3_fl.core import permutation
from c2m3_fl.core.spec import PermutationSpec
from c2m3_fl.flower.strategy import C2M3
from simulations.flower_log import flower_log
from simulations.grid_tables import page
from simulations.models import build_model
from simulations.settings import Settings, check_choice
from tests.benchmarks.records import read_record, write_record
from tests.flower.federation import reply, send

_FOLDER = Path(simulations.__file__).parent
RECORD, PICTURE, PAGE = _FOLDER / "results" / "costs.json", _FOLDER / "results" / "costs.png", _FOLDER / "README.md"
COMMAND = "python -m tests.benchmarks.server_costs"
CLIENTS = (3, 10, 30, 100)
CASES = ("nothing moves", "one newcomer", "all units move")
_NOISE = 0.1  # of a tensor's standard deviation


@dataclass(frozen=True)
class Network:
    """A network of the experiments, the shape of its images, and how many clients are measured at most."""

    title: str
    shape: tuple[int, int, int]
    settings: Settings | None = None  # None: torchvision's network of that name
    at_most: int = CLIENTS[-1]


NETWORKS = {
    "mlp": Network("MLP 784-256-256-10", (1, 28, 28), Settings(model="mlp")),
    "cnn": Network("CNN 8-16", (1, 28, 28), Settings(model="cnn", width=0.25)),
    "lenet": Network("LeNet", (3, 32, 32), Settings(model="lenet")),
    "resnet8": Network("ResNet8, BatchNorm", (3, 32, 32), Settings(model="resnet8-bn")),
    "conv3": Network("three convolutions of 128", (3, 32, 32), Settings(model="conv3")),
    "resnet18": Network("ResNet18", (3, 32, 32), at_most=10),
    "resnet50": Network("ResNet50", (3, 32, 32), at_most=3),
}


@dataclass(frozen=True)
class Row:
    """One aggregation.

    Attributes
    ----------
    network, case : str
        A key of `NETWORKS`, one of `CASES`.
    clients : int
        Number of replies.
    size : int
        Bytes of a reply.
    fedavg, c2m3 : float
        CPU seconds of one thread.
    fedavg_memory, c2m3_memory : int
        Bytes that the process took beyond those of the replies, at most at one time.
    """

    network: str
    case: str
    clients: int
    size: int
    fedavg: float
    c2m3: float
    fedavg_memory: int
    c2m3_memory: int


def build(name: str) -> nn.Module:
    """The untrained network of that name, in evaluation mode."""
    network = NETWORKS[name]
    if network.settings is not None:
        return build_model(network.settings, network.shape, 10, seed=0).eval()
    from torchvision.models import get_model

    torch.manual_seed(0)
    return get_model(name, num_classes=10).eval()


def replies(spec: PermutationSpec, base: Mapping[str, Tensor], clients: int, moving: int) -> list[dict[str, Tensor]]:
    """Networks that resemble `base`, the last `moving` of them in orders of their own."""
    generator = torch.Generator().manual_seed(1)
    found = []
    for number in range(clients):
        node = {name: _near(value, generator) for name, value in base.items()}
        moves = number >= clients - moving
        found.append(permutation.apply(spec, permutation.random(spec, generator), node) if moves else node)
    return found


def _near(value: Tensor, generator: torch.Generator) -> Tensor:
    if not value.is_floating_point():
        return value
    spread = value.std(correction=0)
    return value + _NOISE * spread * torch.randn(value.shape, generator=generator)


def measure(name: str, clients: int, case: str) -> Row:
    """Aggregate the same replies with both strategies."""
    model, moving = build(name), dict(zip(CASES, (0, 1, clients), strict=True))[case]
    base, inputs = dict(model.state_dict()), torch.zeros(2, *NETWORKS[name].shape)
    ours = C2M3(FedAvg(), model=model, example_inputs=inputs, recalibrate="none", memory=0)
    parties = replies(ours.setup.aligner.spec, base, clients, moving)
    messages = [reply(node, own) for node, own in enumerate(parties)]
    size = sum(len(array.data) for array in messages[0].content.array_records["arrays"].values())
    del parties
    seconds, memory, shares = zip(*(_aggregate(each, base, messages) for each in (FedAvg(), ours)), strict=True)
    if (shares[-1] > 0) != (moving > 0):
        raise RuntimeError(f"{name}, {clients} clients: a share of {shares[-1]} moved, expected that {case}")
    return Row(name, case, clients, size, *seconds, *memory)


def _aggregate(strategy: Strategy, base: Mapping[str, Tensor], messages: Sequence[Message]) -> tuple[float, int, float]:
    """CPU seconds and bytes of one aggregation, and the share of the units that moved."""
    send(strategy, base, nodes=len(messages))
    gc.collect()
    with suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from what is taken now
    before, since = _taken("VmRSS"), time.process_time()
    _, metrics = strategy.aggregate_train(1, list(messages))
    share = float(str((metrics or {}).get("c2m3-share-moved", 0.0)))
    return time.process_time() - since, max(_taken("VmHWM") - before, 0), share


def _taken(key: str) -> int:
    """Bytes of this process's memory; VmHWM is its peak."""
    line = next(each for each in Path("/proc/self/status").read_text().splitlines() if each.startswith(key))
    return int(line.split()[1]) * 1024


def table(rows: Sequence[Row]) -> str:
    """One row per network and number of clients."""
    columns = ["network", "MB", "clients", "FedAvg s"]
    columns += [f"C2M3 s, {case}" for case in CASES]
    columns += ["FedAvg MB", *(f"C2M3 MB, {case}" for case in CASES)]
    lines = [columns, ["---", *["---:"] * (len(columns) - 1)]]
    for name, network in NETWORKS.items():
        for clients in CLIENTS:
            found = {each.case: each for each in rows if (each.network, each.clients) == (name, clients)}
            if len(found) < len(CASES):
                continue
            still, *_ = ordered = [found[case] for case in CASES]
            seconds = [f"{still.fedavg:.3f}", *(f"{each.c2m3:.2f}" for each in ordered)]
            memory = [f"{value / 1e6:.0f}" for value in (still.fedavg_memory, *(each.c2m3_memory for each in ordered))]
            lines.append([network.title, f"{still.size / 1e6:.2f}", str(clients), *seconds, *memory])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def draw(rows: Sequence[Row]) -> None:
    """Seconds against clients: a panel per case, a colour per network; dashed FedAvg."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    colours = ("#0072B2", "#009E73", "#E69F00", "#D55E00", "#CC79A7", "#000000", "#56B4E9")  # Okabe and Ito
    figure, panels = plt.subplots(1, len(CASES), figsize=(9.6, 3.6), sharey=True, layout="constrained")
    for panel, case in zip(panels, CASES, strict=True):
        for (name, network), colour in zip(NETWORKS.items(), colours, strict=True):
            found = [each for each in rows if (each.network, each.case) == (name, case)]
            clients = [each.clients for each in found]
            style: dict[str, Any] = {"color": colour, "marker": "o", "markersize": 3, "linewidth": 1.5}
            panel.plot(clients, [each.c2m3 for each in found], label=network.title, **style)
            panel.plot(clients, [each.fedavg for each in found], linestyle="--", alpha=0.6, **style)
        panel.set(title=case, xlabel="clients", xscale="log", yscale="log", xticks=CLIENTS, xticklabels=CLIENTS)
        panel.minorticks_off()
        panel.spines[["top", "right"]].set_visible(False)
        panel.grid(axis="y", color="#dddddd", linewidth=0.6)
    panels[0].set_ylabel("CPU seconds of one aggregation")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False, fontsize=8)
    figure.suptitle("C2M3 (solid) and FedAvg (dashed) on the server", fontsize=9)
    figure.savefig(PICTURE, dpi=130)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("networks", nargs="*", default=list(NETWORKS), metavar="NETWORK")
    parser.add_argument("--draw", action="store_true")
    options = parser.parse_args()
    for name in options.networks:
        check_choice("network", name, tuple(NETWORKS))
    torch.set_num_threads(1)
    rows = [Row(**each) for each in read_record(RECORD)["rows"]] if RECORD.exists() else []
    with flower_log(logging.ERROR):
        for name in () if options.draw else options.networks:
            for clients in (each for each in CLIENTS if each <= NETWORKS[name].at_most):
                fresh = [measure(name, clients, case) for case in CASES]
                rows = [each for each in rows if (each.network, each.clients) != (name, clients)] + fresh
                rows.sort(key=lambda each: (list(NETWORKS).index(each.network), each.clients))
                write_record(RECORD, COMMAND, {"noise": _NOISE, "threads": 1}, [asdict(each) for each in rows])
                print(*fresh, sep="\n", flush=True)
    draw(rows)
    PAGE.write_text(page(PAGE.read_text(), "costs", table(rows)))


if __name__ == "__main__":
    main()
