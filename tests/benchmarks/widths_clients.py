"""The merge of clients of different widths, refit by sums over the clients' own images, at full width and cut.

It is the refit alone, on the merge of the table, and not a round of the strategy.
"""

from __future__ import annotations

import torch
from flwr.app import Context
from flwr.clientapp import ClientApp
from torch import Tensor

from c2m3_fl.flower import ClientRefit, SerialGrid, answer_statistics
from c2m3_fl.flower.deploying.refit_widths import Asked, refit_restriction
from c2m3_fl.flower.queries.corrections import Owners
from c2m3_fl.flower.queries.refit import refit_by_clients
from c2m3_fl.flower.widths.padding import Padding
from c2m3_fl.merging import CycleConsistent
from c2m3_fl.merging.merge_widths import merge_widths
from c2m3_fl.merging.widths.endpoints import owned_channels
from c2m3_fl.merging.widths.injections import between
from c2m3_fl.merging.widths.networks import Widths
from tests.benchmarks.widths_cases import CLIENTS, WIDTHS, Trained

_COLUMN = "universe + refit from clients"


def refit_from_clients(found: Trained, widths: Widths) -> dict[str, float]:
    """Test accuracies by column, of the full width and of every narrower one.

    Parameters
    ----------
    found : Trained
        The clients, on the CPU.
    widths : Widths
        Their networks.
    """
    options, method = ClientRefit(), CycleConsistent()
    done = merge_widths(
        widths, found.nodes, weights=found.weights, recalibration=None, method=method, basis=None, device="cpu"
    )
    assert done.widths is not None
    wide, into, specs = widths.wide, done.widths.into, [network.spec for network in widths.nodes]
    kinds = zip(specs, into, found.nodes, strict=True)
    buffers = wide.held.model.state_dict()
    padded = [Padding(spec, wide.spec, units)(node, buffers) for spec, units, node in kinds]
    grid, weights = SerialGrid(_answering(found, widths), len(CLIENTS)), dict(enumerate(found.weights, 1))
    refit = refit_by_clients(
        options,
        grid,
        list(weights),
        wide.held.program,
        done.state_dict,
        padded,
        found.weights,
        owners=Owners(owned_channels(specs, wide.spec, into)),
    )
    measured = {_COLUMN: found.accuracy(-1, refit.state_dict)}
    asked = Asked(options, grid, {node: weights[node] for node in refit.report.nodes}, equally=False)
    for name in list(WIDTHS)[:-1]:
        client = CLIENTS.index(name)
        every = {group: torch.arange(each.size) for group, each in wide.spec.groups.items()}
        sizes = {group: each.size for group, each in specs[client].groups.items()}
        units = between(into[client], every, sizes)
        narrow, _ = refit_restriction(wide, widths.nodes[client], units, refit.state_dict, asked)
        measured[f"{_COLUMN}, cut to width {name}"] = found.accuracy(client, dict(narrow))
    return measured


def _answering(found: Trained, widths: Widths) -> ClientApp:
    """Clients that answer about the widest network."""
    app = ClientApp()

    def data(context: Context) -> list[Tensor]:
        return [found.data.training_share(int(context.node_config["partition-id"])).inputs]

    answer_statistics(app, model=lambda context: widths.wide.held.model, data=data)
    return app
