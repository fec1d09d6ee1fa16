"""The head from labels as a candidate that nobody asked for: deployed only where the clients judge it best."""

from __future__ import annotations

import pytest
from flwr.clientapp import ClientApp
from torch import nn

from c2m3_fl.errors import TraceError
from c2m3_fl.flower.metrics import reported
from c2m3_fl.flower.options import brief
from c2m3_fl.flower.queries.head import Head
from c2m3_fl.flower.queries.labels import ACTION
from c2m3_fl.flower.queries.refit import ClientRefit, RegMean
from c2m3_fl.flower.strategy import C2M3
from c2m3_fl.merging.recalibrate.auto import Auto
from c2m3_fl.merging.recalibrate.refit import Refit
from c2m3_fl.merging.recalibrate.repair import Repair
from simulations.examples.own_network import Branching
from simulations.examples.own_network import spec as by_hand
from tests.flower.deploying.test_candidates import HELD, app, deployed, played
from tests.flower.federation import EXAMPLE, accuracy, calibration, digits_app, mlp, same

LABELS = f"query.{ACTION}"
SAID = "no head from labels among the candidates"


def queries(seen):
    return sum(kind == LABELS for kind, _ in seen)


def test_by_default_the_head_is_a_candidate_and_deployed_where_the_clients_judge_it_best(caplog):
    strategy, result, drawn = played({"calibration": calibration()})
    made = {"repair": "repair", "refit": "refit", "head": "head from labels", "refit+head": "head from labels"}
    for name, method in made.items():
        assert caplog.messages.count(f"\t> candidate '{name}': {method}") == 1
    plain, expected, draws = played({"calibration": calibration(), "head": None})
    assert {"head", "refit+head"} <= set(deployed(result, 2))
    assert deployed(result, 2)[0].endswith("head")
    assert accuracy(mlp, result.arrays) > accuracy(mlp, expected.arrays) + 0.1
    assert same(strategy.trajectory, plain.trajectory)
    assert drawn == draws


def test_without_calibration_data_the_head_is_a_candidate_too():
    strategy, result, drawn = played({})
    plain, expected, draws = played({"head": None})
    assert deployed(result, 2) == ["head", "aggregate", "previous"]
    assert result.train_metrics_clientapp[2]["c2m3-judge-chosen/head"] == 1
    assert accuracy(mlp, result.arrays) > accuracy(mlp, expected.arrays) + 0.1
    assert same(strategy.trajectory, plain.trajectory)
    assert same(plain.trajectory, expected.arrays)
    assert drawn == draws


def test_what_was_deployed_and_the_losses_that_decided_it_are_among_the_metrics():
    _, result, _ = played({})
    told = reported(dict(result.train_metrics_clientapp[2]), every=False)
    assert told["c2m3-deployed/head"] == 1
    losses = {name: told[f"c2m3-judge-loss/{name}"] for name in ("aggregate", "head", "previous")}
    assert min(losses, key=losses.get) == "head"
    assert not [name for name in told if name.startswith(("c2m3-judge-voters", "c2m3-head"))]


@pytest.mark.parametrize("options", [{}, {"calibration": calibration()}], ids=["alone", "with calibration data"])
def test_without_a_judgement_no_head_is_deployed(options):
    _, found, _ = played(options, clients_app=app(evaluates=""))
    _, expected, _ = played({**options, "head": None}, clients_app=app(evaluates=""))
    assert "head" in deployed(found, 2)
    assert same(found.arrays, expected.arrays)


def test_without_calibration_data_clients_that_do_not_answer_are_asked_once_and_one_line_says_so(caplog):
    """What is returned is then the wrapped strategy's, bit for bit: `test_stock` compares it with bare strategies."""
    silent, seen = digits_app(epochs=1, rate=0.02, evaluates="loss"), []
    _, found, drawn = played({}, clients_app=silent, seen=seen)
    (line,) = [text for text in caplog.messages if "answer_statistics" in text]
    assert line == f"\t> {SAID}: the clients' app does not answer for labels; answer_statistics in it does"
    _, expected, draws = played({"head": None}, clients_app=silent)
    assert [kind for kind, _ in seen if kind != "train"] == [LABELS] * 3  # one message to each of three clients
    assert same(found.arrays, expected.arrays)
    assert drawn == draws
    names = [list(each.train_metrics_clientapp[2]) for each in (found, expected)]
    assert names[0] == names[1]


def test_where_the_last_round_is_lost_the_head_of_its_trajectory_is_still_a_candidate():
    current = [0]

    def last_round_lost(replies):
        current[0] += any(each.metadata.message_type == "train" for each in replies)
        return [each for each in replies if current[0] < 2 or each.metadata.message_type != "train"]

    _, expected, _ = played({}, rounds=1, fraction=1.0)
    _, result, _ = played({}, transit=last_round_lost, fraction=1.0)
    assert deployed(result, 2)[0].endswith("head")
    assert same(result.arrays, expected.arrays)


