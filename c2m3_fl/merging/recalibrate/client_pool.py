"""Clients' answers pooled: outliers dropped, weights capped, the rest summed.

A sum of Gram matrices is positive semidefinite; an entrywise median of them need not be.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from c2m3_fl.core.averaging import normalise_weights
from c2m3_fl.merging.recalibrate.client_outliers import capped
from c2m3_fl.merging.recalibrate.client_sums import Answer, FitAnswer, GramAnswer
from c2m3_fl.merging.recalibrate.ridge import Sums
from c2m3_fl.network.moments import Moments

# Largest ratio to the median size. Honest clients of the wine and breast cancer data of scikit-learn, one class each,
# stay below it (see the module's tests); a reply scaled by -5 exceeds it at the first operator.
LIMIT = 10.0
_SMALL = 0.1  # residuals below this share of the targets' power are alike: small ones vary by large factors
_TINY = 1e-30  # power that counts as none
_TARGETS, _RESIDUALS = "targets", "residuals"
Affine = tuple[Tensor, Tensor]


def outlying(answers: Mapping[int, Answer], layer: Affine | None = None) -> dict[int, str]:
    """Which clients' answers about one operator do not fit the others', and why.

    The sizes that are compared are mean squares per row: of inputs, of targets, of residuals.

    Parameters
    ----------
    answers : mapping of int to Answer
        By client, all of one role.
    layer : pair of Tensor, optional
        Matrices and offsets of the operator in the merged network, to which the residuals refer.
    """
    sizes = {client: _sizes(answer, layer) for client, answer in answers.items()}
    names = list(next(iter(sizes.values()), {}))
    found: dict[int, str] = {}
    for name in names:
        values = {client: max(each[name], _TINY) for client, each in sizes.items()}
        if name == _RESIDUALS:
            floor = _SMALL * _median([each[_TARGETS] for each in sizes.values()])
            values = {client: max(value, floor, _TINY) for client, value in values.items()}
        median = _median(list(values.values()))
        for client, value in values.items():
            ratio = math.log(value / median)
            if abs(ratio) > math.log(LIMIT):
                found[client] = f"the mean square of its {name} is {math.exp(min(ratio, 700)):.3g} times the median"
    return found


def shares_of(weights: Sequence[float], *, equally: bool) -> list[float]:
    """Weights that sum to one, none above ten times the median; equal ones where all are zero.

    Parameters
    ----------
    weights : sequence of float
        The strategy's weights of the clients that count.
    equally : bool
        Whether the strategy ignores them.
    """
    if equally or not any(weights):
        return [1 / len(weights)] * len(weights)
    positive = [weight for weight in weights if weight > 0]
    bound = max(capped(positive))
    shares: list[float] = normalise_weights([min(weight, bound) for weight in weights], len(weights)).tolist()
    return shares


def pool_fits(answers: Sequence[FitAnswer], shares: Sequence[float]) -> FitAnswer:
    """Sums in which every client has its share, whatever its number of rows; the counts add to one.

    Parameters
    ----------
    answers : sequence of FitAnswer
        At least one.
    shares : sequence of float
        One per answer; they sum to one.
    """
    total: FitAnswer | None = None
    for answer, share in zip(answers, shares, strict=True):
        part = _scaled(answer, share / (answer.train.count + answer.held_out.count))
        total = part if total is None else total.combine(part)
    assert total is not None  # at least one answer
    return total


def pool_moments(answers: Sequence[Moments], shares: Sequence[float]) -> Moments:
    """Moments of the mixture in which every client has its share, whatever its number of values.

    Parameters
    ----------
    answers : sequence of Moments
        At least one.
    shares : sequence of float
        One per answer; they sum to one.
    """
    count = sum(moments.count for moments in answers)
    weights = torch.tensor(shares, dtype=torch.float64)[:, None]
    means = torch.stack([moments.mean for moments in answers])
    mean = means[0] + (weights * (means - means[0])).sum(0)
    variances = torch.stack([moments.variance for moments in answers])
    variance = (weights * (variances + (means - mean).square())).sum(0)
    return Moments(count, mean, variance * count)


def _scaled(answer: FitAnswer, factor: float) -> FitAnswer:
    def scaled(sums: Sums | None) -> Sums | None:
        return None if sums is None else sums.scaled(factor)

    return FitAnswer(
        answer.train.scaled(factor),
        answer.held_out.scaled(factor),
        scaled(answer.sum_train),
        scaled(answer.sum_held_out),
    )


def _sizes(answer: Answer, layer: Affine | None) -> dict[str, float]:
    if isinstance(answer, FitAnswer):
        both = answer.train.combine(answer.held_out)
        targets = both if layer is None else both.against(-layer[0], -layer[1])
        return {
            "inputs": _input_power(both),
            _TARGETS: float(targets.rr.sum()) / both.count,
            _RESIDUALS: float(both.rr.sum()) / both.count,
        }
    if isinstance(answer, GramAnswer):
        return {"inputs": _input_power(answer.sums)}
    own = {} if answer.own is None else {"outputs": _power(answer.own)}
    return {"outputs in the merged network": _power(answer.merged), **own}


def _input_power(sums: Sums) -> float:
    return float(sums.xx.diagonal(dim1=-2, dim2=-1).sum()) / sums.count


def _power(moments: Moments) -> float:
    return float((moments.variance + moments.mean.square()).sum())


def _median(values: Sequence[float]) -> float:
    """The lower median: of two clients the smaller counts, because values that are too large do the harm."""
    return sorted(values)[(len(values) - 1) // 2]
