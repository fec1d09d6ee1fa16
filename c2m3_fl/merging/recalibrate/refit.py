"""Refit: fit every linear operator of the merged network to its aligned endpoints' mean output, in closed form.

REPAIR corrects two numbers per channel. Aligned endpoints allow more: the weighted mean of their outputs at every
position is a target for every weight. Each operator is fitted to it in forward order, by ridge regression towards its
current weights, on the inputs that it has in the merged network. The fit needs no labels and no learning rate.

The mean of the endpoints' outputs has a smaller spread than each of them, so every channel's moments are then set as
in REPAIR.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from c2m3_fl.core.spec import Params
from c2m3_fl.errors import CalibrationError
from c2m3_fl.merging.recalibrate.correction import correct
from c2m3_fl.merging.recalibrate.refit_targets import CHOOSE, FIT, FOLDS, MeanOutputs
from c2m3_fl.merging.recalibrate.repair import recalibration_report
from c2m3_fl.merging.recalibrate.ridge import Evidence, Fit, Rows, Sums, choose
from c2m3_fl.merging.recalibrate.setting import Setting
from c2m3_fl.merging.recalibrate.softmax_fit import Classified, Layer, choose_scores
from c2m3_fl.merging.recalibrate.targets import Front
from c2m3_fl.merging.reports import FitReport, OperatorReport, Recalibrated
from c2m3_fl.network.operators import Kind, Operator
from c2m3_fl.network.rows import from_matrix, input_rows, weight_matrix
from c2m3_fl.ranges import check_all_positive, check_flag, check_number, check_whole

_FITTED = (Kind.LINEAR, Kind.CONVOLUTION, Kind.PRODUCT)
_CHUNK = 4096  # rows whose patches are in memory at once
_TOO_FEW = f"refit holds every {FOLDS}th calibration input out, so it needs at least {FOLDS}"


@dataclass(frozen=True)
class Refit:
    """Fit every linear operator to the aligned endpoints' mean outputs, in forward order.

    Norms and transposed convolutions are repaired. Refit is harmful when the calibration data come from another
    distribution than the nodes' data, which the error on held-out calibration inputs does not show: see `Auto`.

    Attributes
    ----------
    positions : int
        Largest number of positions, over all calibration inputs, that an operator is fitted to.
    strengths : tuple of float
        Ridge strengths, relative to the mean variance of an operator's inputs, from which held-out inputs choose;
        keeping the weights is always a candidate.
    scores : bool, optional
        Whether the network's outputs are class scores. A last layer that gives them is then fitted to the endpoints'
        mean probabilities, by softmax regression (see `recalibrate.softmax_fit`): in a mean of scores, one node that
        never saw a class can outvote all others on it. By default True if the calibration data carry class labels;
        their values are not read.
    floor : float
        Lower bound of a class's share in the endpoints' mean probabilities, relative to equal shares.
    final_only : bool
        Fit only the operators that give the network's output, and repair all others.
    seed : int
        Seed of the draw of positions.

    Examples
    --------
    >>> from c2m3_fl.merging.recalibrate.setting import prepare
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3))
    >>> node = model.state_dict()
    >>> broken = {**node, "2.weight": torch.zeros(3, 8)}
    >>> inputs = torch.randn(100, 4)
    >>> done = Refit()(prepare(model, broken, [node], [inputs]))
    >>> torch.allclose(done.state_dict["2.weight"], node["2.weight"], atol=0.05)
    True
    """

    positions: int = 40_000
    strengths: tuple[float, ...] = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)
    scores: bool | None = None
    floor: float = 0.1
    final_only: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        check_all_positive("strengths", self.strengths)
        check_whole("positions", self.positions, FOLDS)
        check_number("floor", self.floor, 0, 1)
        check_whole("seed", self.seed, 0)
        if self.scores is not None:
            check_flag("scores", self.scores)
        check_flag("final_only", self.final_only)

    def __call__(self, setting: Setting) -> Recalibrated:
        """Refit ``setting.merged``."""
        start = time.perf_counter()
        with torch.no_grad():
            outputs = MeanOutputs(
                setting, self.fits, self.positions, self.seed, self.floor if self._scored(setting) else None
            )
            params = dict(setting.merged)
            front = Front(setting.programs, setting.batches, params)

            def fit(place: int, operator: Operator) -> OperatorReport | None:
                if not self.fits(operator):
                    return None
                solve = _fit_scores if outputs.scored(operator) else _fit
                return solve(setting, self, outputs, front, place, params)

            def rescales(operator: Operator) -> bool:
                return bool(operator.weight) and not operator.feeds_norm and not outputs.scored(operator)

            program = setting.programs[0]
            reports = correct(program, params, front.measured, setting.targets, rescales=rescales, fit=fit)
        return Recalibrated(params, recalibration_report("refit", setting, reports, start))

    def fits(self, operator: Operator) -> bool:
        """Whether this operator is fitted, not only repaired."""
        return operator.kind in _FITTED and (operator.final or not self.final_only)

    def _scored(self, setting: Setting) -> bool:
        labelled = all(batch.labels is not None for batch in setting.batches)
        return labelled if self.scores is None else self.scores


def _fit(
    setting: Setting, options: Refit, outputs: MeanOutputs, front: Front, place: int, params: dict[str, Tensor]
) -> OperatorReport:
    """Fit one operator and store its new weight in `params`; its channels' moments are set afterwards."""
    program = setting.programs[0]
    operator = program.operators[place]
    weight = params[operator.weight]
    matrix = weight_matrix(operator, weight.double())
    spread = setting.targets[operator.name].std.reshape(len(matrix), -1)
    solve = partial(_solve, outputs, front, place, params, operator, options.strengths, spread)
    fit = solve(Rows) if outputs.rows(place) < matrix.shape[1] else solve(Sums)
    program.assign(params, operator.weight, from_matrix(operator, matrix + fit.change, weight.shape))
    quality = FitReport(fit.strength, fit.error_before, fit.error)
    return OperatorReport(operator.name, operator.module, "refit", 0.0, 1.0, fit=quality)


