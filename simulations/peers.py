"""Published ways to merge the clients' networks, as Flower strategies: FedAvg with another average.

`Merged` aligns and recalibrates on the server, as `c2m3_fl.merge` does. `AlignedBy` aligns the replies and leaves
everything after that to `C2M3`, which then moves nothing: so any method of alignment can be followed by what C2M3 asks
the clients. `FisherAverage` weighs every parameter by the clients' Fisher information.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg, Strategy
from torch import Tensor, nn

from c2m3_fl.core.averaging import normalise_weights
from c2m3_fl.core.spec import Params, PermutationSpec, floating
from c2m3_fl.core.state_dicts import order_by_weight
from c2m3_fl.flower.incoming.records import from_params, to_params
from c2m3_fl.flower.strategy import C2M3
from c2m3_fl.merging.align.base import Method, Nodes
from c2m3_fl.merging.merge import merge
from c2m3_fl.network.calibration_set import CalibrationSet
from c2m3_fl.symmetry.discover import permutation_spec

FISHER = "fisher"  # key of the request and of the reply's record
_EXAMPLES = "num-examples"  # FedAvg's key of the weights
_TOGETHER = 16  # images whose gradients per class are in memory at once


class Merged(FedAvg):
    """FedAvg whose aggregate is `merge` of the replies.

    Parameters
    ----------
    model : nn.Module
        The architecture.
    method : Method
        How the replies are aligned; the basis is the reply with most examples.
    calibration : sequence of Tensor
        The server's unlabelled images, in batches.
    recalibrate : str
        A short name that `merge` takes.
    **options
        Of `FedAvg`.
    """

    def __init__(
        self,
        *,
        model: nn.Module,
        method: Method,
        calibration: Sequence[Tensor],
        recalibrate: str = "none",
        **options: Any,  # noqa: ANN401  # FedAvg's own
    ) -> None:
        super().__init__(**options)
        self.model = model
        self.method = method
        self.calibration = list(calibration)
        self.recalibrate = recalibrate

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Merge the replies, weighted by their numbers of examples."""
        messages = [reply for reply in replies if not reply.has_error()]
        nodes, weights = _networks(messages)
        _, metrics = super().aggregate_train(server_round, messages)
        merged = merge(
            self.model,
            nodes,
            weights=weights,
            calibration=self.calibration,
            recalibrate=self.recalibrate,
            method=self.method,
        )
        return from_params(merged.state_dict), metrics


