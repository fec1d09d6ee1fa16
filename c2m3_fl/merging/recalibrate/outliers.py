"""Sums that clients answer with: which of them do not fit the others', and how much each may weigh.

Outliers are left out and the rest is summed, because a sum of Gram matrices is positive semidefinite and an
entrywise median of them need not be.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

# Largest ratios of a mean square to the clients' median, and reciprocals of the smallest. Chosen on the wine and breast
# cancer data of scikit-learn, which no table shows: perceptrons of honest clients, from alike to one class each, reach
# 9 and 110 there, and at the other end 1/15.
LIMITS = {"inputs": 30.0, "targets": 300.0, "outputs": 300.0}


def far_from_others(values: Sequence[Tensor], *, limit: float, floor: float) -> list[int]:
    """Indices of the values that are far from the values' entrywise median.

    A value is far when its distance from the median exceeds both `limit` times the median distance and `floor` times
    the norm of the median. The second bound keeps a client that is a little odd among clients that are all alike.
    Of two values the larger counts as the odd one.

    Parameters
    ----------
    values : sequence of Tensor
        One per client, of equal shapes; finite.
    limit, floor : float
        See above.
    """
    if len(values) < 2:
        return []
    stacked = torch.stack([value.double().flatten() for value in values])
    stacked = stacked / stacked.abs().max().clamp_min(torch.finfo(torch.float64).tiny)  # squares must not overflow
    # the lower one of an even number; of two values the smaller one stands for both
    median = stacked.median(0).values if len(stacked) > 2 else stacked[int(_norms(stacked).argmin())]
    distance = _norms(stacked - median)
    bound = torch.maximum(limit * distance.median(), floor * _norms(median[None])[0])
    return [index for index, value in enumerate(distance.tolist()) if value > float(bound)]


def capped(counts: Sequence[float], limit: float = 10.0) -> list[float]:
    """The counts, none of them above `limit` times their (lower) median, so that no claim outweighs all others."""
    bound = limit * float(torch.tensor(counts, dtype=torch.float64).median())
    return [min(count, bound) for count in counts]


def _norms(rows: Tensor) -> Tensor:
    """Euclidean norm of every row, without overflow or underflow of the squares."""
    largest = rows.abs().amax(1, keepdim=True).clamp_min(torch.finfo(rows.dtype).tiny)
    norms: Tensor = largest[:, 0] * (rows / largest).square().sum(1).sqrt()
    return norms
