"""Solve one operator of the merged network from the sums that clients answered, pooled.

``W = W̄ + (Σxx + λ D)⁻¹ Σxr`` with D = mean(diag Σxx) I, all about the means, so that the bias is not penalised; λ, or
"keep the average", by the held-out sums. Regression shrinks the spread of a channel, so its mean and spread are then
set to those of the targets; both follow from the same sums.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from c2m3_fl.core.spec import Params
from c2m3_fl.merging.recalibrate.correction import compared, rescale
from c2m3_fl.merging.recalibrate.from_clients.folded_norm import effective, epsilon, spread_of
from c2m3_fl.merging.recalibrate.from_clients.plan import norm_behind
from c2m3_fl.merging.recalibrate.from_clients.sums import FitAnswer
from c2m3_fl.merging.recalibrate.ridge import Choice, Sums, choose_each
from c2m3_fl.merging.recalibrate.targets import Target
from c2m3_fl.merging.reports import FitReport, OperatorReport
from c2m3_fl.network.moments import Moments
from c2m3_fl.network.operators import Operator
from c2m3_fl.network.program import Program
from c2m3_fl.network.rows import from_matrix, weight_matrix

_DEAD = 1e-7  # spread below which, relative to the target's, a channel varies by rounding alone


@dataclass(frozen=True)
class Solution:
    """The best way to fit an operator.

    Attributes
    ----------
    name : str
        What was aimed at, for the report.
    matrix : Tensor, shape (groups, inputs, outputs)
        The new weights, with the gain of the BatchNorm behind them.
    fit : Choice
        How they were found.
    target : Target
        What the channels' moments should be.
    """

    name: str
    matrix: Tensor
    fit: Choice
    target: Target


def fit_operator(
    program: Program,
    operator: Operator,
    params: dict[str, Tensor],
    pooled: FitAnswer,
    strengths: Sequence[float],
    channels: Tensor | None = None,
) -> list[OperatorReport]:
    """Fit an operator, together with the BatchNorm behind it, and put it in place.

    Parameters
    ----------
    program : Program
        The traced network.
    operator : Operator
        A linear layer, matrix product or convolution.
    params : dict of str to Tensor
        The merged network whose current weights the residuals refer to; changed in place.
    pooled : FitAnswer
        Sums over all clients.
    strengths : sequence of float
        Ridge strengths from which the held-out sums choose; keeping the weights is always a candidate.
    channels : Tensor of bool, shape (channels,), optional
        The channels whose errors count in that choice, and whose result is of use; all by default.
    """
    norm = norm_behind(program, operator)
    centred = bool(operator.bias) or operator.feeds_norm
    best = _solution(operator, norm, params, pooled, strengths, channels, centred=centred)
    action = "refit" if best.name == "own output" else f"refit to the {best.name}"
    quality = FitReport(best.fit.strength, best.fit.error_before, best.fit.error)
    reports = [OperatorReport(operator.name, operator.module, action, 0.0, 1.0, fit=quality)]
    joint = pooled.train.combine(pooled.held_out)
    if norm is not None:
        return [*reports, _fold_norm(program, operator, norm, params, best, joint)]
    weight = params[operator.weight]
    program.assign(params, operator.weight, from_matrix(operator, best.matrix, weight.shape))
    if operator.feeds_norm:
        return reports  # a norm that takes the statistics of the batch itself
    _, offset = effective(operator, None, params)
    return [*reports, rescale(program, operator, params, _output_moments(joint, best.matrix, offset), best.target)]


def restate_behind(
    program: Program, operator: Operator, params: dict[str, Tensor], pooled: FitAnswer, channels: Tensor
) -> None:
    """Give some channels of the BatchNorm behind an operator that stays as it is the statistics of all clients' data.

    Parameters
    ----------
    program : Program
        The traced network.
    operator : Operator
        The operator; without a BatchNorm behind it nothing happens.
    params : dict of str to Tensor
        The merged network; changed in place.
    pooled : FitAnswer
        Sums over all clients.
    channels : Tensor of bool, shape (channels,)
        Which ones; those that do not vary keep their statistics.
    """
    norm = norm_behind(program, operator)
    if norm is None:
        return
    matrix = weight_matrix(operator, params[operator.weight].double())
    moments = _output_moments(pooled.train.combine(pooled.held_out), matrix, _bias(operator, params, matrix))
    kept = ~channels | (moments.std <= _DEAD * moments.mean.abs())
    for name, value in ((norm.mean, moments.mean), (norm.variance, moments.variance)):
        program.assign(params, name, torch.where(kept, params[name].double(), value))


def _solution(
    operator: Operator,
    norm: Operator | None,
    params: Params,
    pooled: FitAnswer,
    strengths: Sequence[float],
    channels: Tensor | None,
    *,
    centred: bool,
) -> Solution:
    """The best fit to the own output and, before a residual addition, to the own sum without the merged skip.

    Behind a convolution, BatchNorm with the statistics of all clients' data is one more network to start from. All
    are compared by the held-out error of what the next operator reads: of the sum where there is one.
    """
    joint = pooled.train.combine(pooled.held_out)
    matrix, offset = effective(operator, norm, params)
    starts = [(matrix, offset)]
    if norm is not None:
        conv = weight_matrix(operator, params[operator.weight].double())
        starts.append(
            effective(
                operator, norm, _restated(norm, params, _output_moments(joint, conv, _bias(operator, params, conv)))
            )
        )
    goals = {"own output": (pooled.train, pooled.held_out)}
    if pooled.sum_train is not None and pooled.sum_held_out is not None:
        goals["own sum without the merged skip"] = (pooled.sum_train, pooled.sum_held_out)
    judge = pooled.sum_held_out or pooled.held_out
    sides, about = [], []
    for name, (train, held_out) in goals.items():
        target = counting(_target(train.combine(held_out).against(-matrix, -offset)), channels)
        for base, shift in starts:
            change, moved = base - matrix, shift - offset
            moved_on = [each.against(change, moved) for each in (train, held_out, judge)]
            sides.append(moved_on if centred else [each.through_origin() for each in moved_on])
            about.append((name, base, target))
    spreads = [target.std.reshape(len(matrix), -1) for _, _, target in about]
    problems = [(train, held_out, spread) for (train, held_out, _), spread in zip(sides, spreads, strict=True)]
    found = choose_each(problems, strengths)
    errors = [
        _error(fit, train, judging, spread)
        for fit, (train, _, judging), spread in zip(found, sides, spreads, strict=True)
    ]
    best = min(range(len(errors)), key=errors.__getitem__)
    name, base, target = about[best]
    return Solution(name, base + found[best].change(*sides[best][:2]), found[best], target)


def _error(fit: Choice, train: Sums, judge: Sums, spread: Tensor) -> float:
    """Held-out error of what the examples to fit alone give, relative to the targets' variance."""
    weight = torch.where(spread > 0, 1 / spread.square().clamp_min(torch.finfo(torch.float64).tiny), 0.0)
    return float((judge.error(fit.trained, train.offset(fit.trained)) * weight).mean())


