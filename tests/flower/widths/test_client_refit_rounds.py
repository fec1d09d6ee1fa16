"""Rounds with a refit from clients of several widths: who counts, what is sent, what survives a crash."""

from __future__ import annotations

import pytest
import torch
from flwr.app import ArrayRecord
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import FedAvg

from c2m3_fl.errors import SpecError
from c2m3_fl.flower import C2M3, Resumable, SerialGrid, answer_statistics
from c2m3_fl.flower.deploying import refit_widths
from c2m3_fl.flower.incoming.records import to_params
from tests.flower.federation import EXAMPLE, calibration, mlp, same, share
from tests.flower.interrupted import run
from tests.flower.widths.federation import WIDTHS, narrow, shapes, sized_app
from tests.flower.widths.refits import ALL, answering, federation, one_round

START = mlp().state_dict()
REPLIES = [narrow(width, seed + 1) for seed, width in enumerate(WIDTHS)]


def asking(**options):
    """A strategy that knows who has which width."""
    strategy = federation(recalibrate=ALL, **options)
    strategy.server.resizing.note({1: 0, 2: 1, 3: 2})
    return strategy


def restrictions(strategy, arrays):
    return [strategy.at_width(arrays, size) for size in (0, 1)]


def without(*nodes):
    return lambda replies: [each for each in replies if each.metadata.src_node_id not in nodes]


def by_width(context):
    return mlp(0, WIDTHS[int(context.node_config["partition-id"])])


@pytest.fixture(scope="module")
def refit():
    """A strategy after a round in which all three clients answered, and what it deployed."""
    strategy = asking()
    return strategy, one_round(strategy, answering(), REPLIES, START)


def test_a_client_that_can_run_its_own_width_alone_counts_as_not_answering(caplog):
    app = ClientApp()
    answer_statistics(app, model=by_width, data=share, first_layer=True)
    one, other = asking(), asking()
    found = one_round(one, app, REPLIES, START)
    expected = one_round(other, answering(), REPLIES, START, transit=without(2, 3))
    assert same(found, expected)
    assert all(map(same, restrictions(one, found), restrictions(other, expected)))
    told = [text for text in caplog.messages if "no sums from node 2" in text]
    assert len(told) == 3  # it is not asked about narrower widths
    assert told[0].endswith("the client failed: ParamsError: query: '0.weight' has shape (32, 64), expected (16, 64)")


def test_channels_that_no_answering_client_has_stay_as_they_are():
    strategy = asking(feedback="never")
    found = to_params(one_round(strategy, answering(), REPLIES, START, transit=without(1)))
    changed = (found["0.weight"] != to_params(strategy.trajectory)["0.weight"]).any(1)
    assert 0 < int(changed.sum()) <= 16 + 8


def test_without_any_answer_every_width_is_what_it_is_without_clients(caplog):
    plain, strategy = federation(), asking()
    plain.server.resizing.note({1: 0, 2: 1, 3: 2})
    expected, found = (one_round(each, ClientApp(), REPLIES, START) for each in (plain, strategy))
    assert same(found, expected)
    assert all(map(same, restrictions(strategy, found), restrictions(plain, expected)))
    told = [each.getMessage() for each in caplog.records if each.levelname == "ERROR"]
    assert len(told) == 1  # nobody is asked about narrower widths then
    assert "no client answered the query for sums" in told[0]


def test_a_width_whose_refit_fails_is_what_the_server_makes_of_it(caplog):
    """Of nine exchanges the last three are lost; the server holds data."""
    heard = []

    def transit(replies):
        heard.append(1)
        return replies if len(heard) <= 7 else []  # the first asks for nothing but widths

    strategy = asking(calibration=calibration())
    arrays = one_round(strategy, answering(), REPLIES, START, transit=transit)
    first, second = restrictions(strategy, arrays)
    assert "the model at the width of sizes[0] is refit by the clients" in caplog.text
    assert "the model at the width of sizes[1] is not refit by the clients: CalibrationError: no client" in caplog.text
    server = federation(calibration=calibration())
    assert not same(first, server.at_width(arrays, 0))
    assert same(second, server.at_width(arrays, 1))


def test_what_is_evaluated_is_refit_and_what_is_trained_is_not(caplog):
    strategy, sent = federation(recalibrate=ALL, feedback="never"), {}
    app = answering(app=sized_app(WIDTHS, epochs=1))
    grid = SerialGrid(app, 3, transit=list)
    receive = grid.send_and_receive

    def heard(messages, **options):
        messages = list(messages)
        for each in messages:
            if not each.metadata.message_type.startswith("query"):
                sent[each.metadata.message_type, each.metadata.dst_node_id] = each.content["arrays"]
        return receive(messages, **options)

    grid.send_and_receive = heard
    with caplog.at_level("INFO", logger="flwr"):
        result = strategy.start(grid=grid, initial_arrays=ArrayRecord(START), num_rounds=2)
    for size, found in enumerate(restrictions(strategy, result.arrays)):
        assert same(sent["evaluate", size + 2], found)
        assert shapes(found)[0] == (WIDTHS[size + 1], 64)
    units = strategy.server.resizing.cuts(to_params(result.arrays), deployed=False)
    assert not same(sent["evaluate", 2], strategy.at_width(sent["evaluate", 1], 1))
    assert not torch.equal(to_params(sent["evaluate", 2])["0.weight"], units.params(1)["0.weight"])
    assert "ClientRefit: 3 exchanges, then as many for each of 2 narrower widths; every client is sent" in caplog.text
    assert caplog.text.count("is refit by the clients") == 4


