"""The federation in one process behaves like Flower's own engines."""

from __future__ import annotations

import pytest
from flwr.app import Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import FedAvg

from c2m3_fl.errors import ConfigError
from c2m3_fl.flower.incoming.records import from_params
from c2m3_fl.flower.serial_grid import SerialGrid
from tests.flower.federation import digits_app, mlp


def counting_app():
    app = ClientApp()

    @app.query()
    def count(message: Message, context: Context) -> Message:
        record = context.state.setdefault("seen", MetricRecord({"times": 0}))
        record["times"] += 1
        context.state["seen"] = record
        config = {"partition": int(context.node_config["partition-id"]), "times": record["times"]}
        return Message(RecordDict({"answer": MetricRecord(config)}), reply_to=message)

    return app


def ask(grid, nodes):
    return list(grid.send_and_receive([Message(RecordDict(), node, "query") for node in nodes]))


def test_every_node_keeps_a_context_of_its_own():
    grid = SerialGrid(counting_app(), [7, 70])
    ask(grid, [7, 70])
    answers = {each.metadata.src_node_id: dict(each.content["answer"]) for each in ask(grid, [70])}
    assert answers == {70: {"partition": 1, "times": 2}}


def test_replies_are_addressed_like_flowers():
    grid = SerialGrid(counting_app(), 2)
    message = grid.create_message(RecordDict(), "query", 2, "group")
    (name,) = grid.push_messages([message])
    (reply,) = grid.pull_messages([name])
    assert reply.metadata.reply_to_message_id == name == message.metadata.message_id
    assert (reply.metadata.src_node_id, reply.metadata.dst_node_id) == (2, 0)
    assert reply.metadata.group_id == "group"
    assert list(grid.pull_messages([name])) == [], "a reply is pulled once"


def test_a_client_that_raises_gives_an_error_reply():
    (reply,) = ask(SerialGrid(ClientApp(), 1), [1])
    assert reply.has_error()
    assert "ValueError: No query function registered" in reply.error.reason


def test_run_config_reaches_the_clients():
    seen = []
    app = ClientApp()

    @app.query()
    def look(message: Message, context: Context) -> Message:
        seen.append(context.run_config["rate"])
        return Message(RecordDict(), reply_to=message)

    ask(SerialGrid(app, 1, run_config={"rate": 0.5}), [1])
    assert seen == [0.5]


def test_flowers_own_strategy_runs_in_it():
    grid = SerialGrid(digits_app(epochs=1), 3)
    result = FedAvg().start(grid, from_params(mlp().state_dict()), num_rounds=2)
    assert sorted(result.train_metrics_clientapp) == [1, 2]
    assert sorted(result.evaluate_metrics_clientapp) == [1, 2]


def test_it_has_one_run_of_its_own():
    grid = SerialGrid(ClientApp(), 1)
    assert grid.run.run_id == 1
    with pytest.raises(NotImplementedError):
        grid.set_run(grid.run)


@pytest.mark.parametrize("nodes", [0, True, "3", [], ["a"]])
def test_what_is_no_number_of_nodes_is_refused(nodes):
    with pytest.raises(ConfigError, match="expected how many, at least one, or a list of their ids"):
        SerialGrid(ClientApp(), nodes)


def test_a_strategy_that_waits_for_nodes_that_cannot_come_is_told():
    with pytest.raises(
        ConfigError, match=r"waits for more nodes than the 1 of .*: pass more .* FedAvg\(min_available_nodes=1,"
    ):
        FedAvg().start(SerialGrid(digits_app(epochs=1), 1), from_params(mlp().state_dict()), num_rounds=1)