def _fold_norm(
    program: Program, operator: Operator, norm: Operator, params: dict[str, Tensor], best: Solution, joint: Sums
) -> OperatorReport:
    """Put new weights before a BatchNorm, and give it their statistics and the targets' moments.

    The rows of the convolution keep the spread that the merged network's had. A BatchNorm without weight and bias keeps
    its variance: rows and running mean take the targets' moments.
    """
    before = weight_matrix(operator, params[operator.weight].double())
    bias = _bias(operator, params, before)
    now, then = _output_moments(joint, before, bias), _output_moments(joint, best.matrix, bias)
    report = compared(norm, "mean and spread", _behind(norm, params, now), best.target)
    alive = then.std > _DEAD * best.target.std
    divisor = spread_of(norm, params)
    sign = torch.where(params[norm.weight] < 0, -1.0, 1.0) if norm.weight else torch.ones_like(divisor)
    kept = torch.where(now.std > 0, now.std, 1.0) if norm.weight else best.target.std * divisor
    scale = torch.where(alive, sign * kept / torch.where(alive, then.std, 1.0), 1.0).reshape(len(before), 1, -1)
    matrix = torch.where(alive.reshape(scale.shape), best.matrix * scale, before)
    program.assign(params, operator.weight, from_matrix(operator, matrix, params[operator.weight].shape))
    moments = _output_moments(joint, matrix, bias)
    if not norm.weight:
        program.assign(params, norm.mean, moments.mean - best.target.mean * divisor)
        return report
    program.assign(params, norm.mean, moments.mean)
    program.assign(params, norm.variance, moments.variance)
    tiny = torch.finfo(torch.float64).tiny
    exact = sign * best.target.std * (1 + epsilon(norm) / moments.variance.clamp_min(tiny)).sqrt()
    program.assign(params, norm.weight, torch.where(alive, exact, params[norm.weight].double()))
    if norm.bias:
        program.assign(params, norm.bias, best.target.mean)
    return report


def _behind(norm: Operator, params: Params, moments: Moments) -> Moments:
    """Moments of a BatchNorm's output from those of its input."""
    mean, spread = params[norm.mean].double(), (params[norm.variance].double() + epsilon(norm)).sqrt()
    gain = (params[norm.weight].double() if norm.weight else 1.0) / spread
    shift = params[norm.bias].double() if norm.bias else 0.0
    return Moments(1, (moments.mean - mean) * gain + shift, moments.variance * gain.square())


def _restated(norm: Operator, params: Params, moments: Moments) -> Params:
    return {**params, norm.mean: moments.mean, norm.variance: moments.variance}


def _bias(operator: Operator, params: Params, matrix: Tensor) -> Tensor:
    shape = (len(matrix), matrix.shape[2])
    return params[operator.bias].double().reshape(shape) if operator.bias else matrix.new_zeros(shape)


def _output_moments(sums: Sums, matrix: Tensor, offset: Tensor) -> Moments:
    """Moments of ``matrixᵀ x + offset`` over the rows of sums."""
    mean = ((sums.x / sums.count)[:, None, :] @ matrix)[:, 0, :] + offset
    variance = (matrix * (sums.gram @ matrix)).sum(1).clamp_min(0)
    return Moments(1, mean.flatten(), variance.flatten())


def counting(target: Target, channels: Tensor | None) -> Target:
    """The target without spread in channels that do not count, so that their errors have no weight; None: all count."""
    return target if channels is None else Target(target.mean, torch.where(channels, target.std, 0.0))


def _target(targets: Sums) -> Target:
    """Mean and spread of the targets, as a mixture over all rows; residuals are the targets themselves."""
    mean = targets.r / targets.count
    return Target(mean.flatten(), (targets.rr / targets.count - mean.square()).clamp_min(0).sqrt().flatten())
