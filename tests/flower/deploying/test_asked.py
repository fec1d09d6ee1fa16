"""Who is asked for a deployment: the clients of the round, and others that are connected."""

from __future__ import annotations

import pytest
from flwr.app import ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp.strategy import FedAvg

from c2m3_fl.flower.deploying import deployment
from c2m3_fl.flower.incoming.records import from_params
from c2m3_fl.flower.queries.labels import ACTION
from c2m3_fl.flower.resuming.resumable import Resumable
from c2m3_fl.flower.serial_grid import SerialGrid
from c2m3_fl.flower.strategy import C2M3
from tests.flower.deploying.test_candidates import app, deployed
from tests.flower.federation import EXAMPLE, answering, digits_app, mlp, own_loss

NODES = 9
ROUND = {1, 2, 3}


class Some(FedAvg):
    """Trains the first three clients."""

    def configure_train(self, *given):
        return [each for each in super().configure_train(*given) if each.metadata.dst_node_id in ROUND]


class Sealed(SerialGrid):
    """Cannot say who is connected once a round runs."""

    running = False

    def get_node_ids(self):
        if self.running:
            raise ConnectionError("unavailable")
        return super().get_node_ids()

    def send_and_receive(self, messages, **options):
        found = list(super().send_and_receive(messages, **options))
        self.running = True
        return found


def played(*, lost=(), grid=SerialGrid):
    """One round; the result, and who was asked for labels and for evaluations."""
    asked = {}

    def heard(replies):
        for each in replies:
            asked.setdefault(each.metadata.message_type, set()).add(each.metadata.src_node_id)
        return [each for each in replies if each.metadata.src_node_id not in lost]

    strategy = C2M3(Some(fraction_evaluate=0.0), model=mlp(), example_inputs=EXAMPLE, diagnostics=True)
    start = from_params(mlp().state_dict())
    result = strategy.start(grid(app(), NODES, transit=heard), start, num_rounds=1)
    return result, asked.get(f"query.{ACTION}", set()), asked.get("evaluate", set())


def test_clients_that_did_not_train_in_the_round_answer_for_the_head_and_judge():
    result, labels, judges = played()
    assert labels == judges == set(range(1, NODES + 1))
    assert deployed(result, 1)[0] == "head"
    assert result.train_metrics_clientapp[1]["c2m3-replies"] == len(ROUND)
    assert result.train_metrics_clientapp[1]["c2m3-judge-voters/head"] == NODES


def test_a_client_that_was_sampled_and_did_not_reply_is_not_asked():
    _, labels, judges = played(lost={2})
    assert labels == judges == set(range(1, NODES + 1)) - {2}


def test_of_many_others_some_are_drawn_and_the_same_ones_again(monkeypatch):
    monkeypatch.setattr(deployment, "_ASKED", 5)
    (_, labels, judges), (_, again, _) = played(), played()
    assert labels == judges == again
    assert len(labels) == 5
    assert labels > ROUND


def test_where_more_than_that_have_trained_nobody_else_is_asked(monkeypatch):
    monkeypatch.setattr(deployment, "_ASKED", 2)
    _, labels, judges = played()
    assert labels == judges == ROUND


def test_a_grid_that_cannot_say_who_is_connected_leaves_the_clients_of_the_round(caplog):
    result, labels, judges = played(grid=Sealed)
    assert labels == judges == ROUND
    assert deployed(result, 1)[0] == "head"
    (line,) = [text for text in caplog.messages if "only the clients of this round" in text]
    assert "ConnectionError: unavailable" in line


@pytest.mark.parametrize("deploy", ["last", 3])
def test_in_rounds_that_do_not_deploy_nobody_is_asked(deploy):
    seen = []
    strategy = C2M3(Some(fraction_evaluate=0.0), model=mlp(), example_inputs=EXAMPLE, deploy=deploy)
    grid = SerialGrid(
        app(), NODES, transit=lambda replies: seen.extend(m.metadata.message_type for m in replies) or replies
    )
    strategy.start(grid, from_params(mlp().state_dict()), num_rounds=2)
    before, _ = "".join("t" if kind == "train" else "q" for kind in seen).rsplit("t", 1)
    assert before == "t" * (2 * len(ROUND) - 1)


@pytest.mark.parametrize("resumable", [False, True])
def test_clients_that_judge_are_sent_the_users_evaluate_config(resumable, tmp_path):
    told, found = [], digits_app(epochs=1, rate=0.02, evaluates="")

    @found.evaluate()
    def evaluate(message, context):
        told.append(dict(message.content["config"]))
        metrics = MetricRecord({"num-examples": 1, "loss": own_loss(mlp, message, context)})
        return Message(RecordDict({"metrics": metrics}), reply_to=message)

    config = ConfigRecord({"batch-size": 8, "split": "held out"})
    strategy = C2M3(FedAvg(fraction_evaluate=0.0), model=mlp(), example_inputs=EXAMPLE, deploy="every")
    outer = Resumable(strategy, tmp_path) if resumable else strategy
    grid, start = SerialGrid(answering(app=found), 3), from_params(mlp().state_dict())
    result = outer.start(grid, start, num_rounds=2, evaluate_config=config)
    assert deployed(result, 1)[0] == deployed(result, 2)[0] == "head"
    expected = [{**config, "server-round": current} for current in (1, 2)]
    assert [each for each in expected if each in told] == expected
    assert all(each in expected for each in told)
    assert dict(config) == {"batch-size": 8, "split": "held out"}
