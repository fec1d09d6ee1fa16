"""The exact step: the true maximiser on [0, 1] of the polynomial that the agreement is along a step."""

from __future__ import annotations

from collections.abc import Sequence
from math import comb

import numpy as np

_NEGLIGIBLE = 1e-12  # leading coefficients this small, relative to the largest, are rounding and ruin the roots


def power_basis(bernstein: Sequence[float]) -> list[float]:
    """Coefficients of ``t^s`` from those of ``(1 - t)^(n - s) t^s``, n one less than their number."""
    degree = len(bernstein) - 1
    result = [0.0] * (degree + 1)
    for low, coefficient in enumerate(bernstein):
        for extra in range(degree - low + 1):
            result[low + extra] += coefficient * comb(degree - low, extra) * (-1) ** extra
    return result


def added(polynomials: Sequence[Sequence[float]]) -> list[float]:
    """Sum of polynomials in the power basis, of any degrees; no polynomials sum to the line zero."""
    total = [0.0] * max((len(polynomial) for polynomial in polynomials), default=2)
    for polynomial in polynomials:
        for power, coefficient in enumerate(polynomial):
            total[power] += coefficient
    return total


def best_step(polynomial: Sequence[float]) -> tuple[float, float]:
    """Where on [0, 1] a polynomial is largest, and its value there; the longest such step on ties.

    Parameters
    ----------
    polynomial : sequence of float
        Coefficients of t^0, t^1, ...
    """
    if len(polynomial) == 3:
        return _best_of_parabola(*polynomial)
    curve = np.polynomial.Polynomial(polynomial)
    slope = curve.deriv()
    slope = slope.trim(_NEGLIGIBLE * float(np.abs(slope.coef).max()))
    stationary = [root.real for root in slope.roots().tolist()]  # complex ones too: rounding splits double roots
    candidates = [1.0, *sorted((t for t in stationary if 0 < t < 1), reverse=True), 0.0]
    step = max(candidates, key=lambda t: float(curve(t)))
    return step, float(curve(step))


def _best_of_parabola(constant: float, slope: float, bend: float) -> tuple[float, float]:
    """The same for a parabola, the course of one node in terms of one or two grouped axes."""
    peaks = bend < 0 and 0 < slope < -2 * bend
    step = slope / (-2 * bend) if peaks else float(slope + bend >= 0)
    return step, constant + step * (slope + step * bend)
