"""The exact step on polynomials."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from c2m3_fl.core.line_search import added, best_step, power_basis

coefficients = st.lists(st.floats(-10, 10).map(lambda c: round(c, 6)), min_size=1, max_size=7)


@given(coefficients)
def test_no_point_of_a_grid_is_better(polynomial):
    step, value = best_step(polynomial)
    curve = np.polynomial.Polynomial(polynomial)
    assert 0 <= step <= 1
    assert value == pytest.approx(curve(step))
    assert value >= curve(np.linspace(0, 1, 1001)).max() - 1e-9


@given(coefficients, st.floats(0, 1))
def test_both_bases_give_the_same_value(bernstein, t):
    degree = len(bernstein) - 1
    expected = sum(c * (1 - t) ** (degree - s) * t**s for s, c in enumerate(bernstein))
    assert sum(c * t**s for s, c in enumerate(power_basis(bernstein))) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize(
    ("polynomial", "step"),
    [
        ([1.0], 1.0),  # constant: a full step keeps the iterate a vertex
        ([0.0, 1.0], 1.0),
        ([0.0, -1.0], 0.0),
        ([0.0, 1.0, -1.0], 0.5),  # t - t^2
        ([0.0, 1.0, 0.0, -1.0], 3**-0.5),  # t - t^3
        ([0.0, 1.0, -4.0, 4.0], 1.0),  # a local maximum at 1/6, the largest value at the end
        ([6.0, 0.0165, -0.5, -3.6e-15, 1e-17], 0.0165),  # rounding above the true degree
    ],
)
def test_worked_maxima(polynomial, step):
    assert best_step(polynomial)[0] == pytest.approx(step)


def test_sums_may_differ_in_degree():
    assert added([[1.0], [1.0, 2.0, 3.0], [0.0, 1.0]]) == [2.0, 3.0, 3.0]
    assert added([]) == [0.0, 0.0]
