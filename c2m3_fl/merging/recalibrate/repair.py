"""REPAIR: give the merged network the channel moments that its endpoints have, without changing its architecture.

Averaging shrinks the spread of activations (variance collapse). Jordan et al. 2023 (arXiv 2211.08403) restore the
mean and standard deviation of every channel's pre-activation. Here both fold into weights and biases, in forward
order: an operator is measured with all earlier ones already repaired.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from c2m3_fl.core.spec import Params, floating
from c2m3_fl.merging.recalibrate.correction import Measure, correct
from c2m3_fl.merging.recalibrate.setting import Setting, prepare
from c2m3_fl.merging.recalibrate.targets import Front, Target
from c2m3_fl.merging.reports import OperatorReport, Recalibrated, RecalibrationReport
from c2m3_fl.network.calibration import Calibration, ExampleInputs
from c2m3_fl.network.calibration_set import CalibrationSet
from c2m3_fl.network.moments import Moments
from c2m3_fl.network.operators import Operator
from c2m3_fl.network.program import Program


@dataclass(frozen=True)
class Repair:
    """Set mean and standard deviation of every channel to the weighted mean of the aligned endpoints'.

    The correction goes into weight and bias of linear layers, convolutions and matrix products. LayerNorm, GroupNorm
    and similar norms fix only pooled moments, so their affine parameters are corrected in the same way. Running
    statistics of BatchNorm are re-estimated, exactly, over all calibration inputs. Without a bias, only the spread can
    be repaired, and the report says so.

    Attributes
    ----------
    final : bool
        Whether the operators that give the network's output are repaired too.
    closed_form : bool
        Do not run the merged network: assume that its outputs are the mean of the endpoints' outputs, so that a
        channel's variance is wᵀ C w with C the covariances between the endpoints' versions of it. Exact for linear
        operators that read the network's input, an approximation for all later ones; LayerNorm, GroupNorm and similar
        norms, which restore the spread by themselves, are not changed.
    """

    final: bool = True
    closed_form: bool = False

    def __call__(self, setting: Setting) -> Recalibrated:
        """Repair ``setting.merged``."""
        return _repaired(setting, self, "repair")


@dataclass(frozen=True)
class BatchNormStatistics:
    """Re-estimate the running statistics of BatchNorm, in forward order, and change nothing else."""

    def __call__(self, setting: Setting) -> Recalibrated:
        """Re-estimate in ``setting.merged``."""
        return _repaired(setting, self, "batchnorm")


def repair(
    model: nn.Module,
    merged: Params,
    endpoints: Sequence[Params],
    calibration: Calibration | CalibrationSet,
    *,
    weights: Sequence[float] | Tensor | None = None,
    example_inputs: ExampleInputs | None = None,
    inputs: Sequence[str] | None = None,
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
    example_inputs : Tensor, tuple or dict, optional
        A tuple or dict says how many inputs the network takes; otherwise one.
    inputs : sequence of str, optional
        The keys of dict batches that are inputs: see `load_batches`.
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
        model,
        merged,
        endpoints,
        calibration,
        weights=weights,
        example_inputs=example_inputs,
        inputs=inputs,
        device=device,
    )
    repaired = Repair(final=final)(setting)
    home = {name: value.to(merged[name].device) for name, value in repaired.state_dict.items()}
    return Recalibrated(home, repaired.report)


def repair_measured(
    recalibration: Repair | BatchNormStatistics,
    program: Program,
    params: dict[str, Tensor],
    measure: Measure,
    targets: Mapping[str, Target],
) -> tuple[OperatorReport, ...]:
    """Repair a network, or only its BatchNorm statistics, with moments from a given source.

    Parameters
    ----------
    recalibration : Repair or BatchNormStatistics
        What to do.
    program : Program
        The exported network.
    params : dict of str to Tensor
        Its state dict; corrected in place.
    measure : Measure
        Source of the moments.
    targets : mapping of str to Target
        Moments that outputs should have; BatchNorm needs none.
    """
    options = recalibration if isinstance(recalibration, Repair) else None

    def rescales(operator: Operator) -> bool:
        if options is None or operator.mean or operator.feeds_norm:
            return False
        return (options.final or not operator.final) and (operator.linear or not options.closed_form)

    return correct(program, params, measure, targets, rescales=rescales)


def _repaired(setting: Setting, recalibration: Repair | BatchNormStatistics, method: str) -> Recalibrated:
    start = time.perf_counter()
    with torch.no_grad():
        params = dict(setting.merged)
        targets = setting.targets if isinstance(recalibration, Repair) else {}
        if isinstance(recalibration, Repair) and recalibration.closed_form:
            measure: Measure = partial(_forecast, setting.forecasts)
        else:
            measure = Front(setting.programs, setting.batches, params).measured
        operators = repair_measured(recalibration, setting.programs[0], params, measure, targets)
    return Recalibrated(params, recalibration_report(method, setting, operators, start))


def _forecast(
    forecasts: Mapping[str, Moments], place: int, operator: Operator, params: Params, *, before: bool
) -> Moments:
    """The forecast moments of an operator; a `Measure` that does not depend on the present parameters."""
    return forecasts[operator.name]


def recalibration_report(
    method: str, setting: Setting, operators: tuple[OperatorReport, ...], start: float
) -> RecalibrationReport:
    """Report of a recalibration that began at `start`.

    Parameters
    ----------
    method : str
        Short name of what was done.
    setting : Setting
        What it was done to.
    operators : tuple of OperatorReport
        What was done to each operator, in forward order.
    start : float
        When it began, by `time.perf_counter`.
    """
    skipped = tuple(left_alone(setting).items())
    return RecalibrationReport(method, operators, skipped, setting.inputs, time.perf_counter() - start)


def left_alone(setting: Setting) -> dict[str, str]:
    """Floating-point tensors of the state dict that no recalibration changes, each with the reason."""
    program = setting.programs[0]
    touched = {
        name for each in program.operators for name in (each.weight, each.bias, each.mean, each.variance) if name
    }
    touched |= {alias for name in touched for alias in program.aliases.get(name, ())}
    reasons = dict(program.skipped)
    reasons |= {alias: reason for name, reason in program.skipped.items() for alias in program.aliases.get(name, ())}
    used = set(program.names.values())
    rest = {
        name: "corrected through its norm's weight and bias" if name in used else "not used in evaluation mode"
        for name in floating(setting.merged)
        if name not in touched
    }
    return {**rest, **{name: reason for name, reason in reasons.items() if name in rest}}
