"""One model in several orders of its units is one vote for strategies that select replies by their distances."""

from __future__ import annotations

import pytest
import torch
from flwr.server import strategy as legacy
from flwr.serverapp.strategy import (
    Bulyan,
    DifferentialPrivacyClientSideFixedClipping,
    FedAvg,
    FedMedian,
    FedTrimmedAvg,
    Krum,
    MultiKrum,
)

from c2m3_fl.core import permutation
from c2m3_fl.flower.incoming.sybils import find_copies, votes_by_distance
from c2m3_fl.flower.strategy import C2M3
from tests.flower.federation import EXAMPLE, accuracy, mlp, reply, send
from tests.flower.hostile import WIDTH, Setting, federation

INDEPENDENT = Setting(independent=True, seed=0)


@pytest.fixture(scope="module")
def spec():
    return C2M3(model=mlp(0, WIDTH), example_inputs=EXAMPLE).setup.spec


def shuffled(spec, params, seed):
    return permutation.apply(spec, permutation.random(spec, torch.Generator().manual_seed(seed)), params)


def near(params, spread, seed):
    """The same network with noise of a share of every tensor's own size."""
    generator = torch.Generator().manual_seed(seed)
    return {k: v + spread * v.std() * torch.randn(v.shape, generator=generator) for k, v in params.items()}


def wrapping(strategy, **options):
    return C2M3(strategy, model=mlp(0, WIDTH), example_inputs=EXAMPLE, judge=None, memory=0, **options)


def merged(strategy, replies, sent):
    send(strategy, sent)
    arrays, metrics = strategy.aggregate_train(1, [reply(node, each) for node, each in enumerate(replies)])
    return arrays, metrics


def test_a_poison_in_three_orders_is_one_vote_for_krum(spec, caplog):
    """Outside, Krum is right; inside, three coinciding replies were nearer to each other than honest ones are."""
    each = federation(INDEPENDENT)
    replies = [*each.honest, *[shuffled(spec, each.flipped[0], seed) for seed in range(3)]]
    plain, _ = merged(Krum(num_malicious_nodes=3), replies, each.sent)
    arrays, metrics = merged(wrapping(Krum(num_malicious_nodes=3)), replies, each.sent)
    assert accuracy(lambda: mlp(0, WIDTH), plain) > 0.75
    assert accuracy(lambda: mlp(0, WIDTH), arrays) > 0.75
    assert metrics["c2m3-dropped"] == sum("the two count once" in text for text in caplog.messages) == 2


@pytest.mark.parametrize(
    "strategy",
    [
        Krum(),
        MultiKrum(),
        Bulyan(),
        legacy.Krum(),
        legacy.Bulyan(),
        DifferentialPrivacyClientSideFixedClipping(Krum(), 1.0, 1.0, 3),
    ],
    ids=lambda each: f"{type(each).__module__.split('.')[1]} {type(each).__name__}",
)
def test_strategies_that_select_by_distance(strategy):
    assert votes_by_distance(strategy)


@pytest.mark.parametrize("strategy", [FedAvg(), FedMedian(), FedTrimmedAvg(), legacy.FedMedian()])
def test_strategies_that_do_not(strategy):
    assert not votes_by_distance(strategy)


@pytest.mark.parametrize("noise", [0.0, 0.01], ids=["copies", "near copies"])
def test_copies_and_near_copies_coincide(noise, spec):
    each = federation(INDEPENDENT)
    poison = [near(each.flipped[0], noise, seed) for seed in range(3)]
    raw = [*each.honest, *[shuffled(spec, params, seed) for seed, params in enumerate(poison)]]
    assert find_copies(raw, [*each.honest, *poison], each.sent) == {8: 7, 9: 7}


def test_the_first_of_several_copies_counts_and_two_families_are_two_votes(spec):
    each = federation(INDEPENDENT)
    first, second = each.flipped[:2]
    raw = [each.honest[0], first, shuffled(spec, second, 1), shuffled(spec, first, 2), shuffled(spec, first, 3), second]
    aligned = [each.honest[0], first, second, dict(first), dict(first), dict(second)]
    assert find_copies(raw, aligned, each.sent) == {3: 1, 4: 1, 5: 2}


def test_replies_that_coincided_before_count_as_they_did(spec):
    """The wrapped strategy's own business: nothing that the alignment did."""
    each = federation(INDEPENDENT)
    aligned = [each.honest[0], each.honest[1], each.flipped[0], each.flipped[0]]
    moved = [*each.honest[:2], *[shuffled(spec, each.flipped[0], 1)] * 2]
    assert find_copies(moved, aligned, each.sent) == {}
    assert find_copies(aligned, aligned, each.sent) == {}


def test_idle_clients_keep_their_votes(spec):
    """They send the model back as it was, each in the order of units that it keeps its own state in."""
    each = federation(Setting(independent=False, seed=0))
    idle = [dict(each.sent) for _ in range(3)]
    raw = [*each.honest, *[shuffled(spec, params, seed) for seed, params in enumerate(idle)]]
    assert find_copies(raw, [*each.honest, *idle], each.sent) == {}
    _, metrics = merged(wrapping(Krum(num_malicious_nodes=3)), raw, each.sent)
    assert metrics["c2m3-dropped"] == 0


@pytest.mark.parametrize("share", [1.0, 0.05], ids=["trained", "trained little"])
def test_clients_that_keep_orders_of_their_own_keep_their_votes(share, spec):
    """Aligned, they lie as near to each other as clients of one start do: near, but not like copies."""
    each = federation(Setting(independent=False, seed=0))
    trained = [{k: each.sent[k] + share * (own[k] - each.sent[k]) for k in own} for own in each.replies]
    raw = [shuffled(spec, own, seed) for seed, own in enumerate(trained)]
    assert find_copies(raw, trained, each.sent) == {}
