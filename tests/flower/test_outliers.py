"""Which replies do not fit the others: no minority decides what is typical, and no honest reply pays for another."""

from __future__ import annotations

import pytest
import torch

from c2m3_fl.core import permutation
from c2m3_fl.core.outliers import find_outliers
from c2m3_fl.flower.strategy import C2M3
from tests.flower.federation import EXAMPLE, clients, mlp, patient, reply, send
from tests.flower.hostile import WIDTH, Setting, attacked, federation

SHARED = Setting(independent=False, seed=0)
CAUGHT = [
    "sign flip",
    "update ×−1",
    "update ×−5",
    "update ×10",
    "Gaussian noise",
    "label flip",
    "inner product, −.5",
    "constant",
    "random network",
    "one element 1e3",
    "backdoor, update ×3",
]


@pytest.fixture(scope="module")
def spec():
    return C2M3(model=mlp(0, WIDTH), example_inputs=EXAMPLE).setup.spec


def near(seed, count, spread):
    """Networks around one, and that one."""
    base, generator = mlp(seed).state_dict(), torch.Generator().manual_seed(seed)
    noise = [{k: spread * torch.randn(v.shape, generator=generator) for k, v in base.items()} for _ in range(count)]
    step = {k: torch.randn(v.shape, generator=generator) for k, v in base.items()}
    return [{k: v + 0.1 * step[k] + each[k] for k, v in base.items()} for each in noise], base


@pytest.mark.slow
@pytest.mark.parametrize("attack", CAUGHT)
def test_of_a_shared_start_and_equal_shares_attacks_are_told_apart(attack, spec):
    each = federation(SHARED)
    assert sorted(find_outliers(spec, attacked(each, attack), each.sent)) == [7, 8, 9]


@pytest.mark.slow
@pytest.mark.parametrize("attack", ["none", "ALIE, z = 1", "no update"])
def test_what_looks_like_training_is_not_told_apart(attack, spec):
    each = federation(SHARED)
    assert find_outliers(spec, attacked(each, attack), each.sent) == {}


@pytest.mark.parametrize("hostile", [1, 2, 3, 4])
def test_one_element_evicts_nobody_else(hostile):
    """Before, one element of a bias of 1e3 evicted three to five of nine honest replies."""
    honest, sent = near(0, 9, 0.02)
    odd = [{k: v.clone() for k, v in each.items()} for each in near(1, hostile, 0.02)[0]]
    for each in odd:
        each.update({k: v.clone() for k, v in honest[0].items()})
        each["2.bias"][0] = 1e3
    found = find_outliers(patient().setup.spec, [*honest, *odd], sent)
    assert sorted(found) == list(range(9, 9 + hostile))
    assert "'2.bias'" in found[9] or "norm" in found[9]


@pytest.mark.parametrize("element", [10.0, 1e3, 1e18, 3e38])
def test_one_element_is_named_whatever_its_size(element):
    honest, sent = near(0, 5, 0.02)
    honest[2]["4.bias"][3] = element
    assert list(find_outliers(patient().setup.spec, honest, sent)) == [2]


def test_an_idle_client_and_one_that_trained_little_fit_the_others():
    honest, sent = near(0, 6, 0.02)
    little = {k: sent[k] + 0.1 * (honest[5][k] - sent[k]) for k in sent}
    assert find_outliers(patient().setup.spec, [*honest[:5], little, dict(sent)], sent) == {}


def test_a_stranger_a_reverse_and_a_giant_are_named_and_why():
    honest, sent = near(0, 7, 0.02)
    stranger = dict(mlp(5).state_dict())
    reverse = {k: 2 * sent[k] - honest[0][k] for k in sent}
    giant = {k: sent[k] + 30 * (honest[1][k] - sent[k]) for k in sent}
    found = find_outliers(patient().setup.spec, [*honest, stranger, reverse, giant], sent)
    assert list(found) == [7, 8, 9]
    assert found[8].startswith("update: cosine with the others -0.9")
    assert "times as large as the others'" in found[9]


def test_without_a_majority_nobody_is_named():
    left, right = clients(2)
    spec = patient().setup.spec
    assert find_outliers(spec, [left, {k: -100 * v for k, v in right.items()}], mlp().state_dict()) == {}
    dead = [{k: torch.zeros_like(v) for k, v in left.items()}] * 4
    assert find_outliers(spec, dead, left) == {}


def test_replies_that_all_differ_are_not_held_against_each_other():
    assert find_outliers(patient().setup.spec, [mlp(seed).state_dict() for seed in range(8)], mlp(9).state_dict()) == {}


@pytest.mark.parametrize("basis", ["global", "largest", 3])
def test_updates_are_those_from_the_sent_model_in_whatever_basis_the_round_ends(basis):
    """All clients in orders of their own; the verdict is that of the same replies in one order."""
    strategy = C2M3(model=mlp(), example_inputs=EXAMPLE, basis=basis, memory=0, diagnostics=True)
    spec = strategy.setup.spec
    honest, sent = near(0, 6, 0.02)
    replies = [*honest, {k: 2 * sent[k] - honest[0][k] for k in sent}]
    moved = [
        permutation.apply(spec, permutation.random(spec, torch.Generator().manual_seed(k)), each)
        for k, each in enumerate(replies)
    ]
    send(strategy, sent)
    _, metrics = strategy.aggregate_train(1, [reply(k, each) for k, each in enumerate(moved)])
    flags = dict(zip(metrics["c2m3-nodes"], metrics["c2m3-node-outlier"], strict=True))
    assert [node for node, flag in sorted(flags.items()) if flag] == [6]
