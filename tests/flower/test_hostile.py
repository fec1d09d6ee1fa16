"""Robust strategies among independently initialised clients: useless in the clients' bases, useful in one."""

from __future__ import annotations

from statistics import fmean

import pytest

from c2m3_fl.flower.strategy import C2M3
from tests.flower.federation import EXAMPLE, accuracy, mlp, reply, send
from tests.flower.hostile import STRATEGIES, WIDTH, Setting, attacked, federation

RUINOUS = ["sign flip", "update ×−5", "update ×10", "random network", "one element 1e3", "Gaussian noise"]


def independent(seed):
    return federation(Setting(independent=True, seed=seed))


def merged(strategy, replies, sent):
    send(strategy, sent)
    arrays, _ = strategy.aggregate_train(1, replies)
    return accuracy(lambda: mlp(0, WIDTH), arrays)


def ours(strategy):
    return C2M3(STRATEGIES[strategy](), model=mlp(0, WIDTH), example_inputs=EXAMPLE)


def messages(parties):
    return [reply(node, params) for node, params in enumerate(parties)]


@pytest.mark.slow
@pytest.mark.parametrize("attack", RUINOUS)
@pytest.mark.parametrize("strategy", ["FedMedian", "FedTrimmedAvg", "Krum", "MultiKrum"])
def test_three_hostile_clients_of_ten_do_not_ruin_a_robust_strategy_in_the_universe(strategy, attack):
    """On the mean of three federations; single ones spread by .05."""
    federations = [independent(seed) for seed in range(3)]
    assert fmean(merged(ours(strategy), messages(attacked(each, attack)), each.sent) for each in federations) > 0.7


@pytest.mark.parametrize("strategy", ["FedMedian", "FedTrimmedAvg", "Krum", "MultiKrum"])
def test_claiming_a_billion_examples_gives_no_more_say(strategy):
    """Neither in these strategies' own arithmetic nor in the match."""
    each = independent(0)
    parties = attacked(each, "random network")
    found = []
    for claimed in (10, 10**9):
        replies = [reply(n, params, examples=claimed if n >= 7 else 10) for n, params in enumerate(parties)]
        found.append(merged(ours(strategy), replies, each.sent))
    assert min(found) > 0.7


@pytest.mark.parametrize("strategy", ["FedAvg", "FedMedian", "FedTrimmedAvg", "Bulyan (1 assumed)"])
def test_without_alignment_they_are_near_chance_even_with_nobody_hostile(strategy):
    each = independent(0)
    assert merged(STRATEGIES[strategy](), messages(each.replies), each.sent) < 0.4


@pytest.mark.parametrize("factor", [10.0, 1000.0])
def test_scaled_clients_do_not_dictate_where_the_others_go(factor, monkeypatch):
    """Matched beside three giants, the others agree nearly as well as without them: better than unprotected."""
    each = independent(0)
    parties = [*each.honest, *[{k: factor * v for k, v in own.items()} for own in each.replies[7:]]]
    aligner = C2M3(model=mlp(0, WIDTH), example_inputs=EXAMPLE, memory=0).setup.aligner
    alone = agreement(aligner.align(list(range(7)), parties[:7], [1.0] * 7, each.sent).params)
    beside = agreement(aligner.align(list(range(10)), parties, [1.0] * 10, each.sent).params[:7])
    monkeypatch.setattr("c2m3_fl.flower.aligning.aligner.bounded_weights", lambda spec, nodes, weights: weights)
    unprotected = agreement(aligner.align(list(range(10)), parties, [1.0] * 10, each.sent).params[:7])
    assert beside > 0.85 * alone
    assert beside > unprotected


def agreement(nodes):
    pairs = [(left, right) for left in nodes for right in nodes if left is not right]
    return sum(float((left[name] * right[name]).sum()) for left, right in pairs for name in left)
