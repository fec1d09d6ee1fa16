"""Deep networks with starts of their own are matched from their activations as well."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from c2m3_fl.core import permutation
from c2m3_fl.core.match import match
from c2m3_fl.flower.aligning.activation_start import ActivationStart
from c2m3_fl.flower.strategy import C2M3
from tests.flower.federation import calibration, digits, mlp, reply, same, send, shuffled, train

NODES = 3


def deep(seed: int = 0) -> nn.Module:
    """Four groups of units."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        layers = [each for _ in range(3) for each in (nn.Linear(16, 16), nn.ReLU())]
        return nn.Sequential(nn.Linear(64, 16), nn.ReLU(), *layers, nn.Linear(16, 10))


def replies(*, independent: bool):
    found = []
    for node in range(NODES):
        model = deep(node + 1 if independent else 0)
        data, labels = (each[node:600:NODES] for each in digits())
        train(model, data, labels, epochs=3, seed=node, rate=0.05 if independent else 0.005)
        found.append(model.state_dict())
    return found


@pytest.fixture
def counted(monkeypatch):
    calls = []
    search = ActivationStart.__call__

    def spied(self, params, weights):
        calls.append(search(self, params, weights))
        return calls[-1]

    monkeypatch.setattr(ActivationStart, "__call__", spied)
    return calls


def played(strategy, params):
    send(strategy, deep().state_dict(), nodes=NODES)
    return strategy.aggregate_train(1, [reply(node, each) for node, each in enumerate(params)])


def test_from_own_starts_the_match_begins_where_activations_agree(counted):
    params = replies(independent=True)
    strategy = C2M3(model=deep(), calibration=calibration(), recalibrate="none")
    _, metrics = played(strategy, params)
    (start,) = counted
    spec = strategy.setup.spec
    expected = match(spec, params, start=start)
    moves = [strategy.setup.aligner.memory.recall(node) for node in range(NODES)]
    for node in range(1, NODES):
        there = permutation.between(moves[0], moves[node])
        assert permutation.is_identity(permutation.between(there, expected.between(0, node)))
    assert metrics["c2m3-objective-before"] < metrics["c2m3-objective-after"]


def test_the_order_of_the_replies_changes_nothing():
    params = replies(independent=True)
    here, there = (
        played(C2M3(model=deep(), calibration=calibration(), recalibrate="none"), each)[0]
        for each in (params, params[::-1])
    )
    for name in here:
        torch.testing.assert_close(
            torch.tensor(here[name].numpy()), torch.tensor(there[name].numpy()), rtol=0, atol=1e-6
        )


def test_a_permuted_copy_is_found_again():
    strategy = C2M3(model=deep(), calibration=calibration(), recalibrate="none")
    node = replies(independent=True)[0]
    copies = [shuffled(strategy.setup.spec, node, seed) for seed in range(NODES)]
    arrays, _ = played(strategy, copies)
    with torch.no_grad():
        found, expected = deep(), deep()
        found.load_state_dict(arrays.to_torch_state_dict())
        expected.load_state_dict(node)
        torch.testing.assert_close(found(digits()[0][:50]), expected(digits()[0][:50]), rtol=1e-4, atol=1e-4)


def test_nothing_more_is_searched_from_a_shared_start_nor_in_shallow_networks_nor_without_data(counted):
    played(C2M3(model=deep(), calibration=calibration(), recalibrate="none"), replies(independent=False))
    played(C2M3(model=deep(), example_inputs=torch.zeros(2, 64)), replies(independent=True))
    assert counted == []
    assert C2M3(model=mlp(), calibration=calibration()).setup.aligner.second_start is None


def test_where_activations_cannot_be_compared_the_match_of_the_weights_stands(monkeypatch, caplog):
    params = replies(independent=True)
    plain, _ = played(C2M3(model=deep(), example_inputs=torch.zeros(2, 64)), params)

    def broken(self, params, weights):
        raise RuntimeError("no such operator")

    monkeypatch.setattr("c2m3_fl.flower.aligning.activation_start.ActivationMatching.moves", broken)
    found, _ = played(C2M3(model=deep(), calibration=calibration(), recalibrate="none"), params)
    assert same(found, plain)
    assert any("the search starts from the weights alone" in text for text in caplog.messages)
