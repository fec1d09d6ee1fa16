"""Robust strategies among independently initialised clients: useless in the clients' bases, useful in one."""

from __future__ import annotations

from statistics import fmean

import pytest

from c2m3_fl.flower.strategy import C2M3
from tests.flower.federation import EXAMPLE, accuracy, mlp, reply, send
from tests.flower.hostile import ATTACKS, STRATEGIES, WIDTH, attacked, honest, merged

SEED = 0


@pytest.fixture(scope="module")
def clients():
    return honest(SEED)


@pytest.fixture(scope="module")
def federations(clients):
    return [clients, honest(1), honest(2)]


@pytest.mark.slow
@pytest.mark.parametrize("attack", [name for name in ATTACKS if name != "none"])
@pytest.mark.parametrize("strategy", ["FedMedian", "FedTrimmedAvg", "Krum", "MultiKrum"])
def test_three_hostile_clients_of_ten_do_not_ruin_a_robust_strategy_in_the_universe(strategy, attack, federations):
    """On the mean of three federations; single ones spread by .05."""
    ours = [
        merged(
            C2M3(STRATEGIES[strategy](), model=mlp(0, WIDTH), example_inputs=EXAMPLE),
            attacked(each, ATTACKS[attack], seed),
        )
        for seed, each in enumerate(federations)
    ]
    assert fmean(ours) > 0.7


@pytest.mark.parametrize("strategy", ["FedMedian", "FedTrimmedAvg", "Krum", "MultiKrum"])
def test_claiming_a_billion_examples_gives_no_more_say(strategy, clients):
    """Neither in these strategies' own arithmetic nor in the match."""
    parties, sent = attacked(clients, ATTACKS["random weights"], SEED), mlp(0, WIDTH).state_dict()
    found = []
    for claimed in (10, 10**9):
        ours = C2M3(STRATEGIES[strategy](), model=mlp(0, WIDTH), example_inputs=EXAMPLE)
        send(ours, sent)
        replies = [reply(n, params, examples=claimed if n >= 7 else 10) for n, params in enumerate(parties)]
        found.append(accuracy(lambda: mlp(0, WIDTH), ours.aggregate_train(1, replies)[0]))
    assert min(found) > 0.7


@pytest.mark.parametrize("strategy", ["FedAvg", "FedMedian", "FedTrimmedAvg", "Bulyan (1 assumed)"])
def test_without_alignment_they_are_near_chance_even_with_nobody_hostile(strategy, clients):
    assert merged(STRATEGIES[strategy](), clients) < 0.4


@pytest.mark.parametrize("factor", ["scaled ×10", "scaled ×1000"])
def test_scaled_clients_do_not_dictate_where_the_others_go(factor, clients, monkeypatch):
    """Matched beside three giants, the others agree nearly as well as without them: better than unprotected."""
    parties, sent = attacked(clients, ATTACKS[factor], SEED), mlp(0, WIDTH).state_dict()
    aligner = C2M3(model=mlp(0, WIDTH), example_inputs=EXAMPLE, memory=0).setup.aligner
    alone = agreement(aligner.align(list(range(7)), clients[:7], [1.0] * 7, sent).params)
    beside = agreement(aligner.align(list(range(10)), parties, [1.0] * 10, sent).params[:7])
    monkeypatch.setattr("c2m3_fl.flower.aligner.bounded_weights", lambda spec, nodes, weights: weights)
    unprotected = agreement(aligner.align(list(range(10)), parties, [1.0] * 10, sent).params[:7])
    assert beside > 0.85 * alone
    assert beside > unprotected


def agreement(nodes):
    pairs = [(left, right) for left in nodes for right in nodes if left is not right]
    return sum(float((left[name] * right[name]).sum()) for left, right in pairs for name in left)
