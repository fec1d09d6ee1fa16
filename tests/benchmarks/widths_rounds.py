"""Ten rounds of clients of five widths: C2M3 with `sizes` beside HeteroFL, accuracy at every width.

    python -m tests.benchmarks.widths_rounds [--data digits cifar10] [--seeds 0] [--methods NAME ...]

trains 20 clients, four of every width, IID, MLPs on digits and CNNs on 5,000 images of CIFAR-10, and writes
``c2m3_fl/flower/results/widths.json``; rows of other data, seeds and methods stay. ``--redraw`` prints that file's
table. The server holds 300 inputs without labels, by which C2M3 refits a narrower model; HeteroFL evaluates its slices
as they are, except in its row "slices refit".
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import FedAvg, Strategy
from torch import nn

from c2m3_fl import flower
from c2m3_fl.flower import C2M3, SerialGrid, answer_width
from c2m3_fl.flower.records import from_params, to_params
from c2m3_fl.merging import Refit
from c2m3_fl.merging.widths.merge_widths import cut
from c2m3_fl.merging.widths.networks import Widths
from simulations.data import FederatedData, derived_seed, federated_data
from simulations.heterofl import HeteroFL, sliced, with_scalers
from simulations.models import build_model
from simulations.settings import Settings
from simulations.training import train
from tests.benchmarks.merging_cases import accuracy
from tests.benchmarks.records import read_record, write_record

RESULTS = Path(flower.__file__).parent / "results" / "widths.json"
COMMAND = "python -m tests.benchmarks.widths_rounds"
WIDTHS = {"1": 1.0, "1/2": 0.5, "1/4": 0.25, "1/8": 0.125, "1/16": 0.0625}
ROUNDS = 10
SHOWN = (1, 4, 7, 10)
SETTINGS = Settings(
    data="digits",
    model="mlp",
    clients=20,
    calibration_size=300,
    partition="iid",
    batch_size=16,
    local_epochs=5,
    optimiser="sgd",
    learning_rate=0.05,
    momentum=0.9,
)
CASES = {
    "digits": SETTINGS,
    "cifar10": replace(
        SETTINGS, data="cifar10", model="cnn", train_size=5000, test_size=2000, batch_size=32, learning_rate=0.02
    ),
}
HIDDEN = 64  # units of both hidden layers of the widest MLP
METHODS = {
    "C2M3": "C2M3, one start",
    "own": "C2M3, starts of their own",
    "heterofl": "HeteroFL without Scaler",
    "scaler": "HeteroFL",
    "refit": "HeteroFL without Scaler, slices refit",
}


@dataclass(frozen=True)
class Row:
    """One measurement."""

    data: str
    method: str
    seed: int
    round: int
    width: str
    accuracy: float


@dataclass(frozen=True, eq=False)
class Federation:
    """Clients of five widths."""

    settings: Settings
    data: FederatedData

    def network(self, place: int, seed: int) -> nn.Sequential:
        """An untrained network of one of the widths."""
        width = list(WIDTHS.values())[place]
        hidden = ",".join([str(round(HIDDEN * width))] * 2)
        settings = replace(self.settings, width=width, hidden_widths=hidden)
        found = build_model(settings, self.data.shape, self.data.classes, seed)
        assert isinstance(found, nn.Sequential)
        return found

    def app(self, method: str) -> ClientApp:
        """The clients."""
        app = ClientApp()

        def place(context: Context) -> int:
            return int(context.node_config["partition-id"]) % len(WIDTHS)

        @app.train()
        def fit(message: Message, context: Context) -> Message:
            client = int(context.node_config["partition-id"])
            current = int(message.content["config"]["server-round"])
            model = self.network(place(context), derived_seed(self.settings.seed, 2, client))
            if method != "own" or current > 1:
                model.load_state_dict(message.content["arrays"].to_torch_state_dict())
            width = list(WIDTHS.values())[place(context)]
            images = self.data.training_share(client)
            trained = with_scalers(model, width) if method == "scaler" else model
            train(trained, images, self.settings, derived_seed(self.settings.seed, 3, client, current))
            metrics = MetricRecord({"num-examples": len(images)})
            arrays = from_params(model.state_dict())
            return Message(RecordDict({"arrays": arrays, "metrics": metrics}), reply_to=message)

        answer_width(app, model=lambda context: self.network(place(context), 0))
        return app

    def refitted(self, networks: list[nn.Sequential]) -> Callable[[ArrayRecord, int], Mapping[str, Any]]:
        """HeteroFL's slices, refitted by the server's inputs as C2M3's restrictions are."""
        wide, *_ = found = Widths.of(
            networks, None, self.data.calibration, example_inputs=None, inputs=None, outputs=None
        ).nodes

        def at(arrays: ArrayRecord, place: int) -> Mapping[str, Any]:
            first = {name: torch.arange(group.size) for name, group in found[place].spec.groups.items()}
            params = to_params(arrays)
            return cut(wide, found[place], params, first, Refit())[0] if place else params

        return at

    def run(self, method: str) -> list[Row]:
        """One run of one method."""
        networks = [self.network(place, derived_seed(self.settings.seed, 9)).eval() for place in range(len(WIDTHS))]
        shapes = [{name: tuple(value.shape) for name, value in each.state_dict().items()} for each in networks]
        strategy: Strategy
        at: Callable[[ArrayRecord, int], Mapping[str, Any]]
        if method in ("heterofl", "scaler", "refit"):
            by_node = {node: shapes[(node - 1) % len(WIDTHS)] for node in range(1, self.settings.clients + 1)}
            strategy = HeteroFL(by_node, fraction_evaluate=0.0)
            at = lambda arrays, place: sliced(to_params(arrays), shapes[place])  # noqa: E731  # short
            if method == "refit":
                at = self.refitted(networks)
        else:
            c2m3 = C2M3(
                FedAvg(fraction_evaluate=0.0), model=networks[0], sizes=networks[1:], calibration=self.data.calibration
            )
            strategy = c2m3
            at = lambda arrays, place: to_params(c2m3.at_width(arrays, place - 1) if place else arrays)  # noqa: E731  # short
        rows: list[Row] = []
        started = time.process_time()

        def evaluate(current: int, arrays: ArrayRecord) -> MetricRecord:
            for place, width in enumerate(WIDTHS):
                if current in SHOWN:
                    score = accuracy(networks[place], at(arrays, place), self.data.held_out)
                    rows.append(Row(self.settings.data, METHODS[method], self.settings.seed, current, width, score))
            print(
                method, current, [f"{row.accuracy:.3f}" for row in rows[-5:]], f"{time.process_time() - started:.0f} s"
            )
            return MetricRecord()

        grid = SerialGrid(self.app(method), self.settings.clients)
        start = ArrayRecord(networks[0].state_dict())
        strategy.start(grid=grid, initial_arrays=start, num_rounds=ROUNDS, evaluate_fn=evaluate)
        return rows


