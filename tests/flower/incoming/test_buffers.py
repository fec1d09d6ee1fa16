"""Buffers: what training changes comes from the replies, within bounds; all else is the model's own."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from c2m3_fl.flower.incoming.buffers import Buffers
from c2m3_fl.flower.incoming.records import to_params
from c2m3_fl.flower.strategy import C2M3
from c2m3_fl.network.calibration import as_batch
from tests.flower.federation import EXAMPLE, aggregate, normed, patient, reply, same, send
from tests.flower.legacy_federation import fit_result, legacy, params_of

MOST = 2**63 - 1


class Buffered(nn.Module):
    """A table that is looked up by an index, a mask of hidden units, a constant, and a count of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(64, 8), nn.Linear(8, 3)
        self.norm = nn.BatchNorm1d(8)
        self.register_buffer("index", torch.tensor([2, 0, 1]))
        self.register_buffer("mask", torch.tensor([True] * 6 + [False] * 2))
        self.register_buffer("scale", torch.tensor([1.0, 2.0, 3.0]))
        self.register_buffer("calls", torch.tensor(0))
        self.register_buffer("centre", torch.zeros(8))

    def forward(self, x):
        hidden = torch.where(self.mask, torch.relu(self.norm(self.first(x))), 0.0)
        if self.training:
            self.calls += 1
            self.centre = 0.9 * self.centre + 0.1 * hidden.mean(0)
        return (self.last(hidden - self.centre) * self.scale)[:, self.index]


def model(seed: int = 0) -> Buffered:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Buffered()


OWN = {"index", "mask", "scale"}


@pytest.mark.parametrize("rows", [1, 2], ids=["one example, which BatchNorm does not train on", "two examples"])
def test_what_a_step_of_training_writes_to_is_told_from_the_model_s_own(rows):
    network = model()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    random = torch.get_rng_state()
    found = Buffers.of(network, as_batch(torch.zeros(rows, 64)))
    assert found.own == OWN
    assert found.counters == {"calls", "norm.num_batches_tracked"}
    assert found.variances == {"norm.running_var"}
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert network.training
    assert torch.equal(random, torch.get_rng_state())


class Untrainable(Buffered):
    def forward(self, x):
        assert not self.training, "pass the targets"
        return super().forward(x)


def test_where_training_needs_more_than_the_inputs_floating_buffers_come_from_the_replies():
    found = Buffers.of(Untrainable(), as_batch(EXAMPLE))
    assert found.own == {"index", "mask", "calls"}
    assert found.variances == {"norm.running_var"}


def replies_of(network: nn.Module, count: int = 3, **changed: torch.Tensor):
    """Replies a little apart from what was sent; the last one with other buffers."""
    sent = network.state_dict()
    found = []
    for node in range(count):
        found.append(
            {name: value + 0.01 * node if value.is_floating_point() else value for name, value in sent.items()}
        )
        found[-1] |= {name: sent[name] for name in OWN & sent.keys()}
    found[-1] |= {name.replace("__", "."): value for name, value in changed.items()}
    return found


HOSTILE = {
    "index": torch.full((3,), 10**9),
    "mask": torch.ones(8, dtype=torch.bool),
    "scale": torch.full((3,), 1e3),
}


@pytest.mark.parametrize("basis", ["global", "client", "largest"])
@pytest.mark.parametrize("name", HOSTILE)
def test_buffers_that_training_does_not_change_are_the_model_s_own(name, basis, caplog):
    network = model()
    sent = network.state_dict()
    expected, _ = aggregate(reply_all(replies_of(network)), strategy_of(network, basis), sent)
    arrays, metrics = aggregate(
        reply_all(replies_of(network, **{name: HOSTILE[name]})), strategy_of(network, basis), sent
    )
    assert same(arrays, expected)
    assert torch.equal(to_params(arrays)[name], sent[name])
    assert (metrics["c2m3-own-buffers"], metrics["c2m3-dropped"]) == (1, 0)
    assert any(f"replies change '{name}', which training does not" in text for text in caplog.messages)


def reply_all(found):
    return [reply(node, params) for node, params in enumerate(found)]


