"""The oracle against brute force, and the proof that the identity is best."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from itertools import permutations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy.optimize import linear_sum_assignment

from c2m3_fl.core import permutation
from c2m3_fl.core.assignment import assign, assign_nested, identity_is_optimal, oracle, potentials
from c2m3_fl.core.spec import Group, PermutationSpec
from tests.core.networks import attention

square = st.integers(1, 5).flatmap(lambda n: hnp.arrays(np.float64, (n, n), elements=st.floats(-4, 4, width=16)))


def worth(gain, index):
    return gain[np.arange(len(gain)), list(index)].sum()


@given(square)
def test_assignment_is_the_best_of_all_permutations(gain):
    best = max(worth(gain, index) for index in permutations(range(len(gain))))
    assert np.isclose(worth(gain, assign(gain)), best)


@given(square)
def test_the_certificate_never_lies(gain):
    if identity_is_optimal(gain):
        assert np.isclose(np.trace(gain), max(worth(gain, index) for index in permutations(range(len(gain)))))


@given(hnp.arrays(np.float64, st.tuples(st.integers(1, 5), st.integers(1, 4)), elements=st.integers(-4, 4).map(float)))
def test_the_certificate_holds_for_identical_nodes(params):
    # Row maxima on the diagonal do not: a small unit points along a large one.
    assert identity_is_optimal(params @ params.T)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("kind", ["gaussian", "low rank", "planted", "ties", "constant", "huge", "tiny"])
def test_potentials_change_no_answer(kind, dtype):
    # Large enough that they are used; scipy alone is the reference.
    generator = np.random.default_rng(0)
    noise = generator.normal(size=(130, 130))
    gain = {
        "gaussian": noise,
        "low rank": generator.normal(size=(130, 3)) @ generator.normal(size=(3, 130)),
        "planted": 5 * np.eye(130)[generator.permutation(130)] + noise,
        "ties": np.round(noise),
        "constant": np.full((130, 130), 2.5),
        "huge": 1e30 * noise,
        "tiny": 1e-30 * noise,
    }[kind].astype(dtype)
    best = worth(gain.astype(np.float64), linear_sum_assignment(gain, maximize=True)[1])
    found = assign(gain)
    assert sorted(found) == list(range(130))
    assert worth(gain.astype(np.float64), found) == pytest.approx(best, rel=1e-6 if dtype == np.float32 else 1e-12)


def test_potentials_nearly_solve_the_problem():
    # The dual value is never below the best permutation's once no entry stands out; here it is within 2 % of it.
    generator = np.random.default_rng(1)
    gain = generator.normal(size=(200, 200))
    u, v = potentials(gain)
    over = (gain - u[:, None] - v[None, :]).max()
    best = worth(gain, linear_sum_assignment(gain, maximize=True)[1])
    assert best <= u.sum() + v.sum() + 200 * max(over, 0) <= 1.02 * best


def test_nested_assignment_is_the_best_of_the_wreath_product():
    # 3 heads of 2 units and two children: 3! (2! 2!)^3 = 384 permutations, all tried.
    generator = np.random.default_rng(0)
    for _ in range(20):
        gain = generator.normal(size=(3, 3))
        children = {"qk": generator.normal(size=(6, 6)), "vo": generator.normal(size=(6, 6))}
        outer, inner = assign_nested(gain, children)
        found = worth(gain, outer) + sum(worth(children[name], inner[name]) for name in children)
        best = max(
            worth(gain, heads)
            + sum(
                sum(
                    max(worth(child[2 * h : 2 * h + 2, 2 * to : 2 * to + 2], order) for order in permutations(range(2)))
                    for h, to in enumerate(heads)
                )
                for child in children.values()
            )
            for heads in permutations(range(3))
        )
        assert np.isclose(found, best)
        spec = attention()
        perm = {"head": torch.from_numpy(outer), **{name: torch.from_numpy(index) for name, index in inner.items()}}
        permutation.validate(spec, perm)


def test_the_size_of_the_pool_changes_nothing():
    spec = PermutationSpec({"a": Group(7), "b": Group(30)}, {})
    generator = torch.Generator().manual_seed(0)
    gains = {name: torch.randn(5, group.size, group.size, generator=generator) for name, group in spec.groups.items()}
    answers = []
    for workers in (1, 4):
        with ThreadPoolExecutor(workers) as pool:
            answers.append(oracle(spec, gains, pool))
    for name in spec.groups:
        assert torch.equal(answers[0][name], answers[1][name])
        assert answers[0][name].shape == (5, spec.groups[name].size)
