"""The legacy dialect's parameters and results as state dicts, and back."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from flwr.common import FitRes, Parameters, Scalar, ndarrays_to_parameters
from flwr.common import parameters_to_ndarrays as to_ndarrays
from flwr.server.client_proxy import ClientProxy
from flwr.server.strategy import Strategy

from c2m3_fl.core.spec import Params
from c2m3_fl.errors import ParamsError
from c2m3_fl.flower.metrics import Numbers
from c2m3_fl.flower.records import Schema, schema_of_params
from c2m3_fl.flower.rounds import AlignedReplies

Result = tuple[ClientProxy, FitRes]


def aggregate_results(
    strategy: Strategy,
    server_round: int,
    failures: list[Result | BaseException],
    schema: Schema,
    aligned: AlignedReplies,
) -> tuple[Params | None, dict[str, Scalar]]:
    """The wrapped strategy's aggregate of aligned replies, and its metrics."""
    parameters, metrics = strategy.aggregate_fit(server_round, _results(aligned), failures)
    return None if parameters is None else named_params(schema, parameters, "the result"), dict(metrics or {})


def named_params(schema: Schema, parameters: Parameters, who: str) -> dict[str, torch.Tensor]:
    """A server's own parameters by name, of whatever shapes and element types they are."""
    if len(parameters.tensors) != len(schema):
        raise ParamsError(f"{who}: {len(parameters.tensors)} tensors, expected {len(schema)}")
    arrays = to_ndarrays(parameters)
    named = {name: torch.from_numpy(np.asarray(array)) for name, array in zip(schema, arrays, strict=True)}
    schema_of_params(named, who)
    return named


def _results(aligned: AlignedReplies) -> list[Result]:
    """The replies with aligned parameters; integers go as float64, which every strategy's arithmetic takes.

    What did not change is the client's own.
    """
    results = []
    for reply, params in zip(aligned.replies, aligned.params, strict=True):
        proxy, fit = reply.source
        floats = {name: value if value.is_floating_point() else value.double() for name, value in params.items()}
        kept = [value is reply.params[name] for name, value in floats.items()]
        encoded = zip(kept, fit.parameters.tensors, to_parameters(floats).tensors, strict=True)
        tensors = [own if unchanged else new for unchanged, own, new in encoded]
        results.append((proxy, replace(fit, parameters=replace(fit.parameters, tensors=tensors))))
    return results


def to_parameters(params: Params) -> Parameters:
    """The tensors without their names, in order."""
    return ndarrays_to_parameters([np.asarray(value.detach().cpu().numpy()) for value in params.values()])


def to_scalars(numbers: Numbers, *, spelled_out: bool) -> dict[str, Scalar]:
    """Legacy metrics hold no lists: what is known of every node gets a key of its own where that was asked for."""
    scalars: dict[str, Scalar] = {}
    nodes = numbers.get("c2m3-nodes", [])
    for name, value in numbers.items():
        if not isinstance(value, list):
            scalars[name] = value
        elif spelled_out and isinstance(nodes, list) and name != "c2m3-nodes":
            scalars |= {f"{name}/{node}": each for node, each in zip(nodes, value, strict=True)}
    return scalars
