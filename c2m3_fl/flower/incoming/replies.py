"""Replies: every one is checked before any of them is used.

A reply that cannot be used is dropped with the reason, and the round goes on with the others. Whatever reading a reply
raises is that reply's fault. Those that remain are put into an order that depends on their content alone, because
Flower delivers them in random order and a sum of floats depends on it.
"""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from time import perf_counter
from typing import Any, TypeVar

import torch
from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict
from flwr.common.constant import ErrorCode

from c2m3_fl.core.spec import Params
from c2m3_fl.core.state_dicts import check_finite, norm, ordering_digest
from c2m3_fl.errors import ParamsError
from c2m3_fl.flower.incoming.admitted import Decoded, Dropped, Reply, Sorted, TransientError, fault_of, report_dropped
from c2m3_fl.flower.incoming.carried import Carried
from c2m3_fl.flower.incoming.consistency import averageable, consistent, finite, plausible_losses
from c2m3_fl.flower.incoming.records import Schema, bare_name, to_params
from c2m3_fl.flower.private import with_arrays

__all__ = [
    "Dropped",
    "Reply",
    "Sorted",
    "check_metrics",
    "check_shared_fault",
    "check_values",
    "check_weight",
    "content_of",
    "decoded",
    "only_arrays",
    "only_metrics",
    "report_dropped",
    "sort_evaluations",
    "sort_messages",
]

Record = TypeVar("Record", ArrayRecord, MetricRecord)
Decode = Callable[[ArrayRecord, Schema], Decoded]

_MOST_EXAMPLES = 2**53  # beyond it floats do not count any more, and sums of few weights overflow
_LARGEST_LOSS = 1e12
_LONGEST_NAME, _MOST_VALUES = 200, 100_000  # of a metric, of a reply: Flower logs metrics whole
_PASSING = {ErrorCode.MESSAGE_UNAVAILABLE, ErrorCode.REPLY_MESSAGE_UNAVAILABLE, ErrorCode.NODE_UNAVAILABLE}


