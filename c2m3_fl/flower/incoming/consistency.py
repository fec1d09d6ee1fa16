"""Replies of a round next to each other: record names, metrics and losses that do not fit the others'.

No name that one client chooses decides anything, and no NaN enters an average.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from logging import WARNING
from statistics import median_low
from typing import Any

from flwr.app import Message, MetricRecord
from flwr.supercore import log

from c2m3_fl.flower.incoming.admitted import Dropped, Reply
from c2m3_fl.flower.private import with_records

_FAR = 1e6  # times the middle loss: q-FedAvg weighs by a power of it, so that one such claim is the whole average
_SMALL_LOSS = 1e-3  # of clients that have fitted their data: beside them an honest loss of one is not far

Signature = tuple[tuple[str, ...], tuple[str, ...], tuple[tuple[str, int], ...]]


def consistent(kept: Sequence[Reply[Message]]) -> tuple[list[Reply[Message]], list[Dropped]]:
    """Replies with the same record names and metric types, as Flower requires them.

    The majority's, and the others are dropped. Where two or more kinds are equally frequent, no reply is: all keep
    the metrics that they share, in records of one name.
    """
    votes = Counter(signature(reply) for reply in kept).most_common()
    if len(votes) < 2:
        return list(kept), []
    (usual, most), (_, second) = votes[:2]
    if most == second:
        shared = set.intersection(*(set(signature(reply)[2]) for reply in kept))
        log(WARNING, "\t> record names or metric types differ, without a majority: %d metrics are common", len(shared))
        return [_reduced(reply, {name for name, _ in shared}) for reply in kept], []
    replies, dropped = [], []
    for reply in kept:
        if signature(reply) == usual:
            replies.append(reply)
        else:
            dropped.append(Dropped(reply.node, "its record names or metric types differ from the majority's"))
    return replies, dropped


def signature(reply: Reply[Message]) -> Signature:
    """Names and types of a reply's records; Flower requires them to be equal in all replies."""
    content = reply.source.content
    metrics = next(iter(content.metric_records.values()))
    kinds = sorted((key, len(value) if isinstance(value, list) else -1) for key, value in metrics.items())
    return tuple(content.array_records), tuple(content.metric_records), tuple(kinds)


def _reduced(reply: Reply[Message], names: set[str]) -> Reply[Message]:
    content = reply.source.content
    metrics = next(iter(content.metric_records.values()))
    common = MetricRecord({name: value for name, value in metrics.items() if name in names})
    arrays = dict(zip(["arrays"], content.array_records.values(), strict=False))  # an evaluation has none
    return replace(reply, source=with_records(reply.source, {**arrays, "metrics": common}, alone=True))


def plausible_losses(kept: Sequence[Reply[Message]], keys: Sequence[str]) -> tuple[list[Reply[Message]], list[Dropped]]:
    """Replies whose losses, by which the wrapped strategy weighs them, are not far above the middle one."""
    replies, dropped = list(kept), []
    for key in keys:
        losses = [_loss(reply, key) for reply in replies]
        limit = _FAR * max(median_low(losses), _SMALL_LOSS) if losses else 0.0
        far = {index for index, loss in enumerate(losses) if loss > limit}
        dropped += [
            Dropped(replies[index].node, f"metric {key!r} is {losses[index]:g}, expected at most {limit:g} among these")
            for index in sorted(far)
        ]
        replies = [reply for index, reply in enumerate(replies) if index not in far]
    return replies, dropped


def _loss(reply: Reply[Message], key: str) -> float:
    value = next(iter(reply.source.content.metric_records.values()))[key]
    return float(value) if isinstance(value, int | float) else math.inf


def averageable(kept: Sequence[Reply[Message]]) -> tuple[list[Reply[Message]], int]:
    """Replies whose metrics can be averaged, and how many values were NaN or infinite; see `fill`."""
    names = [next(iter(reply.source.content.metric_records)) for reply in kept]
    records = [reply.source.content.metric_records[name] for name, reply in zip(names, kept, strict=True)]
    filled, count = fill(records, [reply.weight for reply in kept])
    if not count:
        return list(kept), 0
    return [
        replace(reply, source=with_records(reply.source, {name: MetricRecord(metrics)}))
        for reply, name, metrics in zip(kept, names, filled, strict=True)
    ], count


def fill(records: Sequence[Mapping[str, Any]], weights: Sequence[float]) -> tuple[list[dict[str, Any]], int]:
    """Metrics in which NaN and infinities are replaced by the mean of the others: it is then the mean of all.

    Parameters
    ----------
    records : sequence of mappings
        Metrics of one node each; not mutated. What is not a number, or a list of numbers, stays as it is.
    weights : sequence of float
        By which the nodes are averaged.

    Returns
    -------
    list of dict, int
        The metrics, without those of which no node has a finite value, and how many values were not finite.
    """
    filled, count = [dict(record) for record in records], 0
    for key in sorted({key for record in records for key in record}):
        having = [index for index, record in enumerate(records) if key in record]
        bad = [index for index in having if not finite(records[index][key])]
        if not bad:
            continue
        count += len(bad)
        fine = [index for index in having if index not in bad]
        mean = _mean([records[index][key] for index in fine], [weights[index] for index in fine])
        for index in bad:
            filled[index][key] = mean
        if mean is None:
            for index in having:
                del filled[index][key]
    return filled, count


def finite(value: object) -> bool:
    """Whether a number, or every number of a list, is finite as a float; True for what is no number."""
    numbers = [each for each in (value if isinstance(value, list) else [value]) if isinstance(each, int | float)]
    try:
        return all(map(math.isfinite, numbers))
    except OverflowError:  # a whole number beyond all floats
        return False


def _mean(values: Sequence[Any], weights: Sequence[float]) -> float | list[float] | None:
    """The weighted mean, of lists element by element; None without any."""
    if not values:
        return None
    total = sum(weights)
    if isinstance(values[0], list):
        columns = zip(*values, strict=True)
        return [sum(w / total * value for w, value in zip(weights, column, strict=True)) for column in columns]
    return float(sum(w / total * value for w, value in zip(weights, values, strict=True)))
