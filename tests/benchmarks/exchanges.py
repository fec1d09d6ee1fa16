"""Bytes and seconds of a refit from clients, per exchange.

    python -m tests.benchmarks.exchanges [NETWORK ...] [--methods METHOD ...] [--price] [--redraw]

asks three clients with 128 random images each and writes ``c2m3_fl/flower/results/exchanges.json``; rows of networks
and methods that are not named stay. ``--price`` asks nobody: bytes follow from the shapes. ``--redraw`` prints that
file's table.
Seconds are CPU seconds of one thread: a client's from a query to its answer, in the exchange that takes longest; the
server's over all exchanges, for reading, pooling and solving.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from torch import Tensor, nn

from c2m3_fl import flower
from c2m3_fl.flower.incoming.records import to_params
from c2m3_fl.flower.queries.moments import answer_statistics
from c2m3_fl.flower.queries.refit import ClientRefit, RegMean, price, refit_by_clients
from c2m3_fl.flower.serial_grid import SerialGrid
from c2m3_fl.network.program import export_program
from simulations.models import ResNet, lenet
from tests.benchmarks.records import read_record, write_record

RESULTS = Path(flower.__file__).parent / "results" / "exchanges.json"
COMMAND = "python -m tests.benchmarks.exchanges"
CLIENTS, IMAGES = 3, 128
NETWORKS = ("lenet", "resnet20", "resnet18")
METHODS: dict[str, ClientRefit | RegMean] = {
    "ClientRefit()": ClientRefit(),
    "ClientRefit(exchanges=3)": ClientRefit(exchanges=3),
    "RegMean()": RegMean(),
}


@dataclass(frozen=True)
class Row:
    """One method on one network.

    Attributes
    ----------
    network, method : str
        Which.
    size : int
        Bytes of the network.
    exchanges : int
        Queries to every client.
    whole : int
        Bytes that a client would be sent if networks were sent whole in every exchange.
    sent, answered : int
        Bytes of arrays that a client is sent and answers with, over all exchanges.
    client, server : float, optional
        CPU seconds: of a client in the exchange that takes longest, of the server over all exchanges. None where nobody
        was asked; `sent` is then the largest number.
    sketched, left_out : int
        Number of operators that are answered about by sketches, and that are not fitted because of their size.
    """

    network: str
    method: str
    size: int
    exchanges: int
    whole: int
    sent: int
    answered: int
    client: float | None
    server: float | None
    sketched: int
    left_out: int


class Timed(SerialGrid):
    """Adds up bytes and CPU seconds of the clients."""

    def __init__(self, app: ClientApp) -> None:
        super().__init__(app, CLIENTS)
        self.sent = self.answered = 0
        self.seconds: list[float] = []

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Let the nodes answer, with the clock running."""
        messages = list(messages)
        self.sent += sum(map(_size, messages))
        start = time.process_time()
        found = list(super().push_messages(messages))
        self.seconds.append(time.process_time() - start)
        return found

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """The answers, weighed."""
        found = list(super().pull_messages(message_ids))
        self.answered += sum(map(_size, found))
        return found


def build(name: str) -> tuple[nn.Module, int]:
    """A network without training, in evaluation mode, and the side of its images."""
    torch.manual_seed(0)
    if name == "lenet":
        return lenet((3, 32, 32), int, 10).eval(), 32
    if name == "resnet20":
        return ResNet(3, 16, 10, nn.BatchNorm2d).eval(), 32
    from torchvision.models import resnet18  # not a requirement of the other rows

    return resnet18(num_classes=10).eval(), 32


def measure(network: str, method: str, *, asks: bool) -> Row:
    """Ask the clients once, or nobody."""
    model, side = build(network)
    generator = torch.Generator().manual_seed(1)

    def data(context: Context) -> list[Tensor]:
        own = torch.Generator().manual_seed(int(context.node_config["partition-id"]))
        return list(torch.split(torch.randn(IMAGES, 3, side, side, generator=own), 32))

    app = ClientApp()
    answer_statistics(app, model=lambda context: build(network)[0], data=data)
    average = dict(model.state_dict())
    endpoints = [
        {
            key: value * (1 + 0.1 * torch.randn(value.shape, generator=generator))
            if value.is_floating_point()
            else value
            for key, value in average.items()
        }
        for _ in range(CLIENTS)
    ]
    program, grid, options = export_program(model, torch.zeros(2, 3, side, side)), Timed(app), METHODS[method]
    expected = price(options, program, average)
    start = time.process_time()
    if asks:
        nodes = list(range(1, CLIENTS + 1))
        refit_by_clients(options, grid, nodes, program, average, endpoints, [1.0] * CLIENTS)
    total = time.process_time() - start
    size = sum(value.numel() * value.element_size() for value in average.values())
    return Row(
        network,
        method,
        size,
        expected.exchanges,
        expected.exchanges * size * (1 if isinstance(options, RegMean) else 2),
        grid.sent // CLIENTS if asks else expected.sent,
        grid.answered // CLIENTS if asks else expected.answered,
        max(grid.seconds) / CLIENTS if asks else None,
        total - sum(grid.seconds) if asks else None,
        len(expected.sketched),
        len(expected.too_large),
    )


def table(rows: Iterable[Mapping[str, object]]) -> str:
    """The rows as a markdown table."""
    columns = "network, MB, recalibrate, exchanges, MB down, whole every time, MB up, client s, server s, by sketches"
    names = columns.split(", ")
    lines = ["| " + " | ".join(names) + " |", "|" + " --- |" * len(names)]
    for each in rows:
        row = Row(**each)  # type: ignore[arg-type]  # as it was written
        down, whole, up = (f"{value / 1e6:.1f}" for value in (row.sent, row.whole, row.answered))
        seconds = " | ".join("–" if value is None else f"{value:.1f}" for value in (row.client, row.server))
        lines.append(
            f"| {row.network} | {row.size / 1e6:.1f} | `{row.method}` | {row.exchanges} | {down} | {whole} | {up} | "
            f"{seconds} | {row.sketched} |"
        )
    return "\n".join(lines)


def _size(message: Message) -> int:
    return sum(
        value.numel() * value.element_size()
        for record in message.content.array_records.values()
        for value in to_params(record).values()
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("networks", nargs="*", default=list(NETWORKS), metavar="NETWORK")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS), metavar="METHOD")
    parser.add_argument("--price", action="store_true")
    parser.add_argument("--redraw", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    known = read_record(RESULTS)["rows"] if RESULTS.exists() else []
    for network in () if options.redraw else options.networks:
        for method in options.methods:
            fresh = asdict(measure(network, method, asks=not options.price))
            known = [row for row in known if (row["network"], row["method"]) != (network, method)] + [fresh]
            known.sort(key=lambda row: (NETWORKS.index(row["network"]), list(METHODS).index(row["method"])))
            write_record(RESULTS, COMMAND, {"clients": CLIENTS, "images": IMAGES, "threads": 1}, known)
    print(table(known))


if __name__ == "__main__":
    main()