def _solve(
    outputs: MeanOutputs,
    front: Front,
    place: int,
    params: Params,
    operator: Operator,
    strengths: Sequence[float],
    spread: Tensor,
    kind: type[Evidence],
) -> Fit:
    """The best change of one operator's weight."""
    train, held_out = _gathered(kind, outputs, front, place, params)
    if not operator.bias and not operator.feeds_norm:
        train, held_out = train.through_origin(), held_out.through_origin()
    return choose(train, held_out, strengths, spread)


def _fit_scores(
    setting: Setting, options: Refit, outputs: MeanOutputs, front: Front, place: int, params: dict[str, Tensor]
) -> OperatorReport:
    """Fit the layer that gives scores of classes to the endpoints' mean probabilities."""
    program = setting.programs[0]
    operator = program.operators[place]
    weight = params[operator.weight]
    matrix = weight_matrix(operator, weight.double())
    bias = params[operator.bias].double() if operator.bias else matrix.new_zeros(matrix.shape[2])
    train, held_out = _shown(outputs, front, place, params)
    fit = choose_scores(train, held_out, Layer(matrix[0], bias), options.strengths, bias=bool(operator.bias))
    program.assign(params, operator.weight, from_matrix(operator, fit.layer.weight[None], weight.shape))
    if operator.bias:
        program.assign(params, operator.bias, fit.layer.bias)
    quality = FitReport(fit.strength, fit.error_before, fit.error)
    return OperatorReport(operator.name, operator.module, "refit as class scores", 0.0, 1.0, fit=quality)


def _shown(outputs: MeanOutputs, front: Front, place: int, params: Params) -> tuple[Classified, Classified]:
    """Inputs of the last layer and the probabilities to fit, of inputs to fit and of inputs held out."""
    found: list[Classified | None] = [None, None]
    for index, (operator, walk) in enumerate(front.before(place)):
        drawn = outputs.at(place, index)
        source = walk.value(operator.input)
        rows = input_rows(operator, source, params[operator.weight], drawn.shape, drawn.positions)[0].double()
        for role in (FIT, CHOOSE):
            chosen = drawn.role == role
            part = Classified(rows[chosen], drawn.rows[chosen])
            before = found[role]
            found[role] = part if before is None else before.combine(part)
    train, held_out = found
    if train is None or held_out is None or not len(train.x) or not len(held_out.x):
        raise CalibrationError(_TOO_FEW)
    return train, held_out


def _gathered(
    kind: type[Evidence], outputs: MeanOutputs, front: Front, place: int, params: Params
) -> tuple[Evidence, Evidence]:
    """Evidence from the inputs to fit and from those held out, with the residuals of the current weights."""
    found: list[Evidence | None] = [None, None]
    for index, (operator, walk) in enumerate(front.before(place)):
        weight = params[operator.weight]
        matrix = weight_matrix(operator, weight)
        bias = params[operator.bias] if operator.bias else None
        source = walk.value(operator.input)
        drawn = outputs.at(place, index)
        for role in (FIT, CHOOSE):
            for chosen in torch.split(torch.nonzero(drawn.role == role)[:, 0], _CHUNK):
                if not len(chosen):
                    continue
                rows = input_rows(operator, source, weight, drawn.shape, drawn.positions[chosen])
                goal = drawn.rows[chosen] if bias is None else drawn.rows[chosen] - bias
                residuals = goal.reshape(len(chosen), operator.groups, -1).movedim(1, 0) - rows @ matrix
                part = kind.of(rows, residuals)
                before = found[role]
                found[role] = part if before is None else before.combine(part)
    train, held_out = found
    if train is None or held_out is None:
        raise CalibrationError(_TOO_FEW)
    return train, held_out
