"""A federation inside one process: Flower's Grid, one client after another.

The Ray engine needs tens of seconds for what ten small clients do in four; `SerialGrid` is for tests,
sweeps and debugging. Client apps, messages and strategies are the real ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

from flwr.app import Context, Error, Message, RecordDict
from flwr.app.user_config import UserConfig
from flwr.clientapp import ClientApp
from flwr.common.constant import ErrorCode
from flwr.serverapp import Grid
from flwr.supercore.run import Run

from c2m3_fl.errors import ConfigError
from c2m3_fl.flower.private import assign_id, claim_identity

_RUN, _SERVER = 1, 0  # the only run, and the node id of the server
_PATIENCE = 5  # questions for the nodes in a row, without a message to any


class SerialGrid(Grid):
    """Runs client apps in this process, one message at a time.

    Parameters
    ----------
    app : ClientApp
        What every node runs.
    nodes : int or sequence of int
        How many nodes, or their ids; node k has partition id k.
    run_config : mapping, optional
        What the apps find in their context.
    transit : callable, optional
        From the replies of one round to those that arrive: reorder, drop, corrupt or repeat them.

    Raises
    ------
    ConfigError
        When there is no node, an id is no whole number, or a strategy waits for more nodes than there are.

    Notes
    -----
    A client that raises gives the error reply that Flower would deliver. Every node keeps its own context. The whole
    process takes the identity of this grid's run, see `private.claim_identity`: never build one inside an app that
    Flower itself runs.
    """

    def __init__(
        self,
        app: ClientApp,
        nodes: int | Sequence[int],
        *,
        run_config: UserConfig | None = None,
        transit: Callable[[list[Message]], Iterable[Message]] | None = None,
    ) -> None:
        ids = [index + 1 for index in range(nodes)] if isinstance(nodes, int) else list(nodes)
        if not ids or isinstance(nodes, bool) or not all(isinstance(node, int) for node in ids):
            raise ConfigError(f"nodes is {nodes!r}, expected how many, at least one, or a list of their ids")
        self.app = app
        self.transit = transit
        self.contexts = {
            node: _context(node, {"partition-id": index, "num-partitions": len(ids)}, run_config or {})
            for index, node in enumerate(ids)
        }
        self._sent = 0
        self._asked = 0
        self._replies: dict[str, Message] = {}
        claim_identity(_RUN, _SERVER)

    def set_run(self, run: Run) -> None:
        """Refuse: the only run is set up at construction."""
        raise NotImplementedError("SerialGrid has one run of its own")

    @property
    def run(self) -> Run:
        """The only run."""
        return Run.create_empty(_RUN)

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        """Message to one node."""
        return Message(content, dst_node_id, message_type, group_id=group_id, ttl=ttl)

    def get_node_ids(self) -> Iterable[int]:
        """Ids of all nodes; a strategy that asks again and again waits for more of them, which nobody can add."""
        self._asked += 1
        if self._asked > _PATIENCE:
            count = len(self.contexts)
            raise ConfigError(
                f"the strategy waits for more nodes than the {count} of this SerialGrid: pass more to SerialGrid(app, "
                f"nodes), or ask for fewer, say FedAvg(min_available_nodes={count}, min_train_nodes={count}, "
                f"min_evaluate_nodes={count})"
            )
        return list(self.contexts)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Let the nodes answer, and name the answers."""
        names = []
        self._asked = 0
        for message in messages:
            self._sent += 1
            name = str(self._sent)
            assign_id(message, name)
            self._replies[name] = self._answer(message)
            names.append(name)
        return names

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """The answers of that name that were not yet pulled."""
        return [self._replies.pop(name) for name in message_ids if name in self._replies]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """Let every addressed node answer; `timeout` has no effect."""
        replies = list(self.pull_messages(self.push_messages(messages)))
        return replies if self.transit is None else list(self.transit(replies))

    def _answer(self, message: Message) -> Message:
        context = self.contexts[message.metadata.dst_node_id]
        try:
            return self.app(message, context)
        except Exception as error:  # what Flower does: any failure of a client becomes an error reply
            reason = f"{type(error).__name__}: {error}"
            return Message(Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, reason), reply_to=message)


def _context(node: int, node_config: Mapping[str, int], run_config: UserConfig) -> Context:
    return Context(_RUN, node, dict(node_config), RecordDict(), dict(run_config))