def sort_messages(
    messages: Iterable[Message],
    schema: Schema,
    *,
    weighted_by: str,
    required: Sequence[str] = (),
    decode: Decode | None = None,
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
        Losses by which the wrapped strategy weighs replies (that of q-FedAvg).
    decode : callable, optional
        Instead of `decoded`: remembers records that were decoded when they arrived.
    """
    found = _sorted(messages, lambda message: _read(message, schema, weighted_by, required, decode or decoded))
    replies, far = plausible_losses(found.replies, required)
    replies, count = averageable(replies)
    return replace(found, replies=tuple(replies), dropped=(*found.dropped, *far), not_averaged=count)


def decoded(record: ArrayRecord, schema: Schema) -> Decoded:
    """The tensors of a reply's arrays, which are under the model's names, checked; `ParamsError` where they fail.

    Parameters
    ----------
    record : ArrayRecord
        The arrays as Flower carries them; nobody may write into their bytes.
    schema : mapping of str to Entry
        What they must look like.
    """
    params = to_params(record, schema, "reply", share=True)
    size = check_values(params)
    cast = frozenset(name for name, entry in schema.items() if not entry.as_sent(record[name].dtype))
    own = {name: record[name] for name in params.keys() - cast}
    return Decoded(Carried(schema, params, own), ordering_digest(params), size, cast)


def sort_evaluations(messages: Iterable[Message], *, weighted_by: str) -> Sorted[Message]:
    """Check every message of an evaluation round, which carries metrics and no arrays."""
    return _sorted(messages, lambda message: _read_evaluation(message, weighted_by))


def content_of(digested: str, metrics: Mapping[str, object]) -> str:
    """An `ordering_digest`, empty without tensors, and the metrics, by which replies are told apart and ordered."""
    return f"{digested} {sorted(metrics.items())!r}"


def check_weight(value: object, key: str) -> float:
    """The averaging weight as a float; `ParamsError` unless it is a positive number that examples can have."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ParamsError(f"weight {key!r} is {value!r}, expected one positive number")
    if not 0 < value <= sys.float_info.max:  # which NaN is not either
        raise ParamsError(f"weight {key!r} is {str(value)[:40]}, expected a positive finite number")
    if value > _MOST_EXAMPLES:
        raise ParamsError(f"weight {key!r} is {value:g}, expected a positive finite number, at most 2**53")
    return float(value)


def check_metrics(metrics: Mapping[str, Any], *, every: bool = False) -> None:
    """Raise `ParamsError` for metrics that no log can hold; with `every`, also where one is NaN or infinite."""
    values = sum(len(value) if isinstance(value, list | str | bytes) else 1 for value in metrics.values())
    longest = max((len(name) for name in metrics), default=0)
    if values > _MOST_VALUES or longest > _LONGEST_NAME:
        raise ParamsError(
            f"its metrics hold {values} values, the longest name has {longest} characters; "
            f"expected at most {_MOST_VALUES} and {_LONGEST_NAME}"
        )
    odd = next((name for name, value in metrics.items() if every and not finite(value)), None)
    if odd is not None:
        raise ParamsError(f"metric {odd!r} is {metrics[odd]!r}, expected a finite number")


def check_values(params: Params) -> float:
    """The norm; `TransientError` for NaN, infinities, and a norm whose square is beyond the type of the computation."""
    try:
        check_finite(params)
    except ParamsError as error:
        raise TransientError(str(error)) from error
    floats = [value.dtype for value in params.values() if value.is_floating_point()]
    limit = min((torch.finfo(torch.promote_types(dtype, torch.float32)).max for dtype in floats), default=math.inf)
    size = norm(params)
    if not size * size <= limit:
        raise TransientError(f"its norm is {size:.3g}, too large to compute with: the square is beyond {limit:.2g}")
    return size


def only_arrays(reply: Message) -> ArrayRecord:
    """The one ArrayRecord of a reply; `ParamsError` where the client failed, or sent none or several."""
    return _only(_content(reply).array_records, "ArrayRecords")


def only_metrics(reply: Message) -> MetricRecord:
    """The one MetricRecord of a reply; `ParamsError` where the client failed, or sent none or several."""
    return _only(_content(reply).metric_records, "MetricRecords")


def check_shared_fault(found: Sorted[Any]) -> None:
    """Raise `ParamsError` where no reply of a first round can be used, for one reason: all clients share a mistake.

    One reply is not enough. Values that may be others in the next round are not such a reason, nor are nodes that
    cannot be reached.
    """
    reasons = {re.sub(r"\d+", "0", each.reason) for each in found.dropped}
    nodes = {each.node for each in found.dropped}
    if found.replies or len(reasons) != 1 or len(nodes) < 2 or any(each.passing for each in found.dropped):
        return
    raise ParamsError(
        f"none of the {len(found.dropped)} replies of the first round can be used, for one reason: "
        f"{found.dropped[0].reason}. Change what all clients send, or the model that C2M3 was given, and start again"
    )


def _sorted(messages: Iterable[Message], read: Callable[[Message], Reply[Message]]) -> Sorted[Message]:
    """The replies in stable order: one per message, all with the same record names and metric types."""
    started = perf_counter()
    kept: list[Reply[Message]] = []
    dropped: list[Dropped] = []
    for message in messages:
        try:
            kept.append(read(message))
        except Exception as error:  # whatever one client sends must not end the round
            dropped.append(fault_of(message.metadata.src_node_id, error))
    kept.sort(key=lambda reply: (reply.content, reply.node))
    distinct, twice = _distinct(kept)
    replies, unlike = consistent(distinct)
    return Sorted(tuple(replies), (*dropped, *twice, *unlike), perf_counter() - started)


def _read_evaluation(message: Message, weighted_by: str) -> Reply[Message]:
    metrics = only_metrics(message)
    check_metrics(metrics)
    weight = _weight(metrics, weighted_by)
    check_metrics(metrics, every=True)
    return Reply(message.metadata.src_node_id, {}, weight, content_of("", metrics), message)


def _read(
    message: Message, schema: Schema, weighted_by: str, required: Sequence[str], decode: Decode
) -> Reply[Message]:
    received, metrics = only_arrays(message), only_metrics(message)
    check_metrics(metrics)
    weight = _weight(metrics, weighted_by)
    for key in required:
        value = metrics.get(key)
        if not isinstance(value, int | float) or not 0 <= value <= _LARGEST_LOSS:  # which NaN is not either
            raise ParamsError(
                f"metric {key!r} is {value!r}, expected a finite number, not negative, at most {_LARGEST_LOSS:g}: "
                "the wrapped strategy needs it"
            )
    arrays = renamed(received, schema)
    if arrays is not received:
        message = with_arrays(message, {next(iter(message.content.array_records)): arrays})
    found = decode(arrays, schema)
    content = content_of(found.digest, metrics)
    node = message.metadata.src_node_id
    return Reply(node, found.params, weight, content, message, found.cast, size=found.size)


def renamed(record: ArrayRecord, schema: Schema) -> ArrayRecord:
    """The arrays under the model's names where these differ in a wrapper's prefix alone; else the record itself."""
    if record.keys() == schema.keys():
        return record
    names = {bare_name(name): name for name in record}
    known = {bare_name(name): name for name in schema}
    if names.keys() != known.keys() or not len(record) == len(names) == len(known) == len(schema):
        return record
    return ArrayRecord({name: record[names[bare]] for bare, name in known.items()})


def _content(message: Message) -> RecordDict:
    if message.has_error():
        fault = TransientError if message.error.code in _PASSING else ParamsError
        raise fault(f"the client failed: {_last_line(message.error.reason)}")
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
    """Of what a client's error says, the exception itself, without the traceback above it."""
    return (reason or "").strip().rpartition("\n")[2].strip() or "no reason given"


def _distinct(kept: Sequence[Reply[Message]]) -> tuple[list[Reply[Message]], list[Dropped]]:
    """Keep one reply to each message: the first in the stable order."""
    seen: set[tuple[int, str]] = set()
    distinct, dropped = [], []
    for reply in kept:
        key = (reply.node, reply.source.metadata.reply_to_message_id)
        if key in seen:
            dropped.append(Dropped(reply.node, "a second reply to the same message"))
        else:
            distinct.append(reply)
        seen.add(key)
    return distinct, dropped
