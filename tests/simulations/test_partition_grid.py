from __future__ import annotations

import pytest
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import FedAvg

from c2m3_fl.errors import SimulationError
from c2m3_fl.flower.serial_grid import SerialGrid
from simulations.partition_grid import PARTITION, PartitionGrid, play_partition

CLIENTS = 5


def _app(fails: int | None = None) -> ClientApp:
    """Answers with the partition that it was asked to play."""
    app = ClientApp(mods=[play_partition])

    @app.train()
    def train(message: Message, context: Context) -> Message:
        partition = context.node_config[PARTITION]
        if partition == fails:
            raise ValueError("out of patience")
        metrics = MetricRecord({"num-examples": 1, "partition": partition})
        return Message(RecordDict({"arrays": ArrayRecord(), "metrics": metrics}), reply_to=message)

    @app.query("share")
    def share(message: Message, context: Context) -> Message:
        if context.node_config[PARTITION] == fails:
            raise ValueError("no answer")
        records = [*message.content, str(context.node_config[PARTITION])]
        return Message(RecordDict({"heard": ConfigRecord({"records": records})}), reply_to=message)

    return app


def _answers(nodes: int, fails: int | None = None, transit=None) -> list[tuple[int, int]]:
    """Who answered, and as which partition."""
    grid = PartitionGrid(SerialGrid(_app(fails), nodes, transit=transit), CLIENTS)
    strategy = FedAvg(fraction_evaluate=0.0, min_train_nodes=CLIENTS, min_available_nodes=CLIENTS)
    sent = strategy.configure_train(1, ArrayRecord(), ConfigRecord({"lr": 0.1}), grid)
    replies = list(grid.send_and_receive(sent))
    assert len(grid.networks) == CLIENTS
    return [(reply.metadata.src_node_id, reply.content["metrics"]["partition"]) for reply in replies]


@pytest.mark.parametrize("nodes", [1, 2, 5, 9])
def test_every_client_is_played_once_whatever_supernodes_there_are(nodes):
    assert _answers(nodes) == [(client + 1, client) for client in range(CLIENTS)]


def test_the_order_of_the_replies_does_not_matter():
    assert _answers(3, transit=lambda replies: replies[::-1]) == _answers(3)


def test_what_the_strategy_sends_is_not_changed():
    grid = PartitionGrid(SerialGrid(_app(), 2), CLIENTS)
    config = ConfigRecord({"server-round": 1})
    message = grid.create_message(RecordDict({"arrays": ArrayRecord(), "config": config}), "train", 3, "")
    list(grid.send_and_receive([message]))
    assert (dict(config), message.metadata.dst_node_id) == ({"server-round": 1}, 3)


def _query(grid: PartitionGrid, groups: str) -> list[Message]:
    asked = [
        grid.create_message(RecordDict({"question": ConfigRecord()}), "query.share", client + 1, group)
        for client in range(CLIENTS)
        for group in groups
    ]
    return list(grid.send_and_receive(asked))


def test_a_query_reaches_the_client_it_is_for_and_comes_back_with_its_group():
    answers = _query(PartitionGrid(SerialGrid(_app(), 2, transit=lambda replies: replies[::-1]), CLIENTS), "ab")
    assert [(each.metadata.src_node_id, each.metadata.group_id) for each in answers] == [
        (client + 1, group) for client in range(CLIENTS) for group in "ab"
    ]
    assert [each.content["heard"]["records"] for each in answers] == [
        ["question", str(client)] for client in range(CLIENTS) for _ in "ab"
    ]


def test_a_client_may_refuse_a_query():
    answers = _query(PartitionGrid(SerialGrid(_app(fails=1), CLIENTS), CLIENTS), "a")
    assert [each.has_error() for each in answers] == [False, True, False, False, False]


def test_a_client_that_raises_ends_the_run_with_its_reason():
    with pytest.raises(SimulationError, match="client 3 failed: ValueError: out of patience"):
        _answers(2, fails=3)


def test_a_client_that_does_not_answer_ends_the_run():
    with pytest.raises(SimulationError, match="2 of 5 clients did not answer"):
        _answers(5, transit=lambda replies: replies[2:])


def test_no_supernode_is_an_error():
    alone = SerialGrid(_app(None), 1)
    alone.contexts.clear()
    with pytest.raises(SimulationError, match="no SuperNode is connected"):
        PartitionGrid(alone, CLIENTS).push_messages([])
