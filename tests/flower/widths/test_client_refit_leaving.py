"""Refits at several widths: clients that leave or fail between exchanges, and which model's refits are kept."""

from __future__ import annotations

import time

import pytest
import torch
from flwr.app import ArrayRecord
from flwr.clientapp import ClientApp

from c2m3_fl.core.state_dicts import same
from c2m3_fl.errors import SpecError
from c2m3_fl.flower import C2M3, server
from c2m3_fl.flower.deploying import refit_widths
from c2m3_fl.flower.incoming.records import from_params, to_params
from c2m3_fl.flower.queries.exchanges import Exchanges
from tests.flower.federation import EXAMPLE, mlp, share
from tests.flower.widths.federation import WIDTHS, narrow
from tests.flower.widths.refits import ALL, answering, federation, normed, one_round, round_of

START = mlp().state_dict()
REPLIES = [narrow(width, seed + 1) for seed, width in enumerate(WIDTHS)]


def asking(**options):
    """A strategy that knows who has which width."""
    strategy = federation(recalibrate=ALL, **options)
    strategy.server.resizing.note({1: 0, 2: 1, 3: 2})
    return strategy


@pytest.fixture
def asked(monkeypatch):
    """By exchange, whom it asks."""
    found, messages = [], Exchanges._messages

    def heard(self, exchange, merged, nodes, **more):
        found.append(sorted(nodes))
        return messages(self, exchange, merged, nodes, **more)

    monkeypatch.setattr(Exchanges, "_messages", heard)
    return found


def test_who_leaves_a_refit_before_its_end_is_not_asked_for_the_next(asked):
    """Three exchanges of each refit; node 1 answers two in all and node 2 five."""
    last = {1: 2, 2: 5, 3: 9}

    def transit(replies):
        return [each for each in replies if len(asked) <= last[each.metadata.src_node_id]]

    one_round(asking(), answering(), REPLIES, START, transit=transit)
    assert asked == [[1, 2, 3]] * 3 + [[2, 3]] * 3 + [[3]] * 3


def test_what_is_wrong_with_answers_about_a_restriction_is_said_with_its_width(asked, caplog):
    """Node 2 answers NaN from the fourth exchange on, and node 3 sums that are too large."""

    def broken(replies):
        for each in replies:
            factor = {2: torch.nan, 3: 1e6}.get(each.metadata.src_node_id, 1)
            for record in each.content.array_records.values() if len(asked) > 3 else ():
                given = to_params(record)
                floats = {name: value * factor for name, value in given.items() if value.numel() > 1}  # no counts
                record.update(from_params({**given, **floats}))
        return replies

    one_round(asking(), answering(), REPLIES, START, transit=broken)
    assert "no sums of 0 for the model at the width of sizes[0] from node 2: " in caplog.text
    assert "node 3's sums of 0 for the model at the width of sizes[0] are left out: " in caplog.text


def test_what_refits_of_restrictions_cost_and_how_many_failed_is_counted(monkeypatch):
    monkeypatch.setattr(server, "refit_widths", lambda *_: time.sleep(0.5) or 2)
    _, found = round_of(asking(diagnostics=True), answering(), REPLIES, START)
    assert found["c2m3-failed-candidates"] == 2
    assert found["c2m3-repair-seconds"] > 0.5


def test_a_restrictions_report_has_the_strengths_that_were_asked_for(monkeypatch):
    """The fit reads fewer inputs than the operator has, and strengths are relative to those alone."""
    reports, whole = [], refit_widths.refit_by_clients

    def heard(*given, **more):
        found = whole(*given, **more)
        reports.append(found.report)
        return found

    monkeypatch.setattr(refit_widths, "refit_by_clients", heard)
    one_round(asking(), answering(), REPLIES, START)
    for report in reports[1:]:
        strengths = {each.fit.strength for each in report.operators if each.fit is not None}
        assert strengths & {*ALL.strengths} == strengths - {float("inf")} != set()
    assert len(reports) == 3


