"""A round whose match is bounded in memory or time."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import pytest
import torch

from c2m3_fl.core import permutation, result
from c2m3_fl.errors import ConfigError
from c2m3_fl.flower import LegacyC2M3
from c2m3_fl.flower.aligning.aligner import Aligner
from c2m3_fl.flower.strategy import C2M3
from c2m3_fl.symmetry.discover import permutation_spec
from tests.flower.federation import EXAMPLE, aggregate, clients, mlp, reply, shuffled

SPEC = permutation_spec(mlp(), EXAMPLE)
SIZE = sum(value.nbytes for value in mlp().state_dict().values())


def aligner(**bounds):
    options = {"mode": "joint", "basis": "global", "memory": 10, "device": torch.device("cpu"), "max_steps": 100}
    return Aligner(SPEC, tolerance=1e-4, **options, **bounds)


@pytest.mark.parametrize("limit", [None, 100 * SIZE, 5 * SIZE, 1])
def test_shuffled_replies_come_home_however_little_memory_there_is(limit):
    sent = clients(1, independent=False)[0]
    replies = [shuffled(SPEC, each, seed) for seed, each in enumerate(clients(5, independent=False))]
    found = aligner(memory_limit=limit).align(list(range(5)), replies, [1.0] * 5, sent)
    assert all(each > 0.5 for each in found.share_moved)
    for seed, move in enumerate(found.moves):
        drawn = permutation.random(SPEC, torch.Generator().manual_seed(seed))
        assert permutation.is_identity(permutation.compose(move, drawn))
    assert found.objectives[1] > found.objectives[0]


def test_a_round_that_the_clock_ends_says_so_and_is_aligned_as_far_as_it_came(monkeypatch):
    replies = clients(5)
    free = aligner().align(list(range(5)), replies, [1.0] * 5, replies[0])
    assert not free.timed_out
    clock = itertools.chain(range(6), itertools.repeat(10**9))
    monkeypatch.setattr(result, "time", SimpleNamespace(monotonic=lambda: float(next(clock))))
    found = aligner(max_seconds=1e6).align(list(range(5)), replies, [1.0] * 5, replies[0])
    assert found.timed_out
    assert found.objectives[0] < found.objectives[1] <= free.objectives[1] * (1 + 1e-6)


def test_the_clock_ends_a_match_in_batches_too():
    replies = clients(5)
    found = aligner(max_seconds=0.0, memory_limit=1).align(list(range(5)), replies, [1.0] * 5, replies[0])
    assert found.timed_out
    assert found.objectives[1] == pytest.approx(found.objectives[0])
    free = aligner(max_seconds=1e6, memory_limit=1).align(list(range(5)), replies, [1.0] * 5, replies[0])
    assert not free.timed_out
    assert free.objectives[1] > found.objectives[1]


@pytest.mark.parametrize("make", [C2M3, LegacyC2M3])
def test_both_strategies_pass_the_bounds_on_and_refuse_what_makes_no_sense(make):
    bounded = make(model=mlp(), example_inputs=EXAMPLE, max_seconds=2.5, memory_limit=10**6).setup.aligner
    assert (bounded.max_seconds, bounded.memory_limit) == (2.5, 10**6)
    for wrong in ({"max_seconds": -1.0}, {"max_seconds": "2"}, {"memory_limit": 0}, {"memory_limit": 1.5}):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            make(model=mlp(), example_inputs=EXAMPLE, **wrong)


def test_the_metrics_and_the_log_say_that_a_round_was_ended_by_the_clock(caplog):
    strategy = C2M3(model=mlp(), example_inputs=EXAMPLE, max_seconds=0.0)
    _, metrics = aggregate([reply(node, params) for node, params in enumerate(clients(3))], strategy)
    assert metrics["c2m3-timed-out"] == 1
    assert any("max_seconds ended the match" in text for text in caplog.messages)
    _, metrics = aggregate([reply(node, params) for node, params in enumerate(clients(3))])
    assert metrics["c2m3-timed-out"] == 0
