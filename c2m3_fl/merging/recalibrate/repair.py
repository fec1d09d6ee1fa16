"""REPAIR: give the merged network the channel moments that its endpoints have, without changing its architecture.

Averaging shrinks the spread of activations (variance collapse). Jordan et al. 2023 (arXiv 2211.08403) restore the
mean and standard deviation of every channel's pre-activation. Here both fold into weights and biases, in forward
order: an operator is measured with all earlier ones already repaired.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from c2m3_fl.core.spec import Params, floating
from c2m3_fl.merging.recalibrate.setting import Setting, prepare
from c2m3_fl.merging.recalibrate.targets import Front, Target
from c2m3_fl.merging.reports import OperatorReport, Recalibrated, RecalibrationReport
from c2m3_fl.network.calibration import Calibration, ExampleInputs
from c2m3_fl.network.moments import Moments
from c2m3_fl.network.operators import Operator
from c2m3_fl.network.program import Program

_DEAD = 1e-7  # spread below which, relative to mean and target, a channel varies by rounding alone


@dataclass(frozen=True)
class Repair:
    """Set mean and standard deviation of every channel to the weighted mean of the aligned endpoints'.

    Linear layers, convolutions and matrix products take the correction in weight and bias. LayerNorm, GroupNorm
    and their kin fix pooled moments only, so their affine parameters are corrected likewise. Running statistics of
    BatchNorm are re-estimated, exactly, over all calibration inputs. Where there is no bias only the spread can be
    repaired, and the report says so.

    Attributes
    ----------
    final : bool
        Whether the operators that give the network's output are repaired too.
    closed_form : bool
        Do not run the merged network at all: take the mean of the endpoints' outputs for what it would do, so that a
        channel's variance is wᵀ C w with C the covariances between the endpoints' versions of it. Exact for
        linear operators that read the network's input, an approximation behind them; LayerNorm, GroupNorm and their
        kin, which undo a loss of spread by themselves, are left alone.
    """

    final: bool = True
    closed_form: bool = False

    def __call__(self, setting: Setting) -> Recalibrated:
        """Repair ``setting.merged``."""
        start = time.perf_counter()
        with torch.no_grad():
            walk = _forecast if self.closed_form else _walk
            params, operators = walk(setting, scales=True, final=self.final)
        return Recalibrated(params, recalibration_report("repair", setting, operators, start))


@dataclass(frozen=True)
class BatchNormStatistics:
    """Re-estimate the running statistics of BatchNorm, in forward order, and leave everything else alone."""

    def __call__(self, setting: Setting) -> Recalibrated:
        """Re-estimate in ``setting.merged``."""
        start = time.perf_counter()
        with torch.no_grad():
            params, operators = _walk(setting, scales=False, final=False)
        return Recalibrated(params, recalibration_report("batchnorm", setting, operators, start))


def repair(
    model: nn.Module,
    merged: Params,
    endpoints: Sequence[Params],
    calibration: Calibration,
    *,
    weights: Sequence[float] | Tensor | None = None,
    example_inputs: ExampleInputs | None = None,
    final: bool = True,
    device: torch.device | str | None = None,
) -> Recalibrated:
    """Repair an averaged network: see `Repair`.

    Parameters
    ----------
    model : nn.Module
        The architecture; not mutated.
    merged : mapping of str to Tensor
        The averaged state dict; not mutated.
    endpoints : sequence of mappings of str to Tensor
        The networks that were averaged, their units in the order of `merged`.
    calibration : iterable of batches
        Inputs; labels are ignored. Every endpoint sees every batch once.
    weights : sequence of float, optional
        The endpoints' averaging weights; equal by default.
    example_inputs : Tensor or tuple of Tensor, optional
        A tuple says how many inputs the network takes; otherwise one.
    final : bool
        Whether the operators that give the network's output are repaired too.
    device : torch.device or str, optional
        Where to compute; by default where the merged parameters are.

    Raises
    ------
    CalibrationError, TraceError, WeightsError, ParamsError
        When the data, the network, the weights or the state dicts do not fit.

    Examples
    --------
    >>> import torch
    >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    >>> node = model.state_dict()
    >>> shrunk = {name: value / 2 for name, value in node.items()}
    >>> inputs = torch.randn(50, 4)
    >>> repaired = repair(model, shrunk, [node], [inputs]).state_dict
    >>> torch.allclose(torch.func.functional_call(model, repaired, inputs), model(inputs), atol=1e-5)
    True
    """
    setting = prepare(
        model, merged, endpoints, calibration, weights=weights, example_inputs=example_inputs, device=device
    )
    repaired = Repair(final=final)(setting)
    home = {name: value.to(merged[name].device) for name, value in repaired.state_dict.items()}
    return Recalibrated(home, repaired.report)


def _walk(setting: Setting, *, scales: bool, final: bool) -> tuple[dict[str, Tensor], tuple[OperatorReport, ...]]:
    """Correct one operator after the other, each measured with all earlier ones corrected."""
    program = setting.programs[0]
    params = dict(setting.merged)
    front = Front(setting.programs, setting.batches, params)
    reports = []
    for place, operator in enumerate(program.operators):
        if operator.mean:
            reports.append(restate(program, operator, params, measured(front, place, params, before=True)))
        elif scales and (final or not operator.final) and not operator.feeds_norm:
            moments = measured(front, place, params)
            reports.append(rescale(program, operator, params, moments, setting.targets[operator.name]))
    return params, tuple(reports)


def _forecast(setting: Setting, *, scales: bool, final: bool) -> tuple[dict[str, Tensor], tuple[OperatorReport, ...]]:
    """Correct all operators by what their endpoints' mean says of them."""
    program = setting.programs[0]
    params = dict(setting.merged)
    reports = []
    for operator in program.operators:
        forecast = setting.forecasts[operator.name]
        if operator.mean:
            reports.append(restate(program, operator, params, forecast))
        elif scales and operator.linear and (final or not operator.final) and not operator.feeds_norm:
            reports.append(rescale(program, operator, params, forecast, setting.targets[operator.name]))
    return params, tuple(reports)


