"""Replies as messages: handed to the wrapped strategy with aligned arrays, sent out in each client's own basis."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from flwr.app import Array, ArrayRecord, Message, MetricRecord
from flwr.serverapp.strategy import Strategy

from c2m3_fl.core.spec import Params
from c2m3_fl.flower.aligner import Aligner
from c2m3_fl.flower.private import with_arrays
from c2m3_fl.flower.records import from_params, to_params
from c2m3_fl.flower.replies import Reply
from c2m3_fl.flower.rounds import AlignedReplies


def aggregate_messages(
    strategy: Strategy, server_round: int, aligned: AlignedReplies
) -> tuple[Params | None, MetricRecord | None]:
    """The wrapped strategy's aggregate of aligned replies, and its metrics.

    Parameters
    ----------
    strategy : Strategy
        The wrapped strategy; its state moves on.
    server_round : int
        The round.
    aligned : AlignedReplies
        The replies; the strategy gets copies, which it may consume.
    """
    messages = [
        with_arrays(reply.source, {next(iter(reply.source.content.array_records)): _arrays(reply, params)})
        for reply, params in zip(aligned.replies, aligned.params, strict=True)
    ]
    arrays, metrics = strategy.aggregate_train(server_round, messages)
    return None if arrays is None else to_params(arrays), MetricRecord(dict(metrics or {}))


def personal_messages(aligner: Aligner, messages: Iterable[Message]) -> Iterable[Message]:
    """The same messages, every client's model in the basis in which it was last found where that was asked for."""
    if aligner.basis != "client":
        return messages
    personal = []
    for message in messages:
        key, record = next(iter(message.content.array_records.items()))
        params = to_params(record)
        own = aligner.own_basis(message.metadata.dst_node_id, params)
        personal.append(message if own is params else with_arrays(message, {key: from_params(own)}))
    return personal


def _arrays(reply: Reply[Message], params: Params) -> ArrayRecord:
    """The aligned arrays in the order of the schema; those that did not change are the client's own.

    Integer arrays go as float64, which every strategy's arithmetic takes, and give the same floating results.
    """
    received = next(iter(reply.source.content.array_records.values()))
    arrays = {}
    for name, value in params.items():
        if not value.is_floating_point():
            arrays[name] = Array(np.asarray(value.double().numpy()))
        else:
            arrays[name] = received[name] if value is reply.params[name] else Array(np.asarray(value.numpy()))
    return ArrayRecord(arrays)
