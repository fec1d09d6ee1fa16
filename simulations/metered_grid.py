"""A grid in this process: clients that join late, and what all of them cost."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable

from flwr.app import Message, MessageType
from flwr.clientapp import ClientApp

from c2m3_fl.flower.serial_grid import SerialGrid
from simulations.settings import Settings


class MeteredGrid(SerialGrid):
    """`SerialGrid` whose late clients are absent at first, and which counts bytes of arrays and the clients' CPU time.

    Parameters
    ----------
    app : ClientApp
        What every client runs.
    settings : Settings
        The federation.
    transit : callable, optional
        As for `SerialGrid`.

    Attributes
    ----------
    client_seconds : float
        CPU time of this process while clients worked.
    down, up : int
        Bytes of arrays that were sent to clients, and by them, in all.
    trained : int
        Number of clients that were asked to train in the last round.
    """

    def __init__(
        self,
        app: ClientApp,
        settings: Settings,
        *,
        transit: Callable[[list[Message]], Iterable[Message]] | None = None,
    ) -> None:
        super().__init__(app, settings.clients, run_config=settings.to_run_config(), transit=transit)
        self.client_seconds = 0.0
        self.down = self.up = self.trained = 0
        self._settings = settings
        self._round = 1

    def get_node_ids(self) -> Iterable[int]:
        """Ids of the clients that have joined."""
        return list(super().get_node_ids())[: self._settings.present_in(self._round)]

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Let the nodes answer; the messages are made before the clock starts."""
        sent = list(messages)
        if sent and all(message.metadata.message_type == MessageType.TRAIN for message in sent):
            self.trained = len(sent)
            self._round += 1
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
