"""Clients judge with their own evaluation, as Flower would send it, and no one of them decides alone."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from flwr.app import ConfigRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import FedAvg

from c2m3_fl.errors import ConfigError
from c2m3_fl.flower.incoming.records import from_params, to_params
from c2m3_fl.flower.judging.judge import ClientJudge, judge_candidates, report_verdict
from c2m3_fl.flower.serial_grid import SerialGrid

CANDIDATES = {"aggregate": {"w": torch.tensor([2.0])}, "head": {"w": torch.tensor([1.0])}}
WORSE = {"aggregate": {"w": torch.tensor([1.0])}, "head": {"w": torch.tensor([2.0])}}


def metrics(loss, **more):
    return {"num-examples": 10, "eval_loss": loss, **more}


def evaluating(answer=metrics, liar=None, seen=None):
    """Clients whose loss is the candidate's only number; node 3 answers with what `liar` says of it."""
    app = ClientApp()

    @app.evaluate()
    def evaluate(message, context):
        if seen is not None:
            seen.append(message)
        value = float(to_params(message.content["arrays"])["w"])
        found = (liar if liar is not None and context.node_id == 3 else answer)(value)
        return Message(RecordDict({"metrics": MetricRecord(found)}), reply_to=message)

    return app


def judged(app, candidates=None, nodes=3, options=None, transit=None, **more):
    grid = SerialGrid(app, nodes, transit=transit)
    return judge_candidates(
        options or ClientJudge(), grid, list(range(1, nodes + 1)), candidates or CANDIDATES, round_number=4, **more
    )


def test_the_better_candidate_is_deployed_and_the_numbers_say_why():
    verdict = judged(evaluating())
    assert (verdict.chosen, verdict.key, verdict.judged) == ("head", "eval_loss", True)
    assert [(each.loss, each.gain, each.robust_gain) for each in verdict.candidates] == [
        (2.0, None, None),
        (1.0, 1.0, 1.0),
    ]
    numbers = report_verdict(verdict)
    assert numbers["c2m3-judge-chosen/head"] == 1
    assert numbers["c2m3-judge-loss/aggregate"] == 2.0
    assert judged(evaluating(), WORSE).chosen == "aggregate"


def test_messages_are_those_of_an_ordinary_evaluation():
    seen, ordinary = [], []
    config = ConfigRecord({"batch-size": 8})
    judged(evaluating(seen=seen), config=config)
    grid = SerialGrid(evaluating(seen=ordinary), 3)
    arrays = from_params(CANDIDATES["aggregate"])
    grid.send_and_receive(FedAvg().configure_evaluate(4, arrays, ConfigRecord({"batch-size": 8}), grid))
    assert len(seen) == 6
    assert {message.metadata.message_type for message in seen} == {ordinary[0].metadata.message_type}
    assert [list(message.content) for message in seen] == [list(ordinary[0].content)] * 6
    assert all(dict(message.content["config"]) == dict(ordinary[0].content["config"]) for message in seen)
    assert seen[0].content["arrays"] == ordinary[0].content["arrays"]
    assert dict(config) == {"batch-size": 8}


def test_records_are_named_as_the_strategy_names_them():
    seen = []
    app = ClientApp()

    @app.evaluate()
    def evaluate(message, context):
        seen.append(list(message.content))
        return Message(RecordDict({"m": MetricRecord({"n": 1, "loss": 1.0})}), reply_to=message)

    judged(app, arrays_key="net", config_key="settings", weighted_by="n")
    assert seen == [["net", "settings"]] * 6


def test_the_global_random_states_stay_untouched():
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()  # noqa: NPY002  # is tested
    judged(evaluating(), nodes=9, options=ClientJudge(fraction=0.4))
    assert random.getstate() == before[0]
    assert np.random.get_state()[1].tolist() == before[1]  # noqa: NPY002  # as above
    assert torch.equal(torch.get_rng_state(), before[2])


def test_the_sample_depends_on_seed_and_round_and_not_on_the_order_of_the_nodes():
    nodes = list(range(100, 120))
    judge = ClientJudge(fraction=0.25)
    assert judge.sample(nodes, 1) == judge.sample(nodes[::-1], 1)
    assert len({tuple(judge.sample(nodes, number)) for number in range(1, 9)}) > 1
    assert [len(ClientJudge(fraction=0.01, least=least).sample(nodes[:4], 1)) for least in (1, 3, 9)] == [1, 3, 4]


LIES = {
    "a huge gain": lambda value: metrics({1.0: 1e300, 2.0: -1e300}[value]),
    "a huge gain of many": lambda value: metrics({1.0: 1e300, 2.0: -1e300}[value]) | {"num-examples": 2**53},
    "infinities": lambda value: metrics({1.0: float("inf"), 2.0: -float("inf")}[value]),
    "NaN": lambda value: metrics(float("nan")),
    "no loss": lambda value: {"num-examples": 10, "accuracy": 1.0},
    "a list": lambda value: metrics([-value] * 3),
    "no weight": lambda value: {"eval_loss": -value},
    "negative weight": lambda value: metrics(-value) | {"num-examples": -5},
    "other losses": lambda value: metrics(-value, loss=-value, a_loss=-value),
}


