"""HeteroFL (Diao, Ding and Tarokh, ICLR 2021): clients of several widths hold nested slices of one model.

A client of width p has the first p of every layer's units. Aggregation is the mean of every entry over the clients
that have it (algorithm 1); an entry that none has stays. In training, a client divides the outputs of its layers by p
(the paper's Scaler). The paper's networks have BatchNorm behind every layer, which takes that factor out again.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from copy import deepcopy

import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg
from torch import Tensor, nn

from c2m3_fl.core.spec import Params
from c2m3_fl.flower.incoming.records import from_params, to_params
from c2m3_fl.flower.private import with_arrays

Shapes = Mapping[str, tuple[int, ...]]
_EXAMPLES = "num-examples"  # FedAvg's key of the weights


class HeteroFL(FedAvg):
    """FedAvg over slices of a model.

    Parameters
    ----------
    shapes : mapping of int to mapping of str to tuple of int
        By node, the shapes of the tensors of its network.
    **options
        Of `FedAvg`.
    """

    def __init__(self, shapes: Mapping[int, Shapes], **options: float) -> None:
        super().__init__(**options)  # type: ignore[arg-type]  # FedAvg's own
        self.shapes = shapes
        self.sent: Params = {}

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Send every client its slice."""
        self.sent = to_params(arrays)
        found = []
        for message in super().configure_train(server_round, arrays, config, grid):
            own = sliced(self.sent, self.shapes[message.metadata.dst_node_id])
            found.append(with_arrays(message, {next(iter(message.content.array_records)): from_params(own)}))
        return found

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Mean of every entry over the clients that have it."""
        messages = [reply for reply in replies if not reply.has_error()]
        nodes = [to_params(record) for each in messages for record in each.content.array_records.values()]
        weights = [
            float(str(record[_EXAMPLES])) for each in messages for record in each.content.metric_records.values()
        ]
        return from_params(mean_of_slices(self.sent, nodes, weights)), MetricRecord()


def sliced(params: Params, shapes: Shapes) -> dict[str, Tensor]:
    """The first entries of every tensor along every axis, up to these shapes."""
    return {name: params[name][tuple(slice(size) for size in shape)].clone() for name, shape in shapes.items()}


def mean_of_slices(sent: Params, nodes: Iterable[Params], weights: Iterable[float]) -> dict[str, Tensor]:
    """Weighted mean of every entry over the slices that have it; that of `sent` where none has.

    Parameters
    ----------
    sent : mapping of str to Tensor
        The whole model.
    nodes : iterable of mappings of str to Tensor
        Slices, as `sliced` makes them.
    weights : iterable of float
        One per slice.
    """
    total = {name: torch.zeros(value.shape, dtype=torch.float64) for name, value in sent.items()}
    mass = {name: torch.zeros(value.shape, dtype=torch.float64) for name, value in sent.items()}
    for node, weight in zip(nodes, weights, strict=True):
        for name, value in node.items():
            place = tuple(slice(size) for size in value.shape)
            total[name][place] += weight * value
            mass[name][place] += weight
    return {
        name: torch.where(mass[name] > 0, total[name] / mass[name].clamp_min(1e-300), value).to(value.dtype)
        for name, value in sent.items()
    }


class Scaler(nn.Module):
    """Divides by a client's width in training (the paper, section 3)."""

    def __init__(self, width: float) -> None:
        super().__init__()
        self.width = width

    def forward(self, values: Tensor) -> Tensor:
        """The values, larger in training."""
        return values / self.width if self.training else values


def with_scalers(network: nn.Sequential, width: float) -> nn.Sequential:
    """The same modules, a `Scaler` behind every layer but the last."""
    layers = [place for place, each in enumerate(network) if isinstance(each, (nn.Conv2d, nn.Linear))]
    found: list[nn.Module] = []
    for place, each in enumerate(network):
        found += [each, Scaler(width)] if place in layers[:-1] else [each]
    return nn.Sequential(*found)


def with_norms(network: nn.Sequential) -> nn.Sequential:
    """The same modules, BatchNorm behind every layer but the last, as in the paper's networks."""
    layers = [place for place, each in enumerate(network) if isinstance(each, (nn.Conv2d, nn.Linear))]
    found: list[nn.Module] = []
    for place, each in enumerate(network):
        found.append(each)
        if place in layers[:-1]:
            found.append(nn.BatchNorm2d(each.out_channels) if isinstance(each, nn.Conv2d) else _norm_behind(each))
    return nn.Sequential(*found)


def _norm_behind(layer: nn.Module) -> nn.Module:
    assert isinstance(layer, nn.Linear)
    return nn.BatchNorm1d(layer.out_features)


def with_static_norms(network: nn.Module, params: Params, shares: Iterable[Tensor]) -> dict[str, Tensor]:
    """A state dict with the running statistics of all clients' data (static BatchNorm: the paper, section 3).

    Parameters
    ----------
    network : nn.Module
        The architecture of that width; not mutated.
    params : mapping of str to Tensor
        Its state dict; statistics in it are not used.
    shares : iterable of Tensor
        Every client's inputs; statistics are the mean over clients.
    """
    twin = deepcopy(network)
    twin.load_state_dict(params)
    for each in twin.modules():
        if isinstance(each, nn.modules.batchnorm._BatchNorm):
            each.reset_running_stats()
            each.momentum = None  # the mean over all batches
    twin.train()
    with torch.no_grad():
        for inputs in shares:
            twin(inputs)
    return {name: value.detach().clone() for name, value in twin.state_dict().items()}
