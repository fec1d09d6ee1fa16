"""Clients that change their width, and replies whose width must not be remembered."""

from __future__ import annotations

import pytest
import torch
from flwr.app import ArrayRecord

from c2m3_fl.flower import SerialGrid
from c2m3_fl.flower.incoming.records import to_params
from tests.flower.federation import mlp, reply, send
from tests.flower.widths.federation import WIDTHS, narrow, shapes, sized, sized_app

START = ArrayRecord(mlp().state_dict())


def _garbage(width):
    return {name: value * torch.nan for name, value in narrow(width, 0).items()}


@pytest.fixture
def strategy():
    found = sized()
    found.server.resizing.silent |= {1, 2, 3}
    send(found, mlp().state_dict(), nodes=3)
    return found


def test_the_width_of_a_reply_that_cannot_be_used_is_not_remembered(strategy):
    huge = {name: value + 1e30 for name, value in narrow(8, 0).items()}
    strategy.aggregate_train(1, [reply(1, mlp().state_dict()), reply(2, _garbage(16)), reply(3, huge)])
    assert dict(strategy.server.resizing.places) == {1: 0}


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize(("sent", "kept"), [(0, 0), (1, 1), (2, 0)])
def test_of_replies_of_several_widths_that_of_the_sent_width_counts_else_the_widest(strategy, sent, kept, turned):
    strategy.server.resizing.note({1: sent})
    pair = [reply(1, mlp().state_dict()), reply(1, narrow(16, 0))]
    _, metrics = strategy.aggregate_train(1, [*(pair[::-1] if turned else pair), reply(2, mlp().state_dict())])
    assert (metrics["c2m3-dropped"], metrics["c2m3-replies"]) == (1, 2)
    assert dict(strategy.server.resizing.places) == {1: kept, 2: 0}


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("bad", [32, 16])
def test_garbage_of_one_width_does_not_displace_a_reply_of_another(strategy, bad, turned):
    good = {32: 16, 16: 32}[bad]
    strategy.server.resizing.note({1: WIDTHS.index(bad)})
    pair = [reply(1, _garbage(bad)), reply(1, narrow(good, 0))]
    _, metrics = strategy.aggregate_train(1, [*(pair[::-1] if turned else pair), reply(2, mlp().state_dict())])
    assert (metrics["c2m3-dropped"], metrics["c2m3-replies"]) == (1, 2)
    assert dict(strategy.server.resizing.places) == {1: WIDTHS.index(good), 2: 0}


def test_a_client_that_replies_with_another_width_is_sent_that_one_next(strategy):
    strategy.server.resizing.note({1: 1})
    strategy.aggregate_train(1, [reply(1, narrow(8, 0)), reply(2, mlp().state_dict())])
    assert dict(strategy.server.resizing.places) == {1: 2, 2: 0}


@pytest.mark.parametrize("tells", [True, False])
def test_a_client_that_starts_again_with_another_width_is_asked_again_once_it_has_failed(tells):
    """Before its second round the second client becomes narrower, and what it is sent no longer fits."""
    widths, strategy, queries, sent = [32, 16], sized(), [], []
    grid = SerialGrid(sized_app(widths, tells=tells, independent=not tells, epochs=0), 2, transit=list)
    receive = grid.send_and_receive

    def heard(messages, **options):
        messages = list(messages)
        for each in messages:
            if each.metadata.message_type.startswith("query"):
                queries.append(each.metadata.dst_node_id)
            if each.metadata.message_type == "train" and each.metadata.dst_node_id == 2:
                sent.append(shapes(each.content["arrays"])[0][0])
                widths[1] = 8 if len(sent) > 1 else 16
        return receive(messages, **options)

    grid.send_and_receive = heard
    strategy.start(grid=grid, initial_arrays=START, num_rounds=4)
    if tells:
        assert (sent, sorted(queries)) == ([16, 16, 8, 8], [1, 2, 2])
        assert dict(strategy.server.resizing.places) == {1: 0, 2: 2}
    else:  # it does not say which width it has, so it is sent what it had
        assert (sent, sorted(queries)) == ([32, 16, 16, 16], [1, 2, 2, 2, 2])


def test_a_deployed_model_at_a_width_fits_that_width(strategy):
    found = strategy.at_width(START, 1)
    assert mlp(0, 8).load_state_dict(to_params(found))
