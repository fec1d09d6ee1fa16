"""Dual potentials: they change no answer, they nearly solve the problem, and the proof of the identity never lies."""

from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy.optimize import linear_sum_assignment

from c2m3_fl.core.assignment import assign
from c2m3_fl.core.potentials import centred, identity_is_optimal, potentials, sinkhorn
from tests.core.test_assignment import square, worth

KINDS = ["gaussian", "low rank", "planted", "ties", "constant", "huge", "tiny"]
NEAR = ["near the identity", "skewed", "half of it moves", "on the edge of overflow"]


def gain_of(kind, size=130):
    """A gain whose best permutation is far from the identity or near it."""
    generator = np.random.default_rng(0)
    noise = generator.normal(size=(size, size))
    near = 4 * np.eye(size) + noise
    few, half = np.arange(size), np.arange(size)
    few[:6], half[: size // 2] = few[[1, 2, 3, 4, 5, 0]], np.roll(half[: size // 2], 1)
    slopes = generator.normal(size=size)
    return {
        "gaussian": noise,
        "low rank": generator.normal(size=(size, 3)) @ generator.normal(size=(3, size)),
        "planted": 5 * np.eye(size)[generator.permutation(size)] + noise,
        "ties": np.round(noise),
        "constant": np.full((size, size), 2.5),
        "huge": 1e30 * noise,
        "tiny": 1e-30 * noise,
        "near the identity": near[few],
        "skewed": near[few] + 20 * (slopes[:, None] - slopes),
        "half of it moves": near[half],
        "on the edge of overflow": 3e38 * np.where(np.eye(size)[few] > 0, 1.0, np.tanh(noise) * 0.99),
    }[kind]


@given(square)
def test_the_certificate_never_lies(gain):
    if identity_is_optimal(gain):
        assert np.isclose(np.trace(gain), max(worth(gain, index) for index in permutations(range(len(gain)))))


@given(hnp.arrays(np.float64, st.tuples(st.integers(1, 5), st.integers(1, 4)), elements=st.integers(-4, 4).map(float)))
def test_the_certificate_holds_for_identical_nodes(params):
    # Row maxima on the diagonal do not: a small unit points along a large one.
    assert identity_is_optimal(params @ params.T)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("kind", KINDS + NEAR)
def test_potentials_change_no_answer(kind, dtype):
    # Large enough that they are used; scipy alone is the reference.
    gain = gain_of(kind).astype(dtype)
    best = worth(gain.astype(np.float64), linear_sum_assignment(gain, maximize=True)[1])
    found = assign(gain)
    assert sorted(found) == list(range(len(gain)))
    assert worth(gain.astype(np.float64), found) == pytest.approx(best, rel=1e-6 if dtype == np.float32 else 1e-12)


@pytest.mark.parametrize("kind", [kind for kind in KINDS + NEAR if kind != "on the edge of overflow"])
def test_centred_potentials_are_feasible(kind):
    # so their sum is never below the best permutation's worth
    gain = gain_of(kind)
    u, v, _ = centred(gain)
    rounding = 1e-12 * max(np.abs(u).max(), np.abs(v).max())
    assert (u[:, None] + v + rounding >= gain).all()
    best = worth(gain, linear_sum_assignment(gain, maximize=True)[1])
    assert u.sum() + v.sum() >= best - 1e-12 * np.abs(gain).sum()


def test_centred_potentials_prove_an_identity_that_the_diagonal_does_not():
    # slopes sum to zero around cycles, so all permutations get the same from them; the identity has 1 more
    slope = np.array([0.0, -10.0, -20.0])
    gain = np.full((3, 3), 2.0) + np.eye(3) + (slope[:, None] - slope)
    u, v, unsettled = centred(gain)
    assert unsettled == 0
    assert u.sum() + v.sum() == pytest.approx(np.trace(gain))


@pytest.mark.parametrize("kind", NEAR[:2])
def test_near_the_identity_few_units_are_unsettled(kind):
    # 6 of 130 units move; without the steps to the middle 20 to 60 of them are unsettled
    assert centred(gain_of(kind))[2] <= 0.15


@pytest.mark.parametrize("solve", [potentials, sinkhorn])
def test_potentials_nearly_solve_the_problem(solve):
    # The dual value is never below the best permutation's once no entry stands out; here it is within 2 % of it.
    generator = np.random.default_rng(1)
    gain = generator.normal(size=(200, 200))
    u, v = solve(gain)
    over = (gain - u[:, None] - v[None, :]).max()
    best = worth(gain, linear_sum_assignment(gain, maximize=True)[1])
    assert best <= u.sum() + v.sum() + 200 * max(over, 0) <= 1.02 * best
