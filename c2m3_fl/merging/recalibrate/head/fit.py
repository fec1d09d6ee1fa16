"""A last layer of class scores, fitted to labels in closed form.

The layer is the ridge regression of one-hot targets Y on the inputs A of the last layer, from sums that add up over
clients: AᵀA, AᵀY and the number of examples per class. It is exactly the ridge classifier on the pooled features,
however the labels are spread over the clients (He et al., "AFL: a single-round analytic approach for federated
learning with pre-trained models", CVPR 2025). Its scores estimate probabilities, so softmax makes them too flat:
a temperature is folded into weight and bias.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from c2m3_fl.core.spec import Params
from c2m3_fl.errors import CalibrationError, ConfigError
from c2m3_fl.merging.recalibrate.head.label_sums import LabelSums, one_hot_sums
from c2m3_fl.merging.recalibrate.head.last_layer import NO_HEAD, labelled_inputs, last_layer, with_head
from c2m3_fl.merging.recalibrate.head.reliability import Reliability, quality
from c2m3_fl.merging.recalibrate.repair import recalibration_report
from c2m3_fl.merging.recalibrate.ridge import Fit, Sums, choose
from c2m3_fl.merging.recalibrate.setting import Setting
from c2m3_fl.merging.recalibrate.softmax_fit import Layer
from c2m3_fl.merging.reports import FitReport, HeadReport, OperatorReport, Recalibrated
from c2m3_fl.network.calibration import Batch
from c2m3_fl.network.operators import Operator
from c2m3_fl.network.program import Program
from c2m3_fl.ranges import check_all_positive, check_whole

STRENGTHS = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)
TEMPERATURES = tuple(float(10 ** (step / 12)) for step in range(-24, 13))  # .01 to 10, each 1.21 times the one before
METHOD = "head from labels"


def measure_labels(programs: Sequence[Program], params: Params, batches: Sequence[Batch], every: int) -> LabelSums:
    """Sums over labelled batches of the inputs that the last layer has in the network with these parameters.

    Parameters
    ----------
    programs, params, batches, every
        As for `last_layer.labelled_inputs`.

    Raises
    ------
    CalibrationError
        When labels are missing or out of range, the outputs are not class scores, or all examples are on one side.
    """
    found: list[Sums | None] = [None, None]
    for rows, scores, labels, mask in labelled_inputs(programs, params, batches, every):
        targets = torch.nn.functional.one_hot(labels, scores.shape[1]).double()
        for side in (0, 1):
            chosen = mask == bool(side)
            x, y = rows[chosen].double(), targets[chosen]
            part, before = one_hot_sums(x.T @ x, x.T @ y, y.sum(0)), found[side]
            found[side] = part if before is None else before.combine(part)
    train, held = found
    if train is None or held is None or not train.count or not held.count:
        raise CalibrationError(f"one example in {every} is held out, so a head needs at least {every}")
    return LabelSums(train, held)


def reliability(
    programs: Sequence[Program],
    params: Params,
    layer: Layer,
    batches: Sequence[Batch],
    every: int,
    temperatures: Sequence[float],
) -> tuple[Reliability, Reliability]:
    """Scores on the held-out examples: of the network as it is, and with another last layer.

    Parameters
    ----------
    programs, params, batches, every
        As for `measure_labels`.
    layer : Layer
        The last layer.
    temperatures : sequence of float
        What scores are divided by.
    """
    found: list[tuple[Reliability, Reliability]] = []
    for rows, scores, labels, mask in labelled_inputs(programs, params, batches, every):
        chosen = mask.nonzero()[:, 0]
        if len(chosen):
            own = layer(rows[chosen].double())
            pair = [Reliability.of(each, labels[chosen], temperatures) for each in (scores[chosen], own)]
            found.append((pair[0], pair[1]))
    if not found:
        raise CalibrationError(f"one example in {every} is held out, so a head needs at least {every}")
    before, after = found[0]
    for one, other in found[1:]:
        before, after = before.combine(one), after.combine(other)
    return before, after


@dataclass(frozen=True)
class HeadFit:
    """A fitted last layer.

    Attributes
    ----------
    layer : Layer
        Fitted to all examples.
    unseen : Layer
        Fitted without the held-out examples, with the same strength, to be measured on them.
    fit : FitReport
        Strength, and held-out squared error of the class shares alone and of the fit.
    """

    layer: Layer
    unseen: Layer
    fit: FitReport


def fit_head(sums: LabelSums, strengths: Sequence[float], *, bias: bool) -> HeadFit:
    """Ridge classifier with the strength that predicts held-out one-hot targets best, in mean squared error.

    Parameters
    ----------
    sums : LabelSums
        Over all clients.
    strengths : sequence of float
        Candidates, relative to the mean variance of the inputs.
    bias : bool
        Whether there is one, unpenalised; otherwise the fit goes through the origin.

    Raises
    ------
    CalibrationError
        When no strength predicts held-out labels better than the class shares do.
    """
    train, held = (each if bias else each.through_origin() for each in (sums.train, sums.held_out))
    found: Fit = choose(train, held, strengths, torch.ones_like(train.r))
    if found.strength == float("inf"):
        raise CalibrationError(
            f"{NO_HEAD} the last layer's inputs predict held-out labels no better than the class shares do "
            f"(squared error {found.error:.3g})"
        )
    unseen, everything = train.solve(found.strength), train.combine(held)
    return HeadFit(
        Layer(found.change[0], everything.offset(found.change)[0]),
        Layer(unseen[0], train.offset(unseen)[0]),
        FitReport(found.strength, found.error_before, found.error),
    )


@dataclass(frozen=True)
class FitHead:
    """Fit the last layer to the labels of calibration data, on the server.

    Attributes
    ----------
    strengths : tuple of float
        Ridge strengths, relative to the mean variance of the last layer's inputs, from which held-out examples choose.
    temperatures : tuple of float
        Temperatures, 1 among them, from which held-out examples choose.
    holdout : int
        One example in so many is held out.

    Raises
    ------
    ConfigError
        For values out of range.

    Examples
    --------
    >>> from c2m3_fl.merging.recalibrate.setting import prepare
    >>> model = torch.nn.Linear(4, 2)
    >>> inputs = torch.randn(200, 4, generator=torch.Generator().manual_seed(0))
    >>> data = [(inputs, (inputs[:, 0] > 0).long())]
    >>> done = FitHead()(prepare(model, model.state_dict(), [model.state_dict()], data))
    >>> done.report.head.after.accuracy > 0.9
    True
    """

    strengths: tuple[float, ...] = STRENGTHS
    temperatures: tuple[float, ...] = TEMPERATURES
    holdout: int = 5

    def __post_init__(self) -> None:
        check_all_positive("strengths", self.strengths)
        check_all_positive("temperatures", self.temperatures)
        if 1.0 not in self.temperatures:
            raise ConfigError(f"temperatures is {self.temperatures!r}, expected 1.0 among them")
        check_whole("holdout", self.holdout, 2)

    def __call__(self, setting: Setting) -> Recalibrated:
        """Recalibrate ``setting.merged``."""
        start = time.perf_counter()
        programs, params, batches = setting.programs, setting.merged, setting.batches
        operator = last_layer(programs[0])
        sums = measure_labels(programs, params, batches, self.holdout)
        fitted = fit_head(sums, self.strengths, bias=bool(operator.bias))
        before, after = reliability(programs, params, fitted.unseen, batches, self.holdout, self.temperatures)
        head = HeadReport(quality(before, self.temperatures), quality(after, self.temperatures), 0, sums.count)
        result = with_head(programs[0], params, fitted.layer, head.after.temperature)
        report = recalibration_report(METHOD, setting, (operator_report(operator, fitted),), start)
        return Recalibrated(result, replace(report, head=head))


def operator_report(operator: Operator, fitted: HeadFit) -> OperatorReport:
    """Report of the last layer."""
    return OperatorReport(operator.name, operator.module, "fitted to labels", 0.0, 1.0, fit=fitted.fit)