def test_with_clients_of_the_models_width_alone_nothing_is_different():
    replies = [narrow(32, seed + 1) for seed in range(3)]
    alone = C2M3(model=mlp(), example_inputs=EXAMPLE, deploy="every", recalibrate=ALL, head=None, judge=None)
    strategy = federation(recalibrate=ALL)
    strategy.server.resizing.note({1: 0, 2: 0, 3: 0})
    found, expected = (one_round(each, answering(), replies, START) for each in (strategy, alone))
    assert same(found, expected)


def test_padded_zeros_are_no_outliers_and_a_scaled_network_is_one(caplog):
    """One client of the model's width among six of the narrowest."""
    replies = [narrow(32, 1), *(narrow(8, seed) for seed in range(2, 8))]
    for scale, text in ((1, ""), (-5, "node 3 is not asked for sums: its weights are far from the others'")):
        caplog.clear()
        caplog.set_level("INFO", logger="flwr")
        strategy = federation(recalibrate=ALL)
        strategy.server.resizing.note({1: 0, **dict.fromkeys(range(2, 8), 2)})
        given = [
            each if place != 2 else {name: scale * value for name, value in each.items()}
            for place, each in enumerate(replies)
        ]
        one_round(strategy, answering(), given, START, examples=(10,) * 7)
        assert "then as many for each of 1 narrower width; " in caplog.text
        assert ("are left out" in caplog.text, "is not asked" in caplog.text) == (False, bool(text))
        assert text in caplog.text


def test_networks_of_a_far_narrower_width_are_not_far_for_that(monkeypatch):
    """Fewer inputs make larger weights: those of eight units are six times as large as those of 256."""
    asked = []
    monkeypatch.setattr(refit_widths, "refit_by_clients", lambda *_, owners, **more: asked.append(owners.far))
    widths = (256, 256, 256, 8)
    options = {"example_inputs": EXAMPLE, "deploy": "every", "max_steps": 1}
    strategy = C2M3(model=mlp(0, 256), sizes=[mlp(0, 8)], recalibrate=ALL, **options)
    strategy.server.resizing.note({1: 0, 2: 0, 3: 0, 4: 1})
    replies = [narrow(width, seed) for seed, width in enumerate(widths, 1)]
    one_round(strategy, ClientApp(), replies, mlp(0, 256).state_dict(), examples=(10,) * 4)
    assert asked == [()]


def test_a_scaled_network_that_is_alone_in_its_width_is_left_out_by_its_answers(caplog):
    replies = [*REPLIES[:2], {name: 100 * value for name, value in REPLIES[2].items()}]
    one_round(asking(), answering(), replies, START)
    told = [text.split(" are ")[0] for text in caplog.messages if "are left out" in text]
    assert told[:3] == [f"\t> node 3's sums of {place}" for place in (0, 2, 4)]


def test_a_pending_deployment_is_made_at_every_width_where_the_last_round_brings_nothing(refit):
    strategy = asking(deploy="last", feedback="never")
    strategy.begin_run(2)
    between = one_round(strategy, answering(), REPLIES, START)
    found = one_round(strategy, answering(), [], to_params(between), number=2)
    other, expected = refit
    assert same(found, expected)
    assert all(map(same, restrictions(strategy, found), restrictions(other, expected)))


def test_restrictions_that_clients_have_refit_are_saved_whatever_the_order_of_the_sizes(refit):
    strategy, arrays = refit
    state, expected = strategy.state_dict(), restrictions(strategy, arrays)
    again, turned, other = (
        C2M3(model=mlp(), sizes=[mlp(0, width) for width in widths], example_inputs=EXAMPLE, recalibrate=ALL)
        for widths in (WIDTHS[1:], WIDTHS[:0:-1], WIDTHS[2:])
    )
    for loaded in (again, turned):
        loaded.load_state_dict(dict(sorted(state.items())))
    assert all(map(same, restrictions(again, arrays), expected))
    assert all(map(same, restrictions(turned, arrays), expected[::-1]))
    assert not any(map(same, restrictions(federation(), arrays), expected))
    with pytest.raises(SpecError, match="other sizes"):
        other.load_state_dict({name: value for name, value in state.items() if "/refit" in name})


def test_a_run_that_is_taken_up_after_its_last_round_has_the_same_restrictions(tmp_path):
    app = answering(app=sized_app([32, 16, 8, 8, 16], epochs=1))
    one, other = (federation(inside=FedAvg(fraction_evaluate=0.0), recalibrate=ALL) for _ in range(2))
    whole = run(Resumable(one, tmp_path), mlp, rounds=1, app=app)
    resumed = run(Resumable(other, tmp_path), mlp, rounds=1, app=ClientApp())
    assert same(resumed.arrays, whole.arrays)
    assert all(map(same, restrictions(other, resumed.arrays), restrictions(one, whole.arrays)))
