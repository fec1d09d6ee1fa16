"""C2M3 for servers that still speak `flwr.server.strategy`: parameters without names, fit and not train."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from logging import WARNING
from typing import Unpack

import numpy as np
import torch
from flwr.common import EvaluateIns, EvaluateRes, FitIns, FitRes, Parameters, Scalar, ndarrays_to_parameters
from flwr.common import parameters_to_ndarrays as to_ndarrays
from flwr.server.client_manager import ClientManager
from flwr.server.client_proxy import ClientProxy
from flwr.server.strategy import FedAvg, FedAvgM, FedOpt, Strategy
from flwr.supercore import log
from torch import nn

from c2m3_fl.core.spec import Params
from c2m3_fl.errors import ParamsError
from c2m3_fl.flower.options import Options
from c2m3_fl.flower.privacy import check_privacy
from c2m3_fl.flower.records import read_npy, schema_of_params
from c2m3_fl.flower.replies import Dropped, Reply, check_finite, check_weight, digest, report_dropped
from c2m3_fl.flower.rounds import Aligned, Numbers, Rounds
from c2m3_fl.flower.wrapped import chain, check_instance, ignores_weights
from c2m3_fl.merging.recalibrate import Recalibration
from c2m3_fl.models.calibration import Calibration, ExampleInputs

Result = tuple[ClientProxy, FitRes]


class C2M3(Strategy):
    """Align the clients' neurons before another legacy strategy aggregates them.

    The same as `c2m3_fl.flower.strategy.C2M3`, which it shares everything with but the dialect. Parameters are
    the tensors of the model's state dict in its order, as ``[v.numpy() for v in model.state_dict().values()]``
    gives them; the weight of a reply is its number of examples.

    Parameters
    ----------
    strategy : Strategy, optional
        Whatever legacy strategy aggregates the aligned replies; `FedAvg()` by default.
    model, example_inputs, calibration, recalibrate, device, **options
        See `c2m3_fl.flower.strategy.C2M3`.
    """

    def __init__(
        self,
        strategy: Strategy | None = None,
        *,
        model: nn.Module,
        example_inputs: ExampleInputs | None = None,
        calibration: Calibration | None = None,
        recalibrate: Recalibration | str = "repair",
        device: torch.device | str | None = None,
        **options: Unpack[Options],
    ) -> None:
        self.strategy = FedAvg() if strategy is None else strategy
        check_instance(self.strategy, Strategy)
        self.rounds = Rounds(model, example_inputs, calibration, recalibrate, device, options)
        self.schema = schema_of_params(model.state_dict())
        self.sent: Parameters | None = None
        separate = self.rounds.options["alignment"] == "separate"
        check_privacy(self.strategy, separate=separate, calibrated=self.rounds.calibrated)

    def initialize_parameters(self, client_manager: ClientManager) -> Parameters | None:
        """Let the wrapped strategy choose the initial model."""
        return self.strategy.initialize_parameters(client_manager)

    def configure_fit(
        self, server_round: int, parameters: Parameters, client_manager: ClientManager
    ) -> list[tuple[ClientProxy, FitIns]]:
        """Remember the model that is sent out, and let the wrapped strategy choose who gets it."""
        self._params(parameters, "the parameters to send out")
        self.sent = parameters
        for each in chain(self.strategy):  # what they returned may have been repaired since
            if isinstance(each, FedAvgM) and each.initial_parameters is not None:
                each.initial_parameters = parameters
            if isinstance(each, FedOpt):
                each.current_weights = to_ndarrays(parameters)
        chosen = self.strategy.configure_fit(server_round, parameters, client_manager)
        return [(proxy, FitIns(self._personal(proxy, ins.parameters), ins.config)) for proxy, ins in chosen]

    def aggregate_fit(
        self, server_round: int, results: list[Result], failures: list[Result | BaseException]
    ) -> tuple[Parameters | None, dict[str, Scalar]]:
        """Align the replies, aggregate them with the wrapped strategy, and recalibrate the result."""
        if self.sent is None:
            return self.strategy.aggregate_fit(server_round, results, failures)
        replies, dropped = self._sorted(results)
        report_dropped(dropped)
        counts: Numbers = {"c2m3-replies": len(replies), "c2m3-dropped": len(dropped)}
        if not self.rounds.enough(len(replies)):
            return self._keep(f"{len(replies)} valid replies are too few", counts)
        sent = self._params(self.sent, "the parameters sent out")
        aligned = self.rounds.align(replies, sent, equally=ignores_weights(self.strategy))
        report_dropped(aligned.dropped)
        counts = {**counts, **aligned.numbers, "c2m3-dropped": len(dropped) + len(aligned.dropped)}
        if not self.rounds.enough(len(aligned.replies)):
            return self._keep(f"{len(aligned.replies)} replies that fit each other are too few", counts)
        before = [(each, dict(vars(each))) for each in chain(self.strategy)]
        parameters, metrics = self.strategy.aggregate_fit(server_round, _results(aligned), failures)
        if parameters is None:
            return self._keep("the wrapped strategy returned no parameters", counts, metrics)
        try:
            merged: Params = self.rounds.restore(self._named(parameters), aligned)
        except ParamsError as error:
            for each, state in before:
                vars(each).update(state)
            return self._keep(str(error), counts, metrics)
        merged, numbers = self.rounds.recalibrate(merged, aligned)
        return _parameters(merged), {**metrics, **_scalars({**counts, **numbers, "c2m3-kept-previous": 0})}

    def configure_evaluate(
        self, server_round: int, parameters: Parameters, client_manager: ClientManager
    ) -> list[tuple[ClientProxy, EvaluateIns]]:
        """Let the wrapped strategy configure the evaluation."""
        chosen = self.strategy.configure_evaluate(server_round, parameters, client_manager)
        return [(proxy, EvaluateIns(self._personal(proxy, ins.parameters), ins.config)) for proxy, ins in chosen]

    def aggregate_evaluate(
        self,
        server_round: int,
        results: list[tuple[ClientProxy, EvaluateRes]],
        failures: list[tuple[ClientProxy, EvaluateRes] | BaseException],
    ) -> tuple[float | None, dict[str, Scalar]]:
        """Let the wrapped strategy aggregate the evaluation."""
        return self.strategy.aggregate_evaluate(server_round, results, failures)

    def evaluate(self, server_round: int, parameters: Parameters) -> tuple[float, dict[str, Scalar]] | None:
        """Let the wrapped strategy evaluate."""
        return self.strategy.evaluate(server_round, parameters)

    def _sorted(self, results: Sequence[Result]) -> tuple[list[Reply[Result]], list[Dropped]]:
        """The usable replies in a stable order, and the others with the reasons."""
        kept: dict[int, Reply[Result]] = {}
        dropped = []
        for result in results:
            proxy, fit = result
            node = node_of(proxy)
            try:
                weight = check_weight(fit.num_examples, "num_examples")
                params = self._params(fit.parameters, "reply")
                check_finite(params)
            except ParamsError as error:
                dropped.append(Dropped(node, str(error)))
                continue
            reply = Reply(node, params, weight, digest(params, f"{weight} {sorted(fit.metrics.items())!r}"), result)
            first, *second = sorted(filter(None, (kept.get(node), reply)), key=lambda each: each.digest)
            kept[node] = first
            dropped += [Dropped(each.node, "a second reply to the same instruction") for each in second]
        return sorted(kept.values(), key=lambda each: (each.digest, each.node)), dropped

    def _params(self, parameters: Parameters, who: str) -> dict[str, torch.Tensor]:
        """The tensors by name, each of exactly the model's shape and element type."""
        if len(parameters.tensors) != len(self.schema):
            raise ParamsError(f"{who}: {len(parameters.tensors)} tensors, expected {len(self.schema)}")
        return {
            name: read_npy(f"{who}: {name!r}", data, entry)
            for (name, entry), data in zip(self.schema.items(), parameters.tensors, strict=True)
        }

    def _named(self, parameters: Parameters) -> dict[str, torch.Tensor]:
        """A wrapped strategy's result by name, of whatever shape and element type it came."""
        if len(parameters.tensors) != len(self.schema):
            raise ParamsError(f"the result has {len(parameters.tensors)} tensors, expected {len(self.schema)}")
        arrays = to_ndarrays(parameters)
        return {name: torch.from_numpy(np.asarray(array)) for name, array in zip(self.schema, arrays, strict=True)}

    def _personal(self, proxy: ClientProxy, parameters: Parameters) -> Parameters:
        """The model in the client's own basis where that was asked for."""
        if self.rounds.options["basis"] != "client":
            return parameters
        params = self._params(parameters, "the parameters to send out")
        own = self.rounds.aligner.own_basis(node_of(proxy), params)
        return parameters if own is params else _parameters(own)

    def _keep(
        self, reason: str, counts: Numbers, metrics: dict[str, Scalar] | None = None
    ) -> tuple[Parameters | None, dict[str, Scalar]]:
        log(WARNING, "aggregate_fit: %s: the previous global model stays", reason)
        return self.sent, {**(metrics or {}), **_scalars({**counts, "c2m3-kept-previous": 1})}


def node_of(proxy: ClientProxy) -> int:
    """The client's id as a number: its own where it is one, else a digest of it."""
    if proxy.cid.isdecimal():
        return int(proxy.cid)
    return int.from_bytes(hashlib.blake2b(proxy.cid.encode(), digest_size=7).digest(), "big")


def _results(aligned: Aligned) -> list[Result]:
    """The replies with aligned parameters; integers go as float64, which every strategy's arithmetic takes."""
    results = []
    for reply, params in zip(aligned.replies, aligned.params, strict=True):
        proxy, fit = reply.source
        floats = {name: value if value.is_floating_point() else value.double() for name, value in params.items()}
        results.append((proxy, replace(fit, parameters=_parameters(floats))))
    return results


def _parameters(params: Params) -> Parameters:
    return ndarrays_to_parameters([np.asarray(value.detach().cpu().numpy()) for value in params.values()])


def _scalars(numbers: Numbers) -> dict[str, Scalar]:
    """Legacy metrics hold no lists."""
    return {name: value for name, value in numbers.items() if not isinstance(value, list)}
