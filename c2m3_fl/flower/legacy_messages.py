"""The legacy dialect's parameters and results: checked where they enter, as state dicts, and back."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from logging import ERROR
from time import perf_counter

import numpy as np
import torch
from flwr.common import EvaluateRes, FitRes, Parameters, Scalar, ndarrays_to_parameters
from flwr.server.client_proxy import ClientProxy
from flwr.server.strategy import Strategy
from flwr.supercore import log

from c2m3_fl.core.spec import Params
from c2m3_fl.core.state_dicts import ordering_digest
from c2m3_fl.errors import ParamsError
from c2m3_fl.flower.aligning.aligned_replies import AlignedReplies
from c2m3_fl.flower.incoming.admitted import Dropped, Reply, Sorted, fault_of, report_dropped
from c2m3_fl.flower.incoming.consistency import fill
from c2m3_fl.flower.incoming.records import Schema, read_npy, received_type
from c2m3_fl.flower.incoming.replies import check_metrics, check_values, check_weight, content_of
from c2m3_fl.flower.metrics import EVALUATIONS_DROPPED, Numbers, failure, without_ours
from c2m3_fl.flower.rewind import taken_back_on_failure

Result = tuple[ClientProxy, FitRes]
Evaluation = tuple[ClientProxy, EvaluateRes]


def sort_results(results: Sequence[Result], schema: Schema) -> Sorted[Result]:
    """Check every result of a training round.

    Parameters
    ----------
    results : sequence of ClientProxy and FitRes
        As Flower delivered them; not mutated.
    schema : mapping of str to Entry
        Keys, shapes and element types of the model that was sent out, in its order.
    """
    started = perf_counter()
    kept: dict[int, Reply[Result]] = {}
    dropped = []
    for result in results:
        node = node_of(result[0])
        try:
            reply = _read(node, result, schema)
        except Exception as error:  # whatever one client sends must not end the round
            dropped.append(fault_of(node, error))
            continue
        first, *second = sorted(filter(None, (kept.get(node), reply)), key=lambda each: each.content)
        kept[node] = first
        dropped += [Dropped(each.node, "a second reply to the same instruction") for each in second]
    replies = sorted(kept.values(), key=lambda each: (each.content, each.node))
    filled, count = fill([reply.source[1].metrics for reply in replies], [reply.weight for reply in replies])
    replies = [_with_metrics(reply, metrics) for reply, metrics in zip(replies, filled, strict=True)]
    return Sorted(tuple(replies), tuple(dropped), perf_counter() - started, count)


def _read(node: int, result: Result, schema: Schema) -> Reply[Result]:
    fit = result[1]
    check_metrics(fit.metrics)
    weight = check_weight(fit.num_examples, "num_examples")
    tensors = fit.parameters.tensors
    if len(tensors) != len(schema):
        raise ParamsError(f"reply: {len(tensors)} tensors, expected {len(schema)}")
    entries = list(zip(schema.items(), tensors, strict=True))
    params = {name: read_npy(f"reply: {name!r}", data, entry, share=True) for (name, entry), data in entries}
    size = check_values(params)
    cast = frozenset(name for (name, entry), data in entries if not entry.as_sent(received_type(data)))
    content = content_of(ordering_digest(params), {**fit.metrics, "": weight})
    return Reply(node, params, weight, content, result, cast, size=size)


def _with_metrics(reply: Reply[Result], metrics: dict[str, Scalar]) -> Reply[Result]:
    proxy, fit = reply.source
    return replace(reply, source=(proxy, replace(fit, metrics=metrics)))


def node_of(proxy: ClientProxy) -> int:
    """The client's id as a number: its own where it is one, else a digest of it."""
    if proxy.cid.isdecimal():
        return int(proxy.cid)
    return int.from_bytes(hashlib.blake2b(proxy.cid.encode(), digest_size=7).digest(), "big")