def test_refits_of_a_model_are_kept_until_another_one_is_refit():
    resizing, models = asking().server.resizing, [mlp(seed).state_dict() for seed in range(3)]

    def kept(params):
        found = resizing.cuts(params, deployed=True)
        return [place for place in (1, 2) if not same(found.params(place), plain(params, place))]

    def plain(params, place):
        return federation().server.resizing.cuts(params, deployed=True).params(place)

    resizing.keep(models[0], {1: narrow(16, 1), 2: narrow(8, 2)})
    resizing.keep(models[0], {1: narrow(16, 3)})
    resizing.keep(models[0], {})
    found = resizing.cuts(models[0], deployed=True)
    assert same(found.params(1), narrow(16, 3))
    assert same(found.params(2), narrow(8, 2))
    resizing.keep(models[1], {2: narrow(8, 4)})
    assert [kept(each) for each in models] == [[], [2], []]
    resizing.keep(models[2], {})
    assert [kept(each) for each in models] == [[], [], []]


def test_refits_belong_to_a_model_in_whatever_precision_it_is_given(caplog):
    strategy, params = asking(), mlp(5).state_dict()
    strategy.server.resizing.keep(params, {1: narrow(16, 1), 2: narrow(8, 2)})
    found = strategy.at_width(from_params({name: value.double() for name, value in params.items()}), 0)
    assert same(to_params(found), narrow(16, 1))
    text = "the clients' refits are of another model than these arrays"
    assert text not in caplog.text
    strategy.at_width(ArrayRecord(START), 0)
    assert caplog.text.count(text) == 1
    asking().at_width(ArrayRecord(START), 0)
    assert caplog.text.count(text) == 1


def test_a_state_that_is_refused_changes_nothing():
    strategy = asking()
    one_round(strategy, answering(), REPLIES, START)
    other = C2M3(model=mlp(), sizes=[mlp(0, WIDTHS[2])], example_inputs=EXAMPLE, recalibrate=ALL)
    other.server.resizing.note({7: 1})
    one_round(other, ClientApp(), [narrow(32, 4)] * 2, START, examples=(1, 2))
    other.setup.aligner.memory.remember(9, {name: torch.arange(32).flip(0) for name in other.setup.spec.groups})
    before, state = other.state_dict(), strategy.state_dict()
    wrong = [
        state,  # of other sizes
        {name: value for name, value in state.items() if not name.startswith("widths/")}
        | {"0/9/no-group": before["two-models/stopped"]},
        {"two-models/unknown": before["two-models/stopped"]},
    ]
    for each in wrong:
        with pytest.raises(SpecError):
            other.load_state_dict(each)
        after = other.state_dict()
        assert after.keys() == before.keys()
        assert same(before, after)


@torch.no_grad()
def test_batch_norm_of_channels_that_no_answering_client_has_is_that_of_the_answering_clients_data():
    """The client of the full width is silent: channels that it alone has keep their weights, not their statistics."""
    strategy = federation(normed, recalibrate=ALL, feedback="never")
    strategy.server.resizing.note({1: 0, 2: 1, 3: 2})
    replies = [normed(seed + 1, width).state_dict() for seed, width in enumerate(WIDTHS)]

    def transit(answers):
        return [each for each in answers if each.metadata.src_node_id != 1]

    sent = normed().state_dict()
    found = to_params(one_round(strategy, answering(normed), replies, sent, transit=transit))
    model, before = normed().eval(), to_params(strategy.trajectory)
    model.load_state_dict(found)
    for layer in (1, 4):
        alone = (found[f"{layer}.weight"] == before[f"{layer}.weight"]).flatten(1).all(1)
        rows = [model[: layer + 1](_images(node)) for node in (2, 3)]
        mean, square = (
            sum(share * each.pow(power).mean((0, 2, 3)) for share, each in zip((0.4, 0.6), rows, strict=True))
            for power in (1, 2)
        )
        norm = model[layer + 1]
        assert 0 < int(alone.sum()) < len(alone)
        torch.testing.assert_close(norm.running_mean[alone], mean[alone], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(norm.running_var[alone], (square - mean.square())[alone], rtol=1e-4, atol=1e-5)


def _images(node):
    context = type("Context", (), {"node_config": {"partition-id": node - 1}})
    return torch.cat([images for images, _ in share(context)])
