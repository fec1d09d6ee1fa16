"""Flower's private state: every place where this package reads or writes it.

Flower 1.41 offers no public way to build a message outside of a running app, to give a message an id, or to replay a
reply as if another node had sent it. A new version of Flower can break what is here, and nothing else.
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import copy

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.supercore.task_identity import TaskIdentity

Record = ArrayRecord | MetricRecord | ConfigRecord


def claim_identity(run_id: int, node_id: int) -> None:
    """Make the whole process a task of this run and node: without an identity no message can be built.

    Overwrites the identity that the process had. A process that Flower itself started for an app must not do this.
    """
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = run_id, node_id, 0


def assign_id(message: Message, name: str) -> None:
    """Give a message its id, as the SuperLink does on arrival."""
    message.metadata.__dict__["_message_id"] = name


def readdress(message: Message, *, source: int | None = None, group: str | None = None) -> None:
    """Change the node that a reply claims to come from, or its group."""
    if source is not None:
        message.metadata.__dict__["_src_node_id"] = source
    if group is not None:
        message.metadata.__dict__["_group_id"] = group


def with_arrays(message: Message, arrays: Mapping[str, ArrayRecord]) -> Message:
    """A copy of a message with other arrays; metadata are shared, metrics are copied."""
    records = {
        key: copy(record) if isinstance(record, MetricRecord) else record for key, record in message.content.items()
    }
    return with_records(message, {**records, **arrays}, alone=True)


def with_records(message: Message, records: Mapping[str, Record], *, alone: bool = False) -> Message:
    """A copy of a message with other records, beside its own or `alone`; metadata are shared."""
    carrying = copy(message)
    carrying.content = RecordDict({**({} if alone else message.content), **records})
    return carrying
