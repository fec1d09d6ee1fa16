"""A match that the clock ends: at permutations, not below where it started, and it says so."""

from __future__ import annotations

import itertools
import math
from types import SimpleNamespace

import pytest
import torch

from c2m3_fl.core import joining, match, match_in_batches, permutation, result
from c2m3_fl.core.joining import match_bounded
from c2m3_fl.errors import ConfigError
from tests.core.networks import mlp, pairwise_agreement

NODES = 6


def _setting():
    spec = mlp(6, 12, 10, 4)
    generator = torch.Generator().manual_seed(0)
    return spec, [
        {k: torch.randn(each.shape, generator=generator) for k, each in spec.tensors.items()} for _ in range(NODES)
    ]


@pytest.mark.parametrize("ticks", [1, 3, 6])
def test_the_best_permutations_so_far_are_returned_whenever_the_time_is_up(ticks, monkeypatch):
    spec, nodes = _setting()
    clock = itertools.chain(range(ticks), itertools.repeat(10**9))
    monkeypatch.setattr(result, "time", SimpleNamespace(monotonic=lambda: float(next(clock))))
    found = match(spec, nodes, max_seconds=1e6)
    assert found.timed_out
    assert not found.converged
    assert math.isinf(found.gap)
    for perm in found.permutations:
        for each in perm.values():
            assert sorted(each.tolist()) == list(range(len(each)))
    assert found.objectives[-1] >= found.objectives[0] * (1 - 1e-6)


@pytest.mark.parametrize("ticks", [1, 4, 12, 40])
def test_in_batches_too_the_time_ends_the_search(ticks, monkeypatch):
    spec, nodes = _setting()
    clock = itertools.chain(range(ticks), itertools.repeat(10**9))
    for module in (result, joining):
        monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: float(next(clock))))
    found = match_bounded(spec, nodes, [1.0] * NODES, 2, max_seconds=1e6)
    assert found.timed_out
    assert sum(1 for _ in itertools.takewhile(lambda now: now < 10**9, clock)) == 0
    for perm in found.permutations:
        permutation.validate(spec, perm)
    share = [1 / NODES] * NODES
    assert found.objectives[-1] == pytest.approx(pairwise_agreement(spec, nodes, found.permutations, share))


def test_batches_whose_time_is_up_at_once_leave_what_was_not_matched_as_it_stands():
    spec, nodes = _setting()
    found = match_in_batches(spec, nodes, batch=2, passes=4, max_seconds=0.0)
    assert found.timed_out
    assert all(permutation.is_identity(perm) for perm in found.permutations)
    free, timed = (match_in_batches(spec, nodes, batch=2, passes=4, max_seconds=limit) for limit in (None, 1e6))
    assert not timed.timed_out
    assert timed.objective == free.objective


def test_a_match_that_is_done_in_time_is_the_one_without_a_limit():
    spec, nodes = _setting()
    timed, free = match(spec, nodes, max_seconds=1e6), match(spec, nodes)
    assert not timed.timed_out
    assert timed.objectives == free.objectives
    assert all(map(_same, timed.permutations, free.permutations))


def _same(left, right):
    return permutation.is_identity(permutation.between(left, right))


@pytest.mark.parametrize("seconds", [-1.0, math.nan])
def test_limits_that_make_no_sense_are_refused(seconds):
    spec, nodes = _setting()
    with pytest.raises(ConfigError, match="max_seconds is"):
        match(spec, nodes, max_seconds=seconds)