def strategy_of(network, basis="global"):
    return C2M3(model=network, example_inputs=EXAMPLE, basis=basis)


class Centred(nn.Module):
    """Hidden units whose centres a buffer holds; training does not change them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(64, 8), nn.Linear(8, 3)
        self.register_buffer("centre", torch.randn(8))

    def forward(self, x):
        return self.last(torch.relu(self.first(x) - self.centre))


def test_buffers_about_units_follow_them():
    """A reply in another order of units keeps its function, and so does the aggregate with the network itself."""
    torch.manual_seed(0)
    network = Centred()
    sent = network.state_dict()
    order = torch.randperm(8)
    twin = {name: value[order] for name, value in sent.items() if name not in ("last.weight", "last.bias")}
    twin |= {"last.weight": sent["last.weight"][:, order], "last.bias": sent["last.bias"]}
    strategy = C2M3(model=network, example_inputs=EXAMPLE)
    arrays, metrics = aggregate(reply_all([sent, twin]), strategy, sent)
    x = torch.randn(5, 64)
    expected = network(x)
    network.load_state_dict(to_params(arrays))
    torch.testing.assert_close(network(x), expected, rtol=1e-4, atol=1e-5)
    assert "c2m3-own-buffers" not in metrics


def test_a_mask_in_another_order_than_its_units_is_outvoted():
    network = model()
    sent = network.state_dict()
    replies = reply_all(replies_of(network, mask=sent["mask"].flip(0)))
    arrays, _ = aggregate(replies, strategy_of(network), sent)
    assert torch.equal(to_params(arrays)["mask"], sent["mask"])


@pytest.mark.parametrize("name", HOSTILE)
def test_legacy_buffers_that_training_does_not_change_are_the_model_s_own(name):
    found = replies_of(model(), **{name: HOSTILE[name]})
    results = [fit_result(node, params) for node, params in enumerate(found)]
    parameters, _ = legacy(make=model).aggregate_fit(1, results, [])
    sent = model().state_dict()
    assert torch.equal(params_of(parameters, sent)[name], sent[name])


IMPOSSIBLE = {
    "1.running_var": torch.tensor([-1.0] + [1.0] * 15),
    "1.num_batches_tracked": torch.tensor(MOST),
    "1.num_batches_tracked below zero": torch.tensor(-1),
    "1.num_batches_tracked of years": torch.tensor(10**9),
}


@pytest.mark.parametrize(("name", "value"), IMPOSSIBLE.items(), ids=IMPOSSIBLE.keys())
def test_statistics_that_no_training_gives_cost_one_reply(name, value, caplog):
    sent = normed().state_dict()
    fine = replies_of(normed(), 3)
    bad = {**sent, name.split(" ")[0]: value}
    strategy = C2M3(model=normed(), example_inputs=EXAMPLE, memory=0)
    expected, _ = aggregate(reply_all(fine), strategy, sent)
    arrays, metrics = aggregate([*reply_all(fine), reply(9, bad)], strategy, sent)
    assert same(arrays, expected)
    assert metrics["c2m3-dropped"] == 1
    assert any(f"node 9: '{name.split(' ')[0]}'" in text for text in caplog.messages)
    results = [fit_result(node, params) for node, params in enumerate([*fine, bad])]
    parameters, metrics = legacy(make=normed).aggregate_fit(1, results, [])
    assert metrics["c2m3-dropped"] == 1
    assert bool((params_of(parameters, sent)["1.running_var"] >= 0).all())


def test_counts_go_on_from_what_was_sent():
    sent = {**normed().state_dict(), "1.num_batches_tracked": torch.tensor(10**12)}
    fine = [{**sent, "1.num_batches_tracked": torch.tensor(10**12 + 5)} for _ in range(2)]
    strategy = C2M3(model=normed(), example_inputs=EXAMPLE)
    arrays, _ = aggregate(reply_all(fine), strategy, sent)
    assert to_params(arrays)["1.num_batches_tracked"] == 10**12 + 5


def test_a_network_without_buffers_is_left_as_it_is():
    send(patient(), patient().setup.model.state_dict())
    assert patient().server._gate._buffers == Buffers(frozenset(), frozenset(), frozenset())
