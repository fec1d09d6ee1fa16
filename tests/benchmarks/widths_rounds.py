"""Ten rounds of clients of five widths: C2M3 with `sizes` beside HeteroFL, accuracy at every width.

    python -m tests.benchmarks.widths_rounds [--data digits cifar10] [--seeds 0] [--methods NAME ...] [--device cuda]

trains 20 clients, four of every width, IID, MLPs on digits and CNNs on 5,000 images of CIFAR-10, and writes
``c2m3_fl/flower/results/widths.json`` (``--output FILE``) after every run; what is in the file is not run again.
``--collect FILE ...`` adds the rows of such files to the record, ``--redraw`` prints the record's table, and
``--picture FILE`` draws it.

The server holds 300 inputs without labels, by which C2M3 refits a narrower model; HeteroFL evaluates its slices as they
are, except in its row "slices refit"; networks with BatchNorm (cases that end on "-bn") with statistics of all clients'
images, as the paper has it. The methods "fed back" send the refit restrictions to clients that train them.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from copy import deepcopy
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from itertools import product
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import FedAvg, Strategy
from torch import nn

from c2m3_fl import flower
from c2m3_fl.core.spec import Params
from c2m3_fl.flower import C2M3, SerialGrid, answer_width
from c2m3_fl.flower.incoming.records import from_params, to_params
from c2m3_fl.flower.widths.sizes import Cuts
from c2m3_fl.flower.widths.stage import Resizing
from c2m3_fl.merging import Refit
from c2m3_fl.merging.merge_widths import cut
from c2m3_fl.merging.recalibrate.setting import usable_device
from c2m3_fl.merging.widths.networks import Widths
from simulations.data import FederatedData, Images, derived_seed, federated_data
from simulations.heterofl import HeteroFL, sliced, with_norms, with_scalers, with_static_norms
from simulations.models import build_model
from simulations.settings import Settings
from simulations.training import train
from tests.benchmarks.cells import Cells, Layout, add_options, run
from tests.benchmarks.merging_cases import accuracy
from tests.benchmarks.widths_rounds_table import METHODS, NORMED, SHOWN, WIDTHS, Cell, Row, draw, table

RESULTS = Path(flower.__file__).parent / "results" / "widths.json"
COMMAND = "python -m tests.benchmarks.widths_rounds"
ROUNDS = 10
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
    "cifar10": replace(SETTINGS, data="cifar10", model="cnn", train_size=5000, batch_size=32, learning_rate=0.02),
}
CASES |= {f"{name}{NORMED}": settings for name, settings in CASES.items()}
HIDDEN = 64  # units of both hidden layers of the widest MLP


@dataclass(frozen=True, eq=False)
class Federation:
    """Clients of five widths.

    Attributes
    ----------
    case : str
        Name of the case.
    settings : Settings
        Data, training and seed.
    data : FederatedData
        All of the data.
    device : torch.device
        Where clients train and models are evaluated.
    server : torch.device
        Where C2M3 matches and recalibrates.
    """

    case: str
    settings: Settings
    data: FederatedData
    device: torch.device
    server: torch.device

    @cached_property
    def shares(self) -> list[Images]:
        """Every client's images, on the device."""
        return [self._there(self.data.training_share(client)) for client in range(self.settings.clients)]

    def network(self, place: int, seed: int) -> nn.Sequential:
        """An untrained network of one of the widths."""
        width = list(WIDTHS.values())[place]
        hidden = ",".join([str(round(HIDDEN * width))] * 2)
        settings = replace(self.settings, width=width, hidden_widths=hidden)
        found = build_model(settings, self.data.shape, self.data.classes, seed)
        assert isinstance(found, nn.Sequential)
        return with_norms(found) if self.case.endswith(NORMED) else found

    def app(self, method: str) -> ClientApp:
        """The clients."""
        app = ClientApp()

        def place(context: Context) -> int:
            return int(context.node_config["partition-id"]) % len(WIDTHS)

        @app.train()
        def fit(message: Message, context: Context) -> Message:
            client = int(context.node_config["partition-id"])
            current = int(message.content["config"]["server-round"])
            model = self.network(place(context), derived_seed(self.settings.seed, 2, client)).to(self.device)
            if "own" not in method or current > 1:
                model.load_state_dict(message.content["arrays"].to_torch_state_dict())
            width = list(WIDTHS.values())[place(context)]
            images = self.shares[client]
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
            return cut(wide, found[place], params, first, Refit())[0] if place else self.static(networks[0], params)

        return at

    def static(self, network: nn.Module, params: Mapping[str, Any]) -> Mapping[str, Any]:
        """A slice with the statistics of all clients' images, where it has BatchNorm."""
        if not self.case.endswith(NORMED):
            return params
        there = deepcopy(network).to(self.device)
        return with_static_norms(there, params, [images.inputs for images in self.shares])

    def run(self, method: str) -> list[Row]:
        """One run of one method."""
        networks = [self.network(place, derived_seed(self.settings.seed, 9)).eval() for place in range(len(WIDTHS))]
        shapes = [{name: tuple(value.shape) for name, value in each.state_dict().items()} for each in networks]
        strategy: Strategy
        at: Callable[[ArrayRecord, int], Mapping[str, Any]]
        if method in ("heterofl", "scaler", "refit"):
            by_node = {node: shapes[(node - 1) % len(WIDTHS)] for node in range(1, self.settings.clients + 1)}
            strategy = HeteroFL(by_node, fraction_evaluate=0.0)
            at = lambda arrays, place: self.static(networks[place], sliced(to_params(arrays), shapes[place]))  # noqa: E731  # short
            if method == "refit":
                at = self.refitted(networks)
        else:
            c2m3 = C2M3(
                FedAvg(fraction_evaluate=0.0),
                model=networks[0],
                sizes=networks[1:],
                calibration=self.data.calibration,
                device=self.server,
            )
            strategy = c2m3
            at = lambda arrays, place: to_params(c2m3.at_width(arrays, place - 1) if place else arrays)  # noqa: E731  # short
        rows: list[Row] = []
        there, test = [deepcopy(each).to(self.device) for each in networks], self._there(self.data.held_out)
        started = time.perf_counter()

        def evaluate(current: int, arrays: ArrayRecord) -> MetricRecord:
            if current in SHOWN:
                for place, width in enumerate(WIDTHS):
                    score = accuracy(there[place], at(arrays, place), test)
                    rows.append(Row(self.case, METHODS[method], self.settings.seed, current, width, score))
            scores = [f"{row.accuracy:.3f}" for row in rows if row.round == current]
            print(f"  round {current}", *scores, f"{time.perf_counter() - started:.0f} s", flush=True)
            return MetricRecord()

        grid = SerialGrid(self.app(method), self.settings.clients)
        start = ArrayRecord(networks[0].state_dict())
        with patch.object(Resizing, "cuts", _refit) if "fed back" in method else nullcontext():
            strategy.start(grid=grid, initial_arrays=start, num_rounds=ROUNDS, evaluate_fn=evaluate)
        return rows

    def _there(self, images: Images) -> Images:
        """Images on the device."""
        return Images(images.inputs.to(self.device), images.labels.to(self.device))