class AlignedBy(C2M3):
    """C2M3 whose replies another method has aligned; C2M3 itself moves nothing.

    Parameters
    ----------
    strategy : Strategy
        What C2M3 wraps.
    model : nn.Module
        The architecture.
    method : Method
        How the replies are aligned; the basis is the reply with most examples. Its maps are permutations.
    calibration : sequence of Tensor
        Images on which the method compares activations; nothing else uses them.
    **options
        Of `C2M3`.
    """

    def __init__(
        self,
        strategy: Strategy,
        *,
        model: nn.Module,
        method: Method,
        calibration: Sequence[Tensor],
        **options: Any,  # noqa: ANN401  # C2M3's own
    ) -> None:
        example = calibration[0][:2]
        self.method = method
        self.symmetries = permutation_spec(model, example)
        self.images = CalibrationSet.of(model, list(calibration))
        super().__init__(strategy, model=model, example_inputs=example, spec=_fixed(self.symmetries), **options)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Align the replies by the method, then aggregate them as C2M3."""
        messages = [reply for reply in replies if not reply.has_error()]
        nodes, weights = _networks(messages)
        share = normalise_weights(weights, len(nodes))
        order = tuple(order_by_weight(nodes, share))
        found = self.method(
            Nodes(self.symmetries, tuple(nodes), share, order, order[0], self.images.model, self.images)
        )
        for message, params in zip(messages, found.params, strict=True):
            (key,) = message.content.array_records
            message.content[key] = from_params(params)
        return super().aggregate_train(server_round, messages)


class FisherAverage(FedAvg):
    """The average in which every parameter weighs by the client's diagonal Fisher information.

    Matena and Raffel, "Merging Models with Fisher-Weighted Averaging", NeurIPS 2022, equation 4. Clients compute the
    information of their trained network on their own images (`diagonal_fisher`). Where no client has any, the average
    by examples stays.
    """

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Ask for the Fisher information, too."""
        config[FISHER] = True
        return super().configure_train(server_round, arrays, config, grid)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Average, weighted by examples and Fisher information."""
        messages = [reply for reply in replies if not reply.has_error()]
        information = [to_params(_popped(reply)) for reply in messages]
        nodes, weights = _networks(messages)
        plain, metrics = super().aggregate_train(server_round, messages)
        if plain is None:
            return None, metrics
        return from_params(fisher_average(nodes, information, weights, otherwise=to_params(plain))), metrics


def fisher_average(
    nodes: Sequence[Params], information: Sequence[Params], weights: Sequence[float], *, otherwise: Params
) -> dict[str, Tensor]:
    """The networks' average, weighted by `weights` and, entry by entry, by their Fisher information.

    Parameters
    ----------
    nodes : sequence of mappings of str to Tensor
        State dicts.
    information : sequence of mappings of str to Tensor
        Non-negative, of the shapes of the parameters.
    weights : sequence of float
        One per network.
    otherwise : mapping of str to Tensor
        The entries that no network has information on, and the buffers.
    """
    result = dict(otherwise)
    for name in floating(otherwise):
        if name not in information[0]:
            continue
        total, mass = torch.zeros(otherwise[name].shape).double(), torch.zeros(otherwise[name].shape).double()
        for node, known, weight in zip(nodes, information, weights, strict=True):
            total += weight * known[name].double() * node[name].double()
            mass += weight * known[name].double()
        mean = torch.where(mass > 0, total / mass.clamp_min(torch.finfo(torch.float64).tiny), otherwise[name].double())
        result[name] = mean.to(otherwise[name].dtype)
    return result


def diagonal_fisher(model: nn.Module, params: Params, inputs: Tensor) -> dict[str, Tensor]:
    """Diagonal of the Fisher information of a classifier: mean over inputs of E_y[(∂ log p(y|x) / ∂θ)²], y from p.

    Parameters
    ----------
    model : nn.Module
        The architecture; its outputs are class scores.
    params : mapping of str to Tensor
        State dict.
    inputs : Tensor
        Shape (images, …).
    """
    network = model.eval()
    learnt = {name: params[name].detach() for name, _ in network.named_parameters()}
    fixed = {name: value for name, value in params.items() if name not in learnt}

    def scores(values: dict[str, Tensor], image: Tensor) -> Tensor:
        found: Tensor = torch.func.functional_call(network, {**values, **fixed}, (image[None],))
        return found[0].log_softmax(0)

    gradients_of = torch.func.vmap(torch.func.jacrev(scores), in_dims=(None, 0))
    total = {name: torch.zeros_like(value) for name, value in learnt.items()}
    for images in torch.split(inputs, _TOGETHER):
        probabilities = torch.func.vmap(scores, in_dims=(None, 0))(learnt, images).exp().detach()
        for name, gradients in gradients_of(learnt, images).items():
            total[name] += torch.einsum("nc,nc...->...", probabilities, gradients.square())
    return {name: value / len(inputs) for name, value in total.items()}


def _networks(messages: Sequence[Message]) -> tuple[list[Params], list[float]]:
    """The replies' networks, and their numbers of examples."""
    nodes: list[Params] = [to_params(record) for each in messages for record in each.content.array_records.values()]
    weights = [float(str(record[_EXAMPLES])) for each in messages for record in each.content.metric_records.values()]
    return nodes, weights


def _popped(message: Message) -> ArrayRecord:
    """The reply's Fisher information, which Flower's FedAvg refuses beside the arrays."""
    found = message.content.pop(FISHER)
    if not isinstance(found, ArrayRecord):
        raise TypeError(f"the reply's {FISHER!r} is {found!r}, expected an ArrayRecord")
    return found


def _fixed(spec: PermutationSpec) -> PermutationSpec:
    """The spec of the same tensors without any group."""
    tensors = {
        name: replace(tensor, axes=tuple(() for _ in tensor.axes), diagonal=1) for name, tensor in spec.tensors.items()
    }
    return replace(spec, groups={}, tensors=tensors, pins=())
