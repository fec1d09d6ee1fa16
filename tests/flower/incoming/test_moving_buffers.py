"""Values per unit that training does not change: they move with the units, and are merged like parameters."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from c2m3_fl.flower.incoming.buffers import Buffers
from c2m3_fl.flower.incoming.records import to_params
from c2m3_fl.flower.strategy import C2M3
from c2m3_fl.merging import merge
from tests.flower.federation import EXAMPLE, aggregate, reply


class Placed(nn.Module):
    """Fixed positions are added to a stream of units; training does not change them."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.last = nn.Linear(16, 8), nn.Linear(8, 3)
        self.register_buffer("places", torch.sin(torch.arange(32.0)).view(4, 8))

    def forward(self, x):
        return self.last(torch.tanh(self.words(x.unflatten(-1, (4, 16))) + self.places).mean(1))


def reply_all(found):
    return [reply(node, params) for node, params in enumerate(found)]


def started_apart(count: int) -> list[dict[str, torch.Tensor]]:
    found = []
    for seed in range(count):
        torch.manual_seed(seed)
        found.append(Placed().state_dict())
    return found


@pytest.mark.parametrize("basis", ["global", "client"])
def test_a_table_that_clients_hold_in_orders_of_their_own_is_merged_like_parameters(basis):
    """Both clients have the same table; in one order of units the tables differ, and no entry has a majority."""
    network, nodes = Placed(), started_apart(2)
    arrays, _ = aggregate(reply_all(nodes), C2M3(model=network, example_inputs=EXAMPLE, basis=basis), nodes[0])
    merged = merge(network, nodes, example_inputs=EXAMPLE)
    x = torch.randn(5, 64)
    outputs = []
    for params in (to_params(arrays), merged.state_dict):
        network.load_state_dict(params)
        outputs.append(network(x))
    torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-5)
    assert not torch.equal(to_params(arrays)["places"].sort().values, Placed().places.sort().values)


def test_constants_of_units_are_those_of_most_replies_else_the_aggregate_s():
    found = Buffers(frozenset(), frozenset(), frozenset(), moving=frozenset(["places", "mask"]))
    places = torch.tensor([[1.0, 2.0, 3.0], [1.0, 3.0, 2.0], [2.0, 7.0, 2.0]])
    masks = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]])
    replies = [{"places": one, "mask": other} for one, other in zip(places, masks, strict=True)]
    mean = {"places": places.mean(0), "mask": masks.mean(0)}
    restored = found.restore(mean, replies, mean)
    assert torch.equal(restored["places"], torch.tensor([1.0, 4.0, 2.0]))
    assert torch.equal(restored["mask"], torch.tensor([1.0, 0.0]))
    assert torch.equal(found.restore(mean, replies[:2], mean)["mask"], torch.zeros(2))


def test_a_client_is_sent_the_table_in_its_own_order():
    """With ``basis="client"`` a twin in another order of units trains on with its own table, to the last bit."""
    network = Placed()
    sent = network.state_dict()
    order = torch.randperm(8)
    twin = {"words.weight": sent["words.weight"][order], "words.bias": sent["words.bias"][order]}
    twin |= {"last.weight": sent["last.weight"][:, order], "last.bias": sent["last.bias"]}
    twin["places"] = sent["places"][:, order]
    strategy = C2M3(model=network, example_inputs=EXAMPLE, basis="client")
    aggregate(reply_all([sent, twin]), strategy, sent)
    own = strategy.setup.aligner.own_basis(1, sent)
    assert torch.equal(own["places"], twin["places"])