_CUTS = Resizing.cuts


def _refit(resizing: Resizing, params: Params, *, deployed: bool) -> Cuts:
    """A model at every width, the narrower ones refit, whether clients evaluate or train it."""
    del deployed
    return _CUTS(resizing, params, deployed=True)


def played(cell: Cell, *, device: torch.device, server: torch.device) -> list[Row]:
    """One run.

    Parameters
    ----------
    cell : tuple
        Data, seed and title of the method.
    device, server : torch.device
        See `Federation`.
    """
    data, seed, title = cell
    settings = replace(CASES[data], seed=seed)
    method = next(name for name, each in METHODS.items() if each == title)
    return Federation(data, settings, federated_data(settings), device, server).run(method)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="Ten rounds of clients of five widths.")
    parser.add_argument("--data", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--server-device", help="where C2M3 matches and recalibrates; by default on the same device")
    add_options(parser, RESULTS)
    arguments = parser.parse_args()

    def measure(known: Cells[Row], device: torch.device) -> Cells[Row]:
        server = usable_device(arguments.server_device or device)
        cells = list(product(arguments.data, arguments.seeds, [METHODS[name] for name in arguments.methods]))
        return known.measure(cells, partial(played, device=device, server=server), arguments.output, device)

    print(table(run(LAYOUT, arguments, measure, draw)))


def _order(row: Row) -> tuple[int, int, int, int]:
    return list(CASES).index(row.data), list(METHODS.values()).index(row.method), row.seed, row.round


LAYOUT = Layout(
    COMMAND,
    {"widths": WIDTHS, "rounds": ROUNDS, "settings": {name: asdict(settings) for name, settings in CASES.items()}},
    Row,
    _order,
)


if __name__ == "__main__":
    main()
