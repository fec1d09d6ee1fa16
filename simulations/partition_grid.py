"""A grid whose nodes are the partitions of the data, whatever SuperNodes there are."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from flwr.app import ConfigRecord, Context, Message, MessageType, RecordDict
from flwr.clientapp.typing import ClientAppCallable
from flwr.serverapp import Grid
from flwr.supercore.run import Run

from c2m3_fl.core.spec import Params
from c2m3_fl.errors import SimulationError
from c2m3_fl.flower.private import readdress
from c2m3_fl.flower.records import to_params

PARTITION = "partition-id"


class PartitionGrid(Grid):
    """Sends what is meant for client k to any SuperNode, with the partition it is to play.

    Simulated clients keep nothing between rounds, so a SuperNode can play several of them: Flower starts two
    unless told otherwise, and a comparison must not depend on that, nor on the random node ids and order of
    replies. Replies come back in the order of the clients, and what they trained is kept until the next round.

    Parameters
    ----------
    grid : Grid
        The SuperNodes.
    clients : int
        How many clients to play; client k has node id k + 1.
    """

    def __init__(self, grid: Grid, clients: int) -> None:
        self.networks: tuple[Params, ...] = ()
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
            When a client that was to train raised or did not answer: a comparison without it would mislead. Other
            messages go to clients that may refuse them.
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
            check_answers(answers, len(sent))
            self.networks = networks(answers)
        return answers


def networks(answers: Sequence[Message]) -> tuple[Params, ...]:
    """The state dicts that replies carry, read before a strategy gets them: FedMedian empties their records."""
    return tuple(to_params(record) for reply in answers for record in reply.content.array_records.values())


def check_answers(answers: Sequence[Message], expected: int) -> None:
    """Raise `SimulationError` when a client failed, or fewer than expected answered."""
    failed = [reply for reply in answers if reply.has_error()]
    if failed:
        first = min(failed, key=lambda reply: reply.metadata.src_node_id)
        raise SimulationError(f"client {first.metadata.src_node_id - 1} failed: {first.error.reason}")
    if len(answers) < expected:
        raise SimulationError(f"{expected - len(answers)} of {expected} clients did not answer")


def play_partition(message: Message, context: Context, call: ClientAppCallable) -> Message:
    """Let a client app play the partition that the message names; a mod for `ClientApp`."""
    told = message.content.pop(PARTITION, None)
    if isinstance(told, ConfigRecord):
        context.node_config[PARTITION] = int(str(told[PARTITION]))
    return call(message, context)


def _outgoing(message: Message, nodes: list[int]) -> Message:
    """The same content to a SuperNode, with the partition it is to play; the group says which client that is."""
    client = message.metadata.dst_node_id
    records = {**message.content, PARTITION: ConfigRecord({PARTITION: client - 1})}
    node = nodes[(client - 1) % len(nodes)]
    group = f"{client}/{message.metadata.group_id}"
    return Message(RecordDict(records), node, message.metadata.message_type, group_id=group)


def _incoming(reply: Message) -> Message:
    """The reply, as if the client's id were the SuperNode's."""
    client, _, group = reply.metadata.group_id.partition("/")
    readdress(reply, source=int(client), group=group)
    return reply
