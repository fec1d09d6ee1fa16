"""A grid whose nodes are the partitions of the data, independent of the number of SuperNodes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from flwr.app import ConfigRecord, Context, Message, MessageType, RecordDict
from flwr.clientapp.typing import ClientAppCallable
from flwr.serverapp import Grid
from flwr.supercore.run import Run

from c2m3_fl.core.spec import Params
from c2m3_fl.errors import SimulationError
from c2m3_fl.flower.incoming.records import to_params
from c2m3_fl.flower.private import readdress

PARTITION = "partition-id"
ARRAYS = "arrays"  # key of the network in a reply


class PartitionGrid(Grid):
    """Sends the messages for client k to some SuperNode, with the number of client k's partition.

    Simulated clients keep no state between rounds, so one SuperNode can act as several clients. Flower starts two
    SuperNodes by default; a comparison must depend neither on their number, nor on their random ids, nor on the order
    of replies. Replies are returned in the order of the clients, and the networks that they trained are kept until
    the next round.

    Parameters
    ----------
    grid : Grid
        The SuperNodes.
    clients : int or callable
        Number of clients, or from the number of a round to that of its clients; client k has node id k + 1.
    """

    def __init__(self, grid: Grid, clients: int | Callable[[int], int]) -> None:
        self.networks: tuple[Params, ...] = ()
        self._grid = grid
        self._clients = clients
        self._round = 1

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
        count = self._clients if isinstance(self._clients, int) else self._clients(self._round)
        return range(1, count + 1)

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
            When training failed on a client, or it did not reply: a comparison without it would mislead. Clients may
            refuse other messages.
        """
        nodes = sorted(self._grid.get_node_ids())
        if not nodes:
            raise SimulationError("no SuperNode is connected")
        sent = [_outgoing(message, nodes) for message in messages]
        if not sent:
            return []
        training = all(message.metadata.message_type == MessageType.TRAIN for message in sent)
        answers = [_incoming(reply) for reply in self._grid.send_and_receive(sent, timeout=timeout)]
        answers.sort(key=lambda reply: (reply.metadata.src_node_id, reply.metadata.group_id))
        if training:
            self._round += 1
            check_answers(answers, len(sent))
            self.networks = networks(answers)
        return answers


def networks(answers: Sequence[Message]) -> tuple[Params, ...]:
    """The replies' state dicts; read them before a strategy does, because FedMedian empties the records."""
    return tuple(to_params(reply.content.array_records[ARRAYS]) for reply in answers)


def check_answers(answers: Sequence[Message], expected: int) -> None:
    """Raise `SimulationError` when a client failed, or fewer than expected answered."""
    failed = [reply for reply in answers if reply.has_error()]
    if failed:
        first = min(failed, key=lambda reply: reply.metadata.src_node_id)
        raise SimulationError(f"client {first.metadata.src_node_id - 1} failed: {first.error.reason}")
    if len(answers) < expected:
        raise SimulationError(f"{expected - len(answers)} of {expected} clients did not answer")


def play_partition(message: Message, context: Context, call: ClientAppCallable) -> Message:
    """Set the client's partition to the one that the message names; a mod for `ClientApp`."""
    told = message.content.pop(PARTITION, None)
    if isinstance(told, ConfigRecord):
        context.node_config[PARTITION] = int(str(told[PARTITION]))
    return call(message, context)


def _outgoing(message: Message, nodes: list[int]) -> Message:
    """The same content for a SuperNode, with the number of the partition; the group id names the client."""
    client = message.metadata.dst_node_id
    records = {**message.content, PARTITION: ConfigRecord({PARTITION: client - 1})}
    node = nodes[(client - 1) % len(nodes)]
    group = f"{client}/{message.metadata.group_id}"
    return Message(RecordDict(records), node, message.metadata.message_type, group_id=group)


def _incoming(reply: Message) -> Message:
    """The reply, with the client's id as its source."""
    client, _, group = reply.metadata.group_id.partition("/")
    readdress(reply, source=int(client), group=group)
    return reply
