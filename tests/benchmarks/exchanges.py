"""Bytes and seconds of a refit from clients: over all exchanges, of a mean one and of the largest.

    python -m tests.benchmarks.exchanges [NETWORK ...] [--methods METHOD ...] [--price] [--redraw]

asks three clients with 128 random images each and writes ``c2m3_fl/flower/results/exchanges.json``; rows of networks
and methods that are not named stay. ``--price`` asks nobody: bytes follow from the shapes, and what that file has
measured of the same exchanges stays. ``--redraw`` prints that file's table.
Bytes are those of the arrays of one client. Seconds are CPU seconds of one thread: a client's from a query to its
answer, mean over clients, in the exchange that takes longest; the server's for reading, pooling and solving, over all
exchanges and of a mean one.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from torch import Tensor, nn

from c2m3_fl import flower
from c2m3_fl.flower.incoming.records import to_params
from c2m3_fl.flower.queries.moments import answer_statistics
from c2m3_fl.flower.queries.refit import ClientRefit, RegMean, price, refit_by_clients
from c2m3_fl.flower.queries.refit_options import plan_of
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
    largest_sent, largest_answered : int
        The same of the exchange with most of them.
    client, server : float, optional
        CPU seconds: of a client in the exchange that takes longest, of the server over all exchanges. None where nobody
        was asked; `sent` is then the largest number: all operators are corrected.
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
    largest_sent: int
    largest_answered: int
    client: float | None
    server: float | None
    sketched: int
    left_out: int


class Timed(SerialGrid):
    """Bytes and CPU seconds of all clients together, exchange by exchange."""

    def __init__(self, app: ClientApp) -> None:
        super().__init__(app, CLIENTS)
        self.sent: list[int] = []
        self.answered: list[int] = []
        self.seconds: list[float] = []

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Let the nodes answer, with the clock running."""
        messages = list(messages)
        self.sent.append(sum(map(_size, messages)))
        start = time.process_time()
        found = list(super().push_messages(messages))
        self.seconds.append(time.process_time() - start)
        return found

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """The answers, weighed."""
        found = list(super().pull_messages(message_ids))
        self.answered.append(sum(map(_size, found)))
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
    expected, plan = price(options, program, average), plan_of(options, program, average)
    start = time.process_time()
    if asks:
        nodes = list(range(1, CLIENTS + 1))
        refit_by_clients(options, grid, nodes, program, average, endpoints, [1.0] * CLIENTS)
    total = time.process_time() - start
    size = sum(value.numel() * value.element_size() for value in average.values())
    first = size * (1 if isinstance(options, RegMean) else 2)  # networks are sent whole in the first exchange alone
    answers = [sum(step.size for step in exchange) for exchange in plan.exchanges]
    return Row(
        network,
        method,
        size,
        expected.exchanges,
        expected.exchanges * first,
        sum(grid.sent) // CLIENTS if asks else expected.sent,
        sum(grid.answered) // CLIENTS if asks else expected.answered,
        max(grid.sent) // CLIENTS if asks else first,
        max(grid.answered) // CLIENTS if asks else max(answers),
        max(grid.seconds) / CLIENTS if asks else None,
        total - sum(grid.seconds) if asks else None,
        len(expected.sketched),
        len(expected.too_large),
    )


def priced(row: Row, known: Mapping[str, Any] | None) -> Row:
    """A row of which nobody was asked, with what is known of the same exchanges: seconds, and the bytes that were sent.

    Parameters
    ----------
    row : Row
        From the shapes alone.
    known : mapping, optional
        The row of the record.
    """
    same = ("exchanges", "answered", "sketched", "left_out")
    if known is None or any(known[name] != getattr(row, name) for name in same):
        return row
    return replace(row, **{name: known[name] for name in ("sent", "client", "server")})


def table(rows: Iterable[Mapping[str, Any]]) -> str:
    """The rows as a markdown table; of an exchange the mean, and in brackets the largest."""
    names = (
        *("network", "MB", "recalibrate", "exchanges", "MB down", "MB down per exchange", "whole every time"),
        *("MB up", "MB up per exchange", "client s per exchange", "server s", "server s per exchange", "by sketches"),
    )
    lines = ["| " + " | ".join(names) + " |", "|" + " --- |" * len(names)]
    for each in rows:
        row = Row(**each)
        sent, answered = (
            f"{total / 1e6:.1f} | {total / 1e6 / row.exchanges:.2f} ({largest / 1e6:.2f})"
            for total, largest in ((row.sent, row.largest_sent), (row.answered, row.largest_answered))
        )
        client = "–" if row.client is None else f"{row.client:.2f}"
        server = "– | –" if row.server is None else f"{row.server:.1f} | {row.server / row.exchanges:.2f}"
        lines.append(
            f"| {row.network} | {row.size / 1e6:.1f} | `{row.method}` | {row.exchanges} | {sent} | "
            f"{row.whole / 1e6:.1f} | {answered} | {client} | {server} | {row.sketched} |"
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
            row = measure(network, method, asks=not options.price)
            older = next((each for each in known if (each["network"], each["method"]) == (network, method)), None)
            fresh = asdict(priced(row, older) if options.price else row)
            known = [row for row in known if (row["network"], row["method"]) != (network, method)] + [fresh]
            known.sort(key=lambda row: (NETWORKS.index(row["network"]), list(METHODS).index(row["method"])))
            write_record(RESULTS, COMMAND, {"clients": CLIENTS, "images": IMAGES, "threads": 1}, known)
    print(table(known))


if __name__ == "__main__":
    main()
