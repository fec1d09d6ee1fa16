"""Which rows of a client's data its sums are of: positions of its own, and one choice of held-out examples."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch
from torch import nn

from c2m3_fl.flower.incoming.records import to_params
from c2m3_fl.flower.queries.refit import ClientRefit
from tests.flower.federation import digits, mlp
from tests.flower.queries.refits import ALL, NODES, app_of, convolutional, refit


def heard(make, options, data, **more):
    """What every node answered, over all exchanges, by tensor."""
    found = {}

    def note(replies):
        for each in replies:
            found.setdefault(each.metadata.src_node_id, {}).update(to_params(each.content["sums"]))
        return replies

    refit(make, options, app=app_of(make, data), transit=note, **more)
    return found


@pytest.mark.parametrize("make", [mlp, convolutional])
def test_clients_of_the_same_data_and_network_draw_positions_of_their_own(make):
    def few(seed=0):
        options = ClientRefit(first_layer=True, positions=32, seed=seed)
        return heard(make, options, lambda context: [digits()[0][:60]], alike=True)

    found, again, other = few(), few(), few(seed=1)
    inputs = [name for name in found[1] if name.endswith("/xx")]
    assert len(inputs) == 6  # of three operators, to fit and held out
    for name in inputs:
        for one, another in combinations(found.values(), 2):
            assert not torch.allclose(one[name], another[name])
        for node in found:
            assert torch.equal(found[node][name], again[node][name])
            assert not torch.allclose(found[node][name], other[node][name])


class Branches(nn.Module):
    """Two layers that read the network's input."""

    def __init__(self):
        super().__init__()
        self.one, self.other, self.last = nn.Linear(64, 8), nn.Linear(64, 8), nn.Linear(8, 10)

    def forward(self, images):
        return self.last(torch.relu(self.one(images)) * torch.relu(self.other(images)))


def branches(seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Branches()


def test_a_client_holds_the_same_examples_out_in_every_exchange():
    """Though its data come in another order each time, and the network that they are measured with has changed."""
    loads = []

    def shuffling(context):
        part = digits()[0][100 * int(context.node_config["partition-id"]) :][:60]
        loads.append(torch.randperm(60, generator=torch.Generator().manual_seed(len(loads))))
        return list(part[loads[-1]].split(25))

    found = heard(branches, ALL, shuffling)
    assert len(loads) == 3 * NODES  # an exchange for every layer
    for tensors in found.values():
        for part, count in (("held-out", 60 // 5), ("train", 60 - 60 // 5)):
            for name in ("x", "xx"):
                one, other = (tensors[f"{layer}/{part}/{name}"] for layer in ("linear", "linear_1"))
                torch.testing.assert_close(one, other)
            assert int(tensors[f"linear/{part}/count"]) == count
        assert not torch.allclose(tensors["linear/held-out/x"], tensors["linear/train/x"])