def measured(front: Front, place: int, params: Params, *, before: bool = False) -> Moments:
    """Moments over all batches of an operator's output, or of its input."""
    total: Moments | None = None
    for operator, walk in front.before(place):
        node = operator.input if before else operator.node
        moments = Moments.of(walk.value(node), operator.channel_axes(params))
        total = moments if total is None else total.combine(moments)
    assert total is not None  # there is at least one batch
    return total


def rescale(
    program: Program, operator: Operator, params: dict[str, Tensor], moments: Moments, target: Target
) -> OperatorReport:
    """Fold ``y -> scale * (y - mean) + target mean`` into weight and bias."""
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
    """Re-estimate the running statistics of a BatchNorm from its inputs."""
    spread = params[operator.variance].double().clamp_min(0).sqrt()
    report = compared(operator, "running statistics", moments, Target(params[operator.mean].double(), spread))
    program.assign(params, operator.mean, moments.mean)
    program.assign(params, operator.variance, moments.unbiased_variance)
    return report


def compared(operator: Operator, action: str, moments: Moments, target: Target, dead: int = 0) -> OperatorReport:
    """How far the moments were from their target."""
    alive = target.std > _DEAD * (target.mean.abs() + moments.std)
    if not bool(alive.any()):
        return OperatorReport(operator.name, operator.module, action, 0.0, 1.0, dead)
    offset = ((moments.mean - target.mean) / target.std)[alive]
    spread = (moments.std / target.std)[alive]
    return OperatorReport(
        operator.name, operator.module, action, float(offset.square().mean().sqrt()), float(spread.median()), dead
    )


def recalibration_report(
    method: str, setting: Setting, operators: tuple[OperatorReport, ...], start: float
) -> RecalibrationReport:
    """Report of a recalibration that began at `start`."""
    skipped = tuple(left_alone(setting).items())
    return RecalibrationReport(method, operators, skipped, setting.inputs, time.perf_counter() - start)


def left_alone(setting: Setting) -> dict[str, str]:
    """Floating tensors of the state dict that no recalibration touches, each with the reason."""
    program = setting.programs[0]
    touched = {
        name for each in program.operators for name in (each.weight, each.bias, each.mean, each.variance) if name
    }
    touched |= {alias for name in touched for alias in program.aliases.get(name, ())}
    reasons = dict(program.skipped)
    reasons |= {alias: reason for name, reason in program.skipped.items() for alias in program.aliases.get(name, ())}
    used = set(program.names.values())
    rest = {
        name: "its norm's weight and bias take the correction" if name in used else "not used in evaluation mode"
        for name in floating(setting.merged)
        if name not in touched
    }
    return {**rest, **{name: reason for name, reason in reasons.items() if name in rest}}
