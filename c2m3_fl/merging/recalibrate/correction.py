"""REPAIR's one loop: in forward order, measure an operator's channels and fold the correction into its parameters.

The caller chooses the source of the moments: calibration data on the server, a forecast from the endpoints alone, or
sums that clients send. Each operator is measured with all earlier ones corrected.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

import torch
from torch import Tensor

from c2m3_fl.core.spec import Params
from c2m3_fl.merging.recalibrate.targets import Target
from c2m3_fl.merging.reports import OperatorReport
from c2m3_fl.network.moments import Moments
from c2m3_fl.network.operators import Operator
from c2m3_fl.network.program import Program

_DEAD = 1e-7  # spread below which, relative to mean and target, a channel varies by rounding alone


class Measure(Protocol):
    """Gives the channel moments of one operator in the network with the present parameters."""

    def __call__(self, place: int, operator: Operator, params: Params, *, before: bool) -> Moments:
        """Moments of the output of operator number `place`, or with `before` of its input."""
        ...


def correct(
    program: Program,
    params: dict[str, Tensor],
    measure: Measure,
    targets: Mapping[str, Target],
    *,
    rescales: Callable[[Operator], bool],
    fit: Callable[[int, Operator], OperatorReport | None] | None = None,
) -> tuple[OperatorReport, ...]:
    """Correct a network's operators one after the other.

    Running statistics of BatchNorm become the moments of their inputs. Then, if `fit` is given, the operator is fitted;
    and if `rescales` returns True, the channels of its output get the mean and spread of their target.

    Parameters
    ----------
    program : Program
        The exported network.
    params : dict of str to Tensor
        Its state dict; corrected in place, so that a measurement sees all earlier corrections.
    measure : Measure
        Source of the moments.
    targets : mapping of str to Target
        Moments that the channels of every rescaled operator should have, by the operator's name.
    rescales : callable
        Whether an operator's output is rescaled.
    fit : callable, optional
        Changes an operator's weight in `params` and returns a report, or None if it does not change the operator.

    Returns
    -------
    tuple of OperatorReport
        In forward order.
    """
    reports = []
    for place, operator in enumerate(program.operators):
        if operator.mean:
            inputs = measure(place, operator, params, before=True)
            reports.append(restate(program, operator, params, inputs))
        fitted = None if fit is None else fit(place, operator)
        if fitted is not None:
            reports.append(fitted)
        if rescales(operator):
            outputs = measure(place, operator, params, before=False)
            reports.append(rescale(program, operator, params, outputs, targets[operator.name]))
    return tuple(reports)


def rescale(
    program: Program, operator: Operator, params: dict[str, Tensor], moments: Moments, target: Target
) -> OperatorReport:
    """Fold ``y -> scale * (y - mean) + target mean`` into weight and bias.

    Parameters
    ----------
    program : Program
        The exported network.
    operator : Operator
        One of its operators.
    params : dict of str to Tensor
        The network's state dict; changed in place.
    moments : Moments
        Of the operator's output.
    target : Target
        Moments that the output should have.
    """
    dead = moments.std <= _DEAD * (moments.mean.abs() + target.std)
    scale = torch.where(dead, 1.0, target.std / torch.where(dead, 1.0, moments.std))
    program.assign(params, operator.weight, operator.rescaled(params[operator.weight].double(), scale))
    if operator.bias:
        bias = params[operator.bias].double()
        shift = target.mean - scale * moments.mean
        program.assign(params, operator.bias, bias * scale.reshape(bias.shape) + shift.reshape(bias.shape))
    action = "mean and spread" if operator.bias else "spread only: no bias"
    return compared(operator, action, moments, target, int(dead.sum()))


def restate(program: Program, operator: Operator, params: dict[str, Tensor], moments: Moments) -> OperatorReport:
    """Set the running statistics of a BatchNorm, in place, to the moments of its inputs.

    Parameters
    ----------
    program : Program
        The exported network.
    operator : Operator
        The BatchNorm.
    params : dict of str to Tensor
        The network's state dict; changed in place.
    moments : Moments
        Of the BatchNorm's inputs.
    """
    spread = params[operator.variance].double().clamp_min(0).sqrt()
    report = compared(operator, "running statistics", moments, Target(params[operator.mean].double(), spread))
    program.assign(params, operator.mean, moments.mean)
    program.assign(params, operator.variance, moments.unbiased_variance)
    return report


def compared(operator: Operator, action: str, moments: Moments, target: Target, dead: int = 0) -> OperatorReport:
    """How far an operator's moments were from their target.

    Parameters
    ----------
    operator : Operator
        The operator.
    action : str
        What was done to it.
    moments : Moments
        Measured before the correction.
    target : Target
        What they should have been.
    dead : int
        Channels that did not vary.
    """
    alive = target.std > _DEAD * (target.mean.abs() + moments.std)
    if not bool(alive.any()):
        return OperatorReport(operator.name, operator.module, action, 0.0, 1.0, dead)
    offset = ((moments.mean - target.mean) / target.std)[alive]
    spread = (moments.std / target.std)[alive]
    return OperatorReport(
        operator.name, operator.module, action, float(offset.square().mean().sqrt()), float(spread.median()), dead
    )