@pytest.mark.parametrize("deploy", ["last", "every"])
def test_clients_that_do_not_answer_are_asked_once_and_that_is_no_failure(deploy, caplog):
    silent = digits_app(epochs=1, rate=0.02, evaluates="loss")
    seen = []
    options = {"calibration": calibration(), "deploy": deploy}
    _, found, _ = played(options, clients_app=silent, seen=seen)
    _, expected, _ = played({**options, "head": None}, clients_app=silent)
    assert queries(seen) == 3  # each client in the first deployment, and none later
    assert [text for text in caplog.messages if SAID in text and "answer_statistics" in text]
    assert sum(SAID in text for text in caplog.messages) == 1
    assert found.train_metrics_clientapp[2]["c2m3-failed-candidates"] == 0
    assert same(found.arrays, expected.arrays)


def test_one_client_that_answers_garbage_does_not_disable_the_head():
    garbled = []

    def garble(replies):
        for each in replies:
            node = each.metadata.src_node_id
            if each.metadata.message_type == LABELS and node in (garbled or [node]):
                garbled.append(node)
                each.content.clear()
        return replies

    _, result, _ = played({"calibration": calibration()}, transit=garble)
    assert len(garbled) == 3  # when it is asked first, and for either base
    assert "head" in deployed(result, 2)


@pytest.mark.parametrize("answers", [1, 2, 4])  # the last round's nodes
def test_clients_without_the_query_beside_others_that_answer_do_not_disable_the_head(answers, caplog):
    silent, loud, mixed = digits_app(epochs=1, rate=0.02, evaluates="loss"), app(), ClientApp()
    for kind in ("train", "evaluate"):

        @getattr(mixed, kind)()
        def usual(message, context):
            return loud(message, context)

    @mixed.query(ACTION)
    def query(message, context):
        return (loud if context.node_id == answers else silent)(message, context)

    _, result, _ = played({"calibration": calibration()}, clients_app=mixed)
    assert "head" in deployed(result, 2)
    assert not [text for text in caplog.messages if SAID in text]


def test_clients_that_fail_in_one_round_are_asked_again_in_the_next(caplog):
    """As where their data are not loaded yet."""
    loud, late, rounds = app(), ClientApp(), [0]
    for kind in ("train", "evaluate"):

        @getattr(late, kind)()
        def usual(message, context):
            rounds[0] += message.metadata.message_type == "train"
            return loud(message, context)

    @late.query(ACTION)
    def query(message, context):
        if rounds[0] <= 3:
            raise RuntimeError("the data are not loaded yet")
        return loud(message, context)

    _, result, _ = played({"calibration": calibration(), "deploy": "every"}, clients_app=late)
    assert "head" not in deployed(result, 1)
    assert "head" in deployed(result, 2)
    assert not [text for text in caplog.messages if SAID in text]
    (line,) = [text for text in caplog.messages if "no head from labels in this round" in text]
    assert "the data are not loaded yet" in line


OFF = {
    "a recalibration by name": {"calibration": calibration(), "recalibrate": "repair"},
    "no recalibration, by name": {"recalibrate": "none"},
    "what differential privacy needs": {"alignment": "separate"},
    "labels on the server": {"calibration": HELD},
    "nobody judges": {"calibration": calibration(), "judge": None},
    "refused": {"calibration": calibration(), "head": None},
}


@pytest.mark.parametrize("options", OFF.values(), ids=OFF.keys())
def test_no_client_is_asked_for_its_labels_where(options):
    seen = []
    played({"deploy": "every", **options}, rounds=1, seen=seen)
    assert queries(seen) == 0


def test_outputs_that_are_no_class_scores_have_no_head():
    decoder = nn.Sequential(nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 64), nn.Sigmoid())
    assert C2M3(model=decoder, calibration=calibration()).setup.head is None


def test_a_network_that_cannot_be_traced_has_no_head_unless_it_is_asked_for():
    options = {"model": Branching(), "spec": by_hand(), "example_inputs": EXAMPLE}
    assert C2M3(**options).setup.head is None
    with pytest.raises(TraceError, match="cannot trace Branching"):
        C2M3(**options, head="labels")


def test_what_is_offered_is_said_and_what_was_asked_for_is_not_offered():
    offered = C2M3(model=mlp(), calibration=calibration()).setup
    assert offered.head == Head()
    assert "; Head(), the last layer from the clients' labels, where clients answer for their labels" in (
        offered.describe()
    )
    assert not offered.asks
    assert offered.describe().endswith("; the clients judge the candidates, where they can")
    labelled = C2M3(model=mlp(), calibration=HELD).setup.describe()
    assert labelled.endswith(f"with {len(HELD[0][0])} inputs on the server; the inputs' labels decide")
    asked = C2M3(model=mlp(), calibration=calibration(), head="labels").setup
    assert asked.asks == ["head"]
    assert C2M3(model=mlp(), example_inputs=EXAMPLE, recalibrate=ClientRefit()).setup.offered


@pytest.mark.parametrize("options", [Head(), ClientRefit(), RegMean(), Repair(), Refit(), Auto()])
def test_options_are_named_by_what_differs_from_the_defaults(options):
    assert brief(options) == f"{type(options).__name__}()"


def test_what_differs_is_said_and_objects_without_fields_say_what_they_say():
    assert brief(ClientRefit(exchanges=3, seed=1)) == "ClientRefit(seed=1, exchanges=3)"
    assert brief(Auto(repair=Repair(final=False))) == "Auto(repair=Repair(final=False))"
    assert brief(7) == "7"