@pytest.mark.parametrize("lie", LIES)
@pytest.mark.parametrize("equally", [False, True])
def test_one_client_cannot_install_what_the_others_lose_by(lie, equally):
    assert judged(evaluating(liar=LIES[lie]), WORSE, equally=equally).chosen == "aggregate"


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("key", [None, "accuracy"])
def test_a_candidate_with_a_metric_that_is_not_finite_at_one_client_is_refused(value, key):
    def fails(candidate):
        return metrics(value, accuracy=value) if candidate == 1.0 else metrics(2.0, accuracy=0.5)

    honest = evaluating(lambda candidate: metrics(candidate, accuracy=1 / candidate), liar=fails)
    verdict = judged(honest, options=ClientJudge(key=key))
    assert (verdict.chosen, verdict.candidates[1].voters) == ("aggregate", 3)


@pytest.mark.parametrize("lie", ["infinities", "NaN", "no loss", "a list", "no weight", "negative weight"])
def test_answers_that_cannot_be_read_are_left_out(lie):
    verdict = judged(evaluating(liar=LIES[lie]))
    assert (verdict.chosen, verdict.candidates[1].voters) == ("head", 2)


def test_a_client_that_fails_or_answers_for_one_candidate_alone_is_left_out():
    def lost(replies):
        return [
            reply
            for reply in replies
            if (reply.metadata.src_node_id, reply.metadata.group_id) not in {(2, "1"), (4, "0")}
        ]

    assert judged(evaluating(), nodes=4, transit=lost).candidates[1].voters == 2
    assert judged(evaluating(liar=lambda value: 1 / 0), nodes=3).candidates[1].voters == 2


def test_faults_of_one_reason_are_one_line_for_all_candidates_and_clients(caplog):
    def fails(candidate):
        raise ValueError("no data here")

    judged(evaluating(fails, liar=metrics), nodes=5)  # node 3 answers
    (line,) = [text for text in caplog.messages if "no evaluation of" in text]
    assert line.startswith("\t> no evaluation of 'aggregate', 'head' from nodes 1, 2, 4")
    assert "no data here" in line


def test_a_metric_that_is_no_number_is_one_line_for_both_candidates(caplog):
    judged(evaluating(liar=lambda value: metrics([1.0])))
    (line,) = [text for text in caplog.messages if "no evaluation of" in text]
    assert (
        line == "\t> no evaluation of 'aggregate', 'head' from node 3: metric 'eval_loss' is [1.0], expected a number"
    )


def test_two_answers_of_one_client_about_one_candidate_count_as_none():
    def doubled(replies):
        return [*replies, *(reply for reply in replies if reply.metadata.src_node_id == 1)]

    assert judged(evaluating(), transit=doubled).candidates[1].voters == 2


def test_without_a_loss_nothing_is_judged():
    verdict = judged(evaluating(lambda value: {"num-examples": 10, "accuracy": value}))
    assert (verdict.chosen, verdict.judged, verdict.key) == ("aggregate", False, "")
    assert "judge_key" in verdict.reason
    assert not judged(ClientApp()).judged


@pytest.mark.parametrize(
    ("key", "chosen"),
    [
        ("accuracy", "aggregate"),
        ("-accuracy", "head"),
        ("rmse", "head"),
        ("+rmse", "aggregate"),
        ("error_rate", "head"),
    ],
)
def test_a_named_metric_is_minimised_or_maximised_as_its_name_or_sign_says(key, chosen):
    name = key.lstrip("+-")
    verdict = judged(evaluating(lambda value: {"num-examples": 1, name: value}), options=ClientJudge(key=key))
    assert verdict.chosen == chosen


def test_weights_are_the_clients_examples_unless_the_strategy_ignores_them():
    def answer(value):
        return {"num-examples": 1, "loss": 0.0 if value == 1.0 else 1.0}

    def liar(value):
        return {"num-examples": 5, "loss": 1.0 - answer(value)["loss"] / 2 if value == 1.0 else 0.5}

    weighted = judged(evaluating(answer, liar)).candidates[1].gain
    assert weighted == pytest.approx((1 + 1 - 5 * 0.5) / 7)
    assert judged(evaluating(answer, liar), equally=True).candidates[1].gain == pytest.approx(1.5 / 3)


@pytest.mark.parametrize("wrong", [{"key": "-"}, {"fraction": 0.0}, {"fraction": 1.5}, {"least": 0}])
def test_options_out_of_range_are_refused(wrong):
    with pytest.raises(ConfigError, match=f"judge {next(iter(wrong))}"):
        ClientJudge(**wrong)