def aggregate_results(
    strategy: Strategy,
    server_round: int,
    failures: list[Result | BaseException],
    schema: Schema,
    aligned: AlignedReplies,
) -> tuple[Params | None, dict[str, Scalar]]:
    """The wrapped strategy's aggregate of aligned replies, and its metrics."""
    parameters, metrics = strategy.aggregate_fit(server_round, _results(aligned), failures)
    params = None if parameters is None else named_params(schema, parameters, "the result")
    return params, without_ours(metrics or {})


def aggregate_evaluations(
    strategy: Strategy,
    server_round: int,
    results: Sequence[Evaluation],
    failures: list[Evaluation | BaseException],
) -> tuple[float | None, dict[str, Scalar]]:
    """The wrapped strategy's aggregate of the evaluations that can be averaged; nothing where it fails: as it was."""
    kept, dropped = [], []
    for proxy, evaluation in results:
        try:
            check_weight(evaluation.num_examples, "num_examples")
            check_metrics(evaluation.metrics, every=True)
            check_metrics({"loss": evaluation.loss}, every=True)
        except Exception as error:  # whatever one client sends must not end the round
            dropped.append(fault_of(node_of(proxy), error))
            continue
        kept.append((proxy, evaluation))
    report_dropped(dropped)
    try:
        with taken_back_on_failure(strategy):
            loss, metrics = strategy.aggregate_evaluate(server_round, kept, failures)
            return loss, {**without_ours(metrics or {}), **({EVALUATIONS_DROPPED: len(dropped)} if dropped else {})}
    except Exception as error:  # a failed evaluation must not end the run
        log(ERROR, "\t> %s", failure(f"the evaluation of {type(strategy).__name__}", error))
        return None, {}


def named_params(schema: Schema, parameters: Parameters, who: str) -> dict[str, torch.Tensor]:
    """A server's own parameters by name, of whatever shapes and element types they are."""
    if not isinstance(parameters, Parameters):
        raise ParamsError(
            f"{who}: a {type(parameters).__name__}, expected Parameters; pass "
            "ndarrays_to_parameters([value.numpy() for value in model.state_dict().values()])"
        )
    if len(parameters.tensors) != len(schema):
        raise ParamsError(f"{who}: {len(parameters.tensors)} tensors, expected {len(schema)}")
    return {name: read_npy(f"{who}: {name!r}", data) for name, data in zip(schema, parameters.tensors, strict=True)}


def _results(aligned: AlignedReplies) -> list[Result]:
    """The replies with aligned parameters; integers go as float64, which every strategy's arithmetic takes.

    What did not change is the client's own.
    """
    results = []
    for reply, params in zip(aligned.replies, aligned.params, strict=True):
        proxy, fit = reply.source
        floats = {name: value if value.is_floating_point() else value.double() for name, value in params.items()}
        kept = [value is reply.params[name] and reply.as_it_came(name) for name, value in floats.items()]
        encoded = zip(kept, fit.parameters.tensors, to_parameters(floats).tensors, strict=True)
        tensors = [own if unchanged else new for unchanged, own, new in encoded]
        results.append((proxy, replace(fit, parameters=replace(fit.parameters, tensors=tensors))))
    return results


def to_parameters(params: Params) -> Parameters:
    """The tensors without their names, in order."""
    return ndarrays_to_parameters([np.asarray(value.detach().cpu().numpy()) for value in params.values()])


def to_scalars(numbers: Numbers) -> dict[str, Scalar]:
    """Legacy metrics hold no lists: what is known of every node gets a key of its own."""
    scalars: dict[str, Scalar] = {}
    nodes = numbers.get("c2m3-nodes", [])
    for name, value in numbers.items():
        if not isinstance(value, list):
            scalars[name] = value
        elif isinstance(nodes, list) and name != "c2m3-nodes":
            scalars |= {f"{name}/{node}": each for node, each in zip(nodes, value, strict=True)}
    return scalars
