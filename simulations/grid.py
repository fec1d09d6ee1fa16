"""A grid whose nodes are the partitions of the data, whatever SuperNodes there are."""

from __future__ import annotations

from collections.abc import Iterable

from flwr.app import ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid
from flwr.supercore.run import Run

from c2m3_fl.errors import SimulationError

PARTITION = "partition-id"


class PartitionGrid(Grid):
    """Sends what is meant for client k to any SuperNode, with the partition it is to play.

    Simulated clients keep nothing between rounds, so a SuperNode can play several of them: Flower starts two
    unless told otherwise, and a comparison must not depend on that, nor on the random node ids and order of
    replies. Replies come back in the order of the clients, and are kept until the next round.

    Parameters
    ----------
    grid : Grid
        The SuperNodes.
    clients : int
        How many clients to play; client k has node id k + 1.
    """

    def __init__(self, grid: Grid, clients: int) -> None:
        self.replies: tuple[Message, ...] = ()
        self._grid = grid
        self._clients = clients

    def set_run(self, run: Run) -> None:
        """Set the run of the SuperNodes."""
        self._grid.set_run(run)

    @property
    def run(self) -> Run:
        """The run of the SuperNodes."""
        return self._grid.run

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        """Message to one client."""
        return Message(content, dst_node_id, message_type, group_id=group_id, ttl=ttl)

    def get_node_ids(self) -> Iterable[int]:
        """Ids of the clients."""
        return range(1, self._clients + 1)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Send to the SuperNodes."""
        nodes = sorted(self._grid.get_node_ids())
        if not nodes:
            raise SimulationError("no SuperNode is connected")
        return self._grid.push_messages([_outgoing(message, nodes) for message in messages])

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """The clients' answers that have arrived."""
        return [_incoming(reply) for reply in self._grid.pull_messages(message_ids)]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """All clients' answers, in the order of the clients.

        Raises
        ------
        SimulationError
            When a client raised or did not answer: a comparison without it would mislead.
        """
        nodes = sorted(self._grid.get_node_ids())
        if not nodes:
            raise SimulationError("no SuperNode is connected")
        sent = [_outgoing(message, nodes) for message in messages]
        if not sent:
            return []
        answers = [_incoming(reply) for reply in self._grid.send_and_receive(sent, timeout=timeout)]
        answers.sort(key=lambda reply: reply.metadata.src_node_id)
        for reply in answers:
            if reply.has_error():
                raise SimulationError(f"client {reply.metadata.src_node_id - 1} failed: {reply.error.reason}")
        if len(answers) < len(sent):
            raise SimulationError(f"{len(sent) - len(answers)} of {len(sent)} clients did not answer")
        self.replies = tuple(answers)
        return self.replies


def _outgoing(message: Message, nodes: list[int]) -> Message:
    """The same content to a SuperNode, the partition in its config, the client's id as its group."""
    client = message.metadata.dst_node_id
    records = dict(message.content)
    config = records.get("config")
    known = dict(config) if isinstance(config, ConfigRecord) else {}
    records["config"] = ConfigRecord({**known, PARTITION: client - 1})
    node = nodes[(client - 1) % len(nodes)]
    return Message(RecordDict(records), node, message.metadata.message_type, group_id=str(client))


def _incoming(reply: Message) -> Message:
    """The reply, as if the client's id were the SuperNode's."""
    reply.metadata.__dict__["_src_node_id"] = int(reply.metadata.group_id)
    return reply