def table(rows: list[Row]) -> str:
    """Markdown: one line per method and round, one column per width; mean over seeds, in percent."""
    lines = [
        f"| | round | {' | '.join(f'width {width}' for width in WIDTHS)} |",
        f"| --- | ---: |{' ---: |' * len(WIDTHS)}",
    ]
    for data, method, current in dict.fromkeys((row.data, row.method, row.round) for row in rows):
        cells = []
        for width in WIDTHS:
            key = (data, method, current, width)
            found = [row.accuracy for row in rows if (row.data, row.method, row.round, row.width) == key]
            cells.append(f"{100 * sum(found) / len(found):.1f}")
        lines.append(f"| {data}, {method} | {current} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="Ten rounds of clients of five widths.")
    parser.add_argument("--data", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--redraw", action="store_true", help="print the table of the record and measure nothing")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    cases = [] if arguments.redraw else [(name, seed) for name in arguments.data for seed in arguments.seeds]
    for name, seed in cases:
        settings = replace(CASES[name], seed=seed)
        for method in arguments.methods:
            found = Federation(settings, federated_data(settings)).run(method)
            known = [Row(**row) for row in read_record(RESULTS)["rows"]] if RESULTS.exists() else []
            done = (name, METHODS[method], seed)
            kept = [row for row in known if (row.data, row.method, row.seed) != done]
            rows = sorted([*kept, *found], key=_order)
            configuration = {
                "widths": WIDTHS,
                "rounds": ROUNDS,
                "settings": {each: asdict(settings) for each, settings in CASES.items()},
            }
            write_record(RESULTS, COMMAND, configuration, [asdict(row) for row in rows])
    print(table([Row(**row) for row in read_record(RESULTS)["rows"]]))


def _order(row: Row) -> tuple[int, int, int, int]:
    return list(CASES).index(row.data), list(METHODS.values()).index(row.method), row.seed, row.round


if __name__ == "__main__":
    main()
