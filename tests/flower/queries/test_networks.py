"""Networks are sent to a client once, then what has changed; what a client lost or altered is sent again."""

from __future__ import annotations

import pytest
import torch
from flwr.app import ArrayRecord

from c2m3_fl.flower.incoming.records import from_params, to_params
from c2m3_fl.flower.queries.refit import ClientRefit, price, refit_by_clients
from c2m3_fl.flower.queries.refit_options import RegMean
from c2m3_fl.flower.serial_grid import SerialGrid
from c2m3_fl.network.program import export_program
from tests.flower.federation import EXAMPLE, mlp
from tests.flower.queries.refits import NODES, WEIGHTS, app_of, networks, normed


class Weighing(SerialGrid):
    """Keeps the bytes of arrays that every node is sent in every exchange; `harm` is done to contexts before each."""

    def __init__(self, make, harm=None):
        super().__init__(app_of(make), NODES)
        self.sent, self.harm = [], harm

    def push_messages(self, messages):
        messages = list(messages)
        if self.harm is not None:
            self.harm(self.contexts[2].state, len(self.sent))
        self.sent.append({each.metadata.dst_node_id: size(each.content) for each in messages})
        return super().push_messages(messages)


def size(content):
    records = content.array_records.values()
    return sum(value.numel() * value.element_size() for record in records for value in to_params(record).values())


def refit(make, options, harm=None):
    endpoints, merged = networks(make)
    grid, program = Weighing(make, harm), export_program(make().eval(), EXAMPLE)
    found = refit_by_clients(options, grid, [1, 2, 3], program, merged, endpoints, WEIGHTS)
    assert not any(key.startswith("c2m3") for context in grid.contexts.values() for key in context.state)
    return found, grid.sent, price(options, program, merged)


@pytest.mark.parametrize("make", [mlp, normed])
@pytest.mark.parametrize("options", [ClientRefit(first_layer=True), ClientRefit(exchanges=1), RegMean()])
def test_after_the_first_exchange_only_what_was_corrected_is_sent(make, options):
    _, sent, expected = refit(make, options)
    whole = sum(value.numel() * value.element_size() for value in make().state_dict().values())
    assert len(sent) == expected.exchanges
    assert sent[0] == dict.fromkeys([1, 2, 3], whole * (1 if isinstance(options, RegMean) else 2))
    assert all(value < whole for later in sent[1:] for value in later.values())
    total = sum(exchange[1] for exchange in sent)
    assert 0.9 * expected.sent < total <= expected.sent


def lose(state, exchange):
    state.clear()


def alter(state, exchange):
    for key, record in list(state.array_records.items()):
        state[key] = from_params({name: value + 1 for name, value in to_params(record).items()})


def garble(state, exchange):
    for key in list(state.array_records):
        state[key] = ArrayRecord({"x": next(iter(from_params({"x": torch.zeros(3)}).values()))})


@pytest.mark.parametrize("harm", [lose, alter, garble])
def test_what_a_client_lost_or_altered_is_sent_again_and_changes_nothing(harm):
    options = ClientRefit(first_layer=True)
    expected, plain, _ = refit(mlp, options)
    found, sent, _ = refit(mlp, options, harm)
    assert all(torch.equal(found.state_dict[name], value) for name, value in expected.state_dict.items())
    assert [set(each) for each in sent] == [{1, 2, 3}, {1, 2, 3}, {2}, {1, 2, 3}, {2}]
    assert sent[2] == sent[4] == {2: plain[0][2]}


def test_a_client_that_missed_an_exchange_is_sent_the_whole_networks():
    answered = []

    def transit(replies):
        answered.append(1)
        return [each for each in replies if each.metadata.src_node_id != 2 or len(answered) != 1]

    endpoints, merged = networks(mlp)
    grid, program = Weighing(mlp), export_program(mlp(), EXAMPLE)
    grid.transit = transit
    refit_by_clients(ClientRefit(first_layer=True), grid, [1, 2, 3], program, merged, endpoints, WEIGHTS)
    assert grid.sent[1][2] == grid.sent[0][2]
    assert grid.sent[1][1] < grid.sent[0][1]
    assert grid.sent[2][2] == grid.sent[2][1]
