"""Large assignment problems on an accelerator: potentials are found there, for all problems of one size at once.

What is left to the exact solver on the CPU are the reduced costs, on which it takes short paths. The potentials are
those of `potentials`; there they take longer than the solver itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy.typing as npt
import torch
from torch import Tensor

from c2m3_fl.core.potentials import CENTRINGS, SCALINGS, TEMPERATURES, UNDERFLOW, UNSETTLED
from c2m3_fl.errors import ParamsError

LEAST = 256  # size from which a thread of the CPU takes longer for the potentials than an accelerator for many problems
_AT_A_TIME = 1 << 26  # entries of functionals that are looked at together; several times as much memory

Costs = dict[tuple[str, int], npt.NDArray[Any] | None]


def reduced_costs(gains: Mapping[str, Tensor], names: Sequence[str]) -> Costs:
    """Costs to be minimised, by group and node; None where the identity is proven to be among the best.

    Parameters
    ----------
    gains : mapping of str to Tensor, shape (nodes, size, size)
        Functionals to be maximised by permutations.
    names : sequence of str
        The groups to be looked at.

    Raises
    ------
    ParamsError
        When a functional is not finite.
    """
    sizes: dict[int, list[tuple[str, int]]] = {}
    for name in names:
        sizes.setdefault(gains[name].shape[1], []).extend((name, node) for node in range(len(gains[name])))
    found: Costs = {}
    for size, whole in sizes.items():
        at_once = max(1, _AT_A_TIME // size**2)
        for first in range(0, len(whole), at_once):
            found |= _together(gains, whole[first : first + at_once])
    return found


def _together(gains: Mapping[str, Tensor], places: Sequence[tuple[str, int]]) -> Costs:
    """The costs of some problems of one size."""
    gain = torch.stack([gains[name][node] for name, node in places])
    finite, still = torch.stack([gain.isfinite().flatten(1).all(1), _identity_is_optimal(gain)]).tolist()
    if not all(finite):
        raise ParamsError("the agreement overflows: the nodes' values are too large for their dtype, scale them down")
    found: Costs = dict.fromkeys(places)
    left = [row for row, proven in enumerate(still) if not proven]
    if left:
        some = gain if len(left) == len(places) else torch.stack([gain[row] for row in left])
        found |= {places[row]: cost for row, cost in zip(left, _reduced(some).cpu().numpy(), strict=True)}
    return found


def _identity_is_optimal(gain: Tensor) -> Tensor:
    """`potentials.identity_is_optimal` for every functional."""
    half = 0.5 * gain.diagonal(dim1=1, dim2=2)
    shift = 0.5 * (gain.mean(2) - gain.mean(1))
    return (gain <= (half + shift)[:, :, None] + (half - shift)[:, None, :]).flatten(1).all(1)


def _reduced(gain: Tensor) -> Tensor:
    """Every functional's distance from its potentials, in its dtype, shape (problems, size, size)."""
    u, v, unsettled = centred(gain)
    near = (unsettled <= UNSETTLED)[:, None]
    if not bool(near.all()):
        hot_u, hot_v = sinkhorn(gain)
        u, v = torch.where(near, u, hot_u), torch.where(near, v, hot_v)
    wide = (u.double()[:, :, None] - gain).add_(v[:, None, :])
    return wide.to(gain.dtype)


def centred(gain: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`potentials.centred` for every functional, shape (problems, size, size)."""
    own = gain.diagonal(dim1=1, dim2=2)
    below = own[:, None, :] - gain
    below.diagonal(dim1=1, dim2=2).fill_(torch.inf)
    x = 0.5 * (own + (gain.mean(2) - gain.mean(1)))
    for _ in range(CENTRINGS):
        upper = (below + x[:, :, None]).amin(1)
        lower = (x[:, None, :] - below).amax(2)
        x = 0.5 * (upper + lower)
    below.diagonal(dim1=1, dim2=2).zero_()
    below += x[:, :, None]
    columns = below.amin(1)
    below -= columns[:, None, :]
    rows = below.amin(2)
    settled = (below.diagonal(dim1=1, dim2=2) <= rows).to(gain.dtype).mean(1)
    u, v = x - rows, own - columns
    finite = u.isfinite().all(1) & v.isfinite().all(1)
    return u, v, torch.where(finite, 1 - settled, 1.0)


def sinkhorn(gain: Tensor) -> tuple[Tensor, Tensor]:
    """`potentials.sinkhorn` for every functional, shape (problems, size, size)."""
    rows = gain.amax(2)
    below = gain - rows[:, :, None]
    columns = below.amax(1)
    below -= columns[:, None, :]
    unit = -below.mean((1, 2), dtype=torch.float64)
    usable = (TEMPERATURES[-1] * unit > torch.finfo(gain.dtype).tiny) & unit.isfinite()
    unit = torch.where(usable, unit, 1.0)
    for temperature in TEMPERATURES:
        scale = (temperature * unit).to(gain.dtype)[:, None]
        kernel = (below / scale[:, :, None]).exp_().add_(UNDERFLOW)
        b = torch.ones_like(rows)
        for _ in range(SCALINGS):
            a = 1 / torch.bmm(kernel, b[:, :, None])[:, :, 0]
            b = 1 / torch.bmm(a[:, None, :], kernel)[:, 0]
        u, v = -scale * a.log(), -scale * b.log()
        rows, columns = rows + u, columns + v
        below -= u[:, :, None]
        below -= v[:, None, :]
    usable = usable[:, None]
    return torch.where(usable, rows, 0.0), torch.where(usable, columns, 0.0)
