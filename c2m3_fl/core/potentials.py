"""Dual potentials of an assignment problem, and the proof that the identity solves it.

Potentials u, v are feasible where ``u_a + v_b >= C_ab``; then no permutation is worth more than their sum, and one that
uses only entries with equality is best. Taken off rows and columns they change the worth of all permutations alike, so
they change no answer, but the exact solver takes short paths where few entries stand out.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Matrix = npt.NDArray[Any]
Vector = npt.NDArray[Any]

TEMPERATURES = (0.3, 0.1, 0.03, 0.01)  # in units of the mean distance of an entry from its row's and column's best
SCALINGS = 5  # at every temperature
UNDERFLOW = 1e-30  # keeps a row or column whose entries all vanish
_SAMPLE = 32  # size from which a look at one row pays before the whole matrix is checked
CENTRINGS = 3  # each costs two looks at the matrix; from the fourth on the solver gains less than that
UNSETTLED = 0.5  # share of units beyond which Sinkhorn's potentials save the solver more than they cost


def identity_is_optimal(gain: Matrix) -> bool:
    """Whether dual potentials prove that the identity maximises ``sum_a C_(a, p(a))``: sufficient, not necessary.

    Potentials ``u_a = C_aa / 2 + x_a`` and ``v_b = C_bb / 2 - x_b`` are worth as much as the identity; they are
    feasible where ``u_a + v_b >= C_ab``. The shift x, half the mean over b of C_ab - C_ba, takes up the antisymmetric
    part of C. Without it the condition is ``2 C_ab <= C_aa + C_bb``, which holds for identical nodes.
    """
    half = 0.5 * gain.diagonal()
    if len(gain) > _SAMPLE and (0.5 * gain[0] + 0.5 * gain[:, 0] > half + half[0]).any():
        return False  # one row nearly always shows that there is no proof
    with np.errstate(over="ignore", invalid="ignore"):  # a sum that overflows proves nothing
        shift = 0.5 * (gain.mean(axis=1) - gain.mean(axis=0))
        return bool((gain <= (half + shift)[:, None] + (half - shift)[None, :]).all())


def potentials(gain: Matrix) -> tuple[Vector, Vector]:
    """Dual potentials u, v that nearly solve the assignment problem: ``u_a + v_b`` is hardly below ``C_ab``.

    How good they are changes the time of the exact solver, and nothing else. Near the identity they are `centred`, else
    those of `sinkhorn`.
    """
    u, v, unsettled = centred(gain)
    return (u, v) if unsettled <= UNSETTLED else sinkhorn(gain)


def centred(gain: Matrix) -> tuple[Vector, Vector, float]:
    """Potentials for which the identity is nearly best, and the share of units whose own entry is not their row's best.

    With ``u_a = x_a`` and ``v_b = C_bb - x_b`` the identity's entries hold with equality, and feasible are the x with
    ``x_b <= x_a + C_bb - C_ab`` for all a, b. Where such x exist, every x_b lies between two bounds that the others
    give; x is moved to their middle, all units at once and a few times. That halves violations, and leaves the entries
    that are not in use as far below the potentials as possible.
    """
    size, own = len(gain), gain.diagonal()
    with np.errstate(over="ignore", invalid="ignore"):
        below = own - gain
        np.fill_diagonal(below, np.inf)
        mean = np.full(size, 1 / size, gain.dtype)
        x, scratch = 0.5 * (own + (gain @ mean - mean @ gain)), np.empty_like(below)
        for _ in range(CENTRINGS):
            upper = np.add(below, x[:, None], out=scratch).min(axis=0)
            lower = -np.subtract(below, x, out=scratch).min(axis=1)
            x = 0.5 * (upper + lower)
        np.fill_diagonal(below, 0)
        below += x[:, None]
        columns = below.min(axis=0)
        below -= columns
        rows = below.min(axis=1)
        settled = below.diagonal() <= rows
        u, v = x - rows, own - columns
    finite = np.isfinite(u).all() and np.isfinite(v).all()  # differences may overflow where the entries do not
    return u, v, 1 - float(settled.mean()) if finite else 1.0


def sinkhorn(gain: Matrix) -> tuple[Vector, Vector]:
    """Sinkhorn scaling of ``exp(C / T)`` while the temperature T falls (Kosowsky and Yuille, 1994)."""
    rows = gain.max(axis=1)
    with np.errstate(over="ignore"):
        below = gain - rows[:, None]
        columns = below.max(axis=0)
        below -= columns
    unit = -float(below.mean(dtype=np.float64))
    if not np.finfo(below.dtype).tiny < TEMPERATURES[-1] * unit < np.inf:
        return np.zeros_like(rows), np.zeros_like(columns)  # nothing stands out, or nothing that the dtype can scale
    for temperature in TEMPERATURES:
        scale = below.dtype.type(temperature * unit)
        kernel = np.exp(below / scale) + below.dtype.type(UNDERFLOW)
        b = np.ones(len(gain), below.dtype)
        for _ in range(SCALINGS):
            a = 1 / (kernel @ b)
            b = 1 / (a @ kernel)
        u, v = -scale * np.log(a), -scale * np.log(b)
        rows, columns = rows + u, columns + v
        below -= u[:, None]
        below -= v
    return rows, columns
