"""Clients' answers pooled: outliers dropped, weights capped, the rest summed.

A sum of Gram matrices is positive semidefinite; an entrywise median of them need not be.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from c2m3_fl.core.averaging import normalise_weights
from c2m3_fl.core.spec import Params
from c2m3_fl.merging.recalibrate.from_clients.sketch import Centred, SketchedFit
from c2m3_fl.merging.recalibrate.from_clients.sums import Answer, FitAnswer, GramAnswer
from c2m3_fl.merging.recalibrate.outliers import LIMITS, capped, far_from_others
from c2m3_fl.merging.recalibrate.ridge import Sums
from c2m3_fl.network.moments import Moments
from c2m3_fl.network.program import Program

# Distance of a network's weights from the entrywise median, in median distances and in norms of the median: honest
# clients of the same data reach 1.9 norms; a network that is scaled by -5 has 6, by 5 it has 4.
_FAR, _FLOOR = 5.0, 3.0
_FEW = 3  # clients, of which the median is a majority's
_TINY = 1e-30  # power that counts as none
_EPSILON = 1e-5  # BatchNorm adds it to variances by default: below it they all do the same
Affine = tuple[Tensor, Tensor]
Client = TypeVar("Client")


def outlying(
    answers: Mapping[Client, Answer], layer: Affine | None = None, owned: Mapping[Client, Tensor] | None = None
) -> dict[Client, str]:
    """Which clients' answers about one operator are too large or too small to fit the others', and why.

    Mean squares per row are compared: of inputs, and of targets or outputs. Where half of the clients differ from the
    other half, as one of two may, nobody knows which half is wrong, and all are odd.

    Parameters
    ----------
    answers : mapping of clients to Answer
        All of one role.
    layer : pair of Tensor, optional
        Matrices and offsets of the operator in the merged network, to which the residuals refer.
    owned : mapping of clients to Tensor of bool, optional
        The channels that each client's own network has: targets are compared per channel that it has. None: all.
    """
    sizes = {
        client: _sizes(answer, layer, None if owned is None else owned[client]) for client, answer in answers.items()
    }
    found: dict[Client, str] = {}
    for name in next(iter(sizes.values()), {}):
        limit, middles = LIMITS[name], _medians([each[name] for each in sizes.values()])
        for client, each in sizes.items():
            for middle in middles:
                ratio = each[name] / max(_TINY, middle)
                least = 1 / limit if middle > _TINY else 0.0  # where most have no power, that is not odd
                if not least <= ratio <= limit:
                    found[client] = (
                        f"the mean square of its {name} is {ratio:.3g} times the median, "
                        f"expected from 1/{limit:g} to {limit:g}"
                    )
    return found


def far_networks(program: Program, endpoints: Sequence[Params]) -> list[int]:
    """Indices of the aligned networks that have a weight far from the others', from three networks on.

    Parameters
    ----------
    program : Program
        The traced network.
    endpoints : sequence of mappings of str to Tensor
        The aligned networks.
    """
    if len(endpoints) < _FEW:
        return []
    weights = [operator.weight for operator in program.operators if operator.linear]
    return sorted(
        {
            index
            for name in weights
            for index in far_from_others([each[name] for each in endpoints], limit=_FAR, floor=_FLOOR)
        }
    )


def far_statistics(program: Program, endpoints: Sequence[Params]) -> list[int]:
    """Indices of the aligned networks whose running statistics are far from the others', from three networks on.

    Means are compared in spreads, and spreads by their logarithms.

    Parameters
    ----------
    program : Program
        The traced network.
    endpoints : sequence of mappings of str to Tensor
        The aligned networks.
    """
    if len(endpoints) < _FEW:
        return []
    found: set[int] = set()
    for norm in {each.mean: each for each in program.operators if each.mean}.values():
        means = torch.stack([each[norm.mean].double() for each in endpoints])
        spreads = torch.stack([each[norm.variance].double() for each in endpoints])
        spreads = (spreads.clamp_min(0) + _EPSILON).sqrt()
        middle = spreads.median(0).values
        values = torch.stack([(means - means.median(0).values) / middle, (spreads / middle).log()], 1)
        distance = values.square().mean(2).sqrt().amax(1)
        far = distance > (_FAR * distance.median()).clamp_min(_FLOOR)
        found |= set(far.nonzero()[:, 0].tolist())
    return sorted(found)


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


def pool_fits(answers: Sequence[FitAnswer | SketchedFit], shares: Sequence[float]) -> FitAnswer:
    """Sums in which every client has its share, whatever its number of rows; the counts add to one.

    Parameters
    ----------
    answers : sequence of FitAnswer or SketchedFit
        At least one.
    shares : sequence of float
        One per answer; they sum to one.
    """
    total: FitAnswer | None = None
    for each, share in zip(answers, shares, strict=True):
        answer = _sums_of(each) if isinstance(each, SketchedFit) else each
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
    weights = torch.tensor(shares, dtype=torch.float64, device=answers[0].mean.device)[:, None]
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


def _sums_of(answer: SketchedFit) -> FitAnswer:
    sides = (answer.train, answer.held_out)
    train, held_out = (side.sums(0) for side in sides)
    further = (side.sums(1) if len(side.r) > 1 else None for side in sides)
    return FitAnswer(train, held_out, *further)


def _sizes(answer: Answer, layer: Affine | None, owned: Tensor | None) -> dict[str, float]:
    if isinstance(answer, SketchedFit):
        sides, count = (answer.train, answer.held_out), answer.train.count + answer.held_out.count
        powers = [_sketched_powers(side, layer, owned) for side in sides]
        return {name: sum(each[name] for each in powers) / count for name in powers[0]}
    if isinstance(answer, FitAnswer):
        both = answer.train.combine(answer.held_out)
        targets = both if layer is None else both.against(-layer[0], -layer[1])
        return {"inputs": _input_power(both), "targets": _summed(targets.rr, owned) / both.count}
    if isinstance(answer, GramAnswer):
        return {"inputs": _input_power(answer.sums)}
    own = {} if answer.own is None else {"targets": _power(answer.own, owned)}
    return {"outputs": _power(answer.merged), **own}


def _sketched_powers(side: Centred, layer: Affine | None, owned: Tensor | None) -> dict[str, float]:
    """Sums of squares, over all rows, of inputs and of targets."""
    rows, mean = side.rs[0], side.r[0]
    if layer is not None:
        matrix, offset = layer
        rows, mean = rows + side.xs @ matrix, mean + (side.x[:, None, :] @ matrix)[:, 0] + offset
    inputs = float(side.xs.square().sum() + side.count * side.x.square().sum())
    return {"inputs": inputs, "targets": _summed(rows.square().sum(1) + side.count * mean.square(), owned)}


def _input_power(sums: Sums) -> float:
    return float(sums.xx.diagonal(dim1=-2, dim2=-1).sum()) / sums.count


def _power(moments: Moments, owned: Tensor | None = None) -> float:
    return _summed(moments.variance + moments.mean.square(), owned)


def _summed(powers: Tensor, owned: Tensor | None) -> float:
    """Sum over channels; for a client that has some of them alone, their mean times the number of all."""
    if owned is None:
        return float(powers.sum())
    return float(powers.flatten()[owned].sum()) * owned.numel() / max(1, int(owned.sum()))


def _medians(values: Sequence[float]) -> tuple[float, float]:
    """The lower and the upper median: the same one of an odd number."""
    ordered = sorted(values)
    return ordered[(len(ordered) - 1) // 2], ordered[len(ordered) // 2]
