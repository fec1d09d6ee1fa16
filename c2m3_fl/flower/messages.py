"""Replies as messages: handed to the wrapped strategy with aligned arrays, sent out in each client's own basis."""

from __future__ import annotations

from collections.abc import Iterable
from logging import ERROR

from flwr.app import ArrayRecord, Message, MetricRecord
from flwr.serverapp.strategy import Strategy
from flwr.supercore import log

from c2m3_fl.core.spec import Params
from c2m3_fl.flower.aligning.aligned_replies import AlignedReplies
from c2m3_fl.flower.aligning.aligner import Aligner
from c2m3_fl.flower.incoming.admitted import Reply
from c2m3_fl.flower.incoming.carried import Carried, to_average
from c2m3_fl.flower.incoming.records import from_params, to_params
from c2m3_fl.flower.incoming.replies import report_dropped, sort_evaluations
from c2m3_fl.flower.metrics import EVALUATIONS_DROPPED, failure, without_ours
from c2m3_fl.flower.private import with_arrays
from c2m3_fl.flower.rewind import taken_back_on_failure
from c2m3_fl.flower.wrapped import record_keys, stock_averages


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
    params = None if arrays is None else to_params(arrays, who="the result")
    return params, MetricRecord(without_ours(dict(metrics or {})))


def aggregate_evaluations(strategy: Strategy, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
    """The wrapped strategy's aggregate of the evaluations that can be averaged; None where it fails, and is taken back.

    Parameters
    ----------
    strategy : Strategy
        The wrapped strategy; replies to one that averages by no weight are not checked.
    server_round : int
        The round.
    replies : iterable of Message
        As Flower delivered them.
    """
    dropped = 0
    if stock_averages(strategy):
        found = sort_evaluations(replies, weighted_by=record_keys(strategy)[-1])
        report_dropped(found.dropped)
        replies, dropped = [each.source for each in found.replies], len(found.dropped)
    try:
        with taken_back_on_failure(strategy):
            metrics = strategy.aggregate_evaluate(server_round, replies)
            if metrics is None:
                return None
            return MetricRecord(without_ours(metrics) | ({EVALUATIONS_DROPPED: dropped} if dropped else {}))
    except Exception as error:  # a failed evaluation must not end the run
        log(ERROR, "\t> %s", failure(f"the evaluation of {type(strategy).__name__}", error))
        return None


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
    """The aligned arrays in the order of the model; those that did not change are the client's own."""
    if isinstance(params, Carried):
        return params.record
    received = next(iter(reply.source.content.array_records.values()))
    kept = (name for name, value in params.items() if value is reply.params[name] and reply.as_it_came(name))
    return to_average(params, {name: received[name] for name in kept})
