"""Replies: every one is checked before any of them is used.

A reply that cannot be used is dropped with the reason, and the round goes on with the others. Those that
remain are put into an order that depends on their content alone, because Flower delivers them in random
order and a sum of floats depends on it.
"""

from __future__ import annotations

import math
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from logging import WARNING
from time import perf_counter
from typing import Generic, TypeVar

from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict
from flwr.supercore import log
from torch import Tensor

from c2m3_fl.core.spec import Params
from c2m3_fl.core.state_dicts import check_finite, digest
from c2m3_fl.errors import ParamsError
from c2m3_fl.flower.records import Schema, to_params

Source = TypeVar("Source")
Record = TypeVar("Record", ArrayRecord, MetricRecord)


@dataclass(frozen=True, eq=False)
class Reply(Generic[Source]):
    """A reply that passed every check.

    Attributes
    ----------
    node : int
        Who sent it.
    params : dict of str to Tensor
        Its tensors, in the order of the model that was sent out.
    weight : float
        Its averaging weight, positive.
    content : str
        Digest of the tensors, and the metrics: replies are ordered by it.
    source : Message or legacy result
        The reply as Flower delivered it.
    """

    node: int
    params: dict[str, Tensor]
    weight: float
    content: str
    source: Source


@dataclass(frozen=True)
class Dropped:
    """A reply that cannot be used, and why."""

    node: int
    reason: str


@dataclass(frozen=True, eq=False)
class Sorted(Generic[Source]):
    """The replies of a round: the usable ones in stable order, the dropped ones, and the seconds of the check."""

    replies: tuple[Reply[Source], ...]
    dropped: tuple[Dropped, ...]
    seconds: float


def sort_messages(
    messages: Iterable[Message], schema: Schema, *, weighted_by: str, required: Sequence[str] = ()
) -> Sorted[Message]:
    """Check every message of a training round.

    Parameters
    ----------
    messages : iterable of Message
        As Flower delivered them, errors included; not mutated.
    schema : mapping of str to Entry
        Keys, shapes and element types of the model that was sent out.
    weighted_by : str
        Key of the averaging weight in each reply's only MetricRecord.
    required : sequence of str
        Further metrics that must be there and finite (the loss of q-FedAvg).
    """
    return _sorted(messages, lambda message: _read(message, schema, weighted_by, required))


def sort_evaluations(messages: Iterable[Message], *, weighted_by: str) -> Sorted[Message]:
    """Check every message of an evaluation round, which carries metrics and no arrays."""
    return _sorted(messages, lambda message: _read_evaluation(message, weighted_by))


def content_of(params: Params, metrics: Mapping[str, object]) -> str:
    """A digest of tensors and metrics, by which replies are told apart and ordered."""
    return f"{digest(params)} {sorted(metrics.items())!r}"


def check_weight(value: object, key: str) -> float:
    """The averaging weight as a float; `ParamsError` unless it is a positive finite number."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ParamsError(f"weight {key!r} is {value!r}, expected one positive number")
    if not 0 < value <= sys.float_info.max:  # which NaN is not either
        raise ParamsError(f"weight {key!r} is {value}, expected a positive finite number")
    return float(value)


def report_dropped(dropped: Iterable[Dropped]) -> None:
    """Log every dropped reply with its reason."""
    for each in dropped:
        log(WARNING, "\t> dropped the reply of node %d: %s", each.node, each.reason)


def _sorted(messages: Iterable[Message], read: Callable[[Message], Reply[Message]]) -> Sorted[Message]:
    """The replies in stable order: one per message, all with the same record names and metric types."""
    started = perf_counter()
    kept: list[Reply[Message]] = []
    dropped: list[Dropped] = []
    for message in messages:
        try:
            kept.append(read(message))
        except ParamsError as error:
            dropped.append(Dropped(message.metadata.src_node_id, str(error)))
    kept.sort(key=lambda reply: (reply.content, reply.node))
    kept, dropped = _consistent(*_distinct(kept, dropped))
    return Sorted(tuple(kept), tuple(dropped), perf_counter() - started)


def _read_evaluation(message: Message, weighted_by: str) -> Reply[Message]:
    metrics = _only(_content(message).metric_records, "MetricRecords")
    weight = _weight(metrics, weighted_by)
    return Reply(message.metadata.src_node_id, {}, weight, content_of({}, metrics), message)


def _read(message: Message, schema: Schema, weighted_by: str, required: Sequence[str]) -> Reply[Message]:
    content = _content(message)
    arrays, metrics = _only(content.array_records, "ArrayRecords"), _only(content.metric_records, "MetricRecords")
    weight = _weight(metrics, weighted_by)
    for key in required:
        value = metrics.get(key)
        if not isinstance(value, int | float) or not math.isfinite(value):
            raise ParamsError(f"metric {key!r} is {value!r}, expected a finite number: the wrapped strategy needs it")
    params = to_params(arrays, schema)
    check_finite(params)
    return Reply(message.metadata.src_node_id, params, weight, content_of(params, metrics), message)


def _content(message: Message) -> RecordDict:
    if message.has_error():
        raise ParamsError(f"the client failed: {_last_line(message.error.reason)}")
    if not message.has_content():
        raise ParamsError("the reply is empty")
    return message.content


def _only(records: Mapping[str, Record], kind: str) -> Record:
    if len(records) != 1:
        raise ParamsError(f"the reply has {len(records)} {kind}, expected exactly one")
    return next(iter(records.values()))


def _weight(metrics: MetricRecord, key: str) -> float:
    if key not in metrics:
        raise ParamsError(f"weight {key!r} is missing from the MetricRecord, which has {sorted(metrics)}")
    return check_weight(metrics[key], key)


def _last_line(reason: str | None) -> str:
    """The exception itself, without the traceback above it."""
    lines = [line.strip() for line in (reason or "no reason given").splitlines() if line.strip()]
    return lines[-1] if lines else "no reason given"


def _distinct(kept: list[Reply[Message]], dropped: list[Dropped]) -> tuple[list[Reply[Message]], list[Dropped]]:
    """Keep one reply to each message: the first in the stable order."""
    seen: set[tuple[int, str]] = set()
    distinct = []
    for reply in kept:
        key = (reply.node, reply.source.metadata.reply_to_message_id)
        if key in seen:
            dropped.append(Dropped(reply.node, "a second reply to the same message"))
        else:
            distinct.append(reply)
        seen.add(key)
    return distinct, dropped


Signature = tuple[tuple[str, ...], tuple[str, ...], tuple[tuple[str, int], ...]]


def _signature(reply: Reply[Message]) -> Signature:
    """Names and types of a reply's records; Flower requires them to be equal in all replies."""
    content = reply.source.content
    metrics = next(iter(content.metric_records.values()))
    kinds = sorted((key, len(value) if isinstance(value, list) else -1) for key, value in metrics.items())
    return tuple(content.array_records), tuple(content.metric_records), tuple(kinds)


def _consistent(kept: list[Reply[Message]], dropped: list[Dropped]) -> tuple[list[Reply[Message]], list[Dropped]]:
    """Drop the replies whose record names or metric types differ from the majority's."""
    votes = Counter(_signature(reply) for reply in kept)
    usual = min(votes, key=lambda signature: (-votes[signature], signature), default=None)
    replies = []
    for reply in kept:
        if _signature(reply) == usual:
            replies.append(reply)
        else:
            dropped.append(Dropped(reply.node, "its record names or metric types differ from the majority's"))
    return replies, dropped
