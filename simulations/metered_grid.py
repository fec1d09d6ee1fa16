"""A grid in this process that counts what the clients cost."""

from __future__ import annotations

import time
from collections.abc import Iterable

from flwr.app import Message

from c2m3_fl.flower.serial_grid import SerialGrid


class MeteredGrid(SerialGrid):
    """`SerialGrid` that counts the bytes of arrays in both directions, and the clients' CPU time.

    Attributes
    ----------
    client_seconds : float
        CPU time of this process while clients worked.
    down, up : int
        Bytes of arrays that were sent to clients, and by them, in all.
    """

    client_seconds = 0.0
    down = 0
    up = 0

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Let the nodes answer; the messages are made before the clock starts."""
        sent = list(messages)
        self.down += sum(_size(message) for message in sent)
        begin = time.process_time()
        names = list(super().push_messages(sent))
        self.client_seconds += time.process_time() - begin
        return names

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """The answers of that name that were not yet pulled."""
        replies = list(super().pull_messages(message_ids))
        self.up += sum(_size(reply) for reply in replies)
        return replies

    @property
    def bytes_per_client(self) -> tuple[int, int]:
        """Bytes that one client received and sent, on average."""
        return round(self.down / len(self.contexts)), round(self.up / len(self.contexts))


def _size(message: Message) -> int:
    """Bytes of the arrays of a message."""
    if not message.has_content():
        return 0
    return sum(len(array.data) for record in message.content.array_records.values() for array in record.values())
