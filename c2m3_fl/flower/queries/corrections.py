"""What a server makes of clients' sums: which of them fit each other, and the correction of an operator."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from logging import WARNING

import torch
from flwr.supercore import log
from torch import Tensor

from c2m3_fl.core.spec import Params
from c2m3_fl.flower.queries.refit_options import ClientRefit, RegMean
from c2m3_fl.merging.recalibrate.correction import rescale, restate
from c2m3_fl.merging.recalibrate.from_clients.fit import counting, fit_operator, restate_behind
from c2m3_fl.merging.recalibrate.from_clients.folded_norm import effective
from c2m3_fl.merging.recalibrate.from_clients.owners import of_inputs, owner_sets, take_over
from c2m3_fl.merging.recalibrate.from_clients.plan import Question, Role, norm_behind
from c2m3_fl.merging.recalibrate.from_clients.pool import outlying, pool_fits, pool_moments, shares_of
from c2m3_fl.merging.recalibrate.from_clients.regmean import assign_regression_mean, shrunk
from c2m3_fl.merging.recalibrate.from_clients.sketch import SketchedFit
from c2m3_fl.merging.recalibrate.from_clients.sums import Answer, FitAnswer, GramAnswer, MomentsAnswer
from c2m3_fl.merging.recalibrate.targets import Target
from c2m3_fl.merging.reports import OperatorReport
from c2m3_fl.network.operators import Operator
from c2m3_fl.network.program import Program


@dataclass(frozen=True, eq=False)
class Owners:
    """Who has what, where clients' networks differ in width: these are padded with dead units.

    Attributes
    ----------
    channels : callable
        Which clients have the channels of an operator's output, bool of shape (clients, channels).
    far : tuple of int
        The clients whose weights are far from those of others of the same width: they are not asked.
    inputs : callable, optional
        The inputs that an operator may be fitted to, bool of shape (groups, inputs), where the merged network has dead
        units: these may be constants other than zero. None: all.
    """

    channels: Callable[[Operator], Tensor]
    far: tuple[int, ...] = ()
    inputs: Callable[[Operator], Tensor] | None = None


@dataclass(frozen=True, eq=False)
class Corrections:
    """Corrects one operator after the other.

    Attributes
    ----------
    options : ClientRefit or RegMean
        What was asked.
    program : Program
        The traced network.
    own : mapping of int to Params
        By node, its own network.
    weights : mapping of int to float
        What each node counts.
    equally : bool
        Whether the strategy ignores the weights.
    owned : callable, optional
        By node, the channels of an operator's output that its own network has. A channel is corrected by the sums of
        those that have it, one set of nodes after the other; one that none has keeps its weights. Running statistics of
        such a channel, and of a BatchNorm that is not folded into a fit, are of all: no own network is measured for
        them. None: all have all.
    inputs : callable, optional
        See `Owners`.
    title : str
        What is refit, for the log; "" for the merged network.
    """

    options: ClientRefit | RegMean
    program: Program
    own: Mapping[int, Params]
    weights: Mapping[int, float]
    equally: bool
    owned: Callable[[Operator], Mapping[int, Tensor]] | None = None
    inputs: Callable[[Operator], Tensor] | None = None
    title: str = ""

    def trusted(self, step: Question, answers: Mapping[int, Answer], params: Params) -> dict[int, Answer]:
        """The answers about one operator that fit each other."""
        operator, owned = self._operator(step), self._owned(step)
        if owned is not None:
            answers = {node: answer for node, answer in answers.items() if bool(owned[node].any())}
        odd = outlying(answers, self._layer(step, params), owned)
        for node, reason in odd.items():
            where = f"{operator.module or operator.name}{f' for {self.title}' if self.title else ''}"
            log(WARNING, "\t> node %d's sums of %s are left out: %s", node, where, reason)
        return {node: answer for node, answer in answers.items() if node not in odd}

    def correct(self, step: Question, answers: Mapping[int, Answer], params: dict[str, Tensor]) -> list[OperatorReport]:
        """Put an operator's correction in place, one after the other for channels of different owners."""
        operator, owned, nodes = self._operator(step), self._owned(step), list(answers)
        masks = None if owned is None else torch.stack([owned[node] for node in nodes])
        if masks is None or bool(masks.all()):
            return self._corrected(step, answers, params)
        before, reports = dict(params), []
        for places, channels in owner_sets(masks):
            found, part = dict(before), {nodes[place]: answers[nodes[place]] for place in places}
            reports += self._corrected(step, part, found, channels)
            take_over(self.program, operator, params, found, channels)
        if step.role is Role.FIT and not bool(masks.any(0).all()):
            restate_behind(self.program, operator, params, self._pooled(answers), ~masks.any(0))
        return reports

    def _owned(self, step: Question) -> Mapping[int, Tensor] | None:
        return None if self.owned is None or step.role is Role.STATISTICS else self.owned(self._operator(step))

    def _operator(self, step: Question) -> Operator:
        return self.program.operators[step.place]

    def _pooled(self, answers: Mapping[int, Answer]) -> FitAnswer:
        fits = [answer for answer in answers.values() if isinstance(answer, FitAnswer | SketchedFit)]
        return pool_fits(fits, self._shares(answers))

    def _shares(self, answers: Mapping[int, Answer]) -> list[float]:
        return shares_of([self.weights[node] for node in answers], equally=self.equally)

    def _layer(self, step: Question, params: Params) -> tuple[Tensor, Tensor] | None:
        """The layer to which an answer's residuals refer."""
        operator = self._operator(step)
        return effective(operator, norm_behind(self.program, operator), params) if step.role is Role.FIT else None

    def _corrected(
        self, step: Question, answers: Mapping[int, Answer], params: dict[str, Tensor], channels: Tensor | None = None
    ) -> list[OperatorReport]:
        """Correct an operator by the answers of all; where some channels alone count, the others are of no use."""
        operator = self._operator(step)
        shares = self._shares(answers)
        if isinstance(self.options, RegMean):
            grams = [_gram(answer, self.options.shrink) for answer in answers.values()]
            own = [self.own[node] for node in answers]
            return [assign_regression_mean(self.program, operator, params, own, grams, shares)]
        if step.role is Role.FIT:
            pooled, strengths = self._pooled(answers), self.options.strengths
            if self.inputs is not None:
                live = self.inputs(operator)
                pooled, rest = of_inputs(pooled, live), live.shape[1] / max(1, int(live.sum(1).max()))
                strengths = tuple(rest * strength for strength in strengths)  # relative to inputs that count alone
            found = fit_operator(self.program, operator, params, pooled, strengths, channels)
            return [_in_terms_of(report, dict(zip(strengths, self.options.strengths, strict=True))) for report in found]
        moments = [answer for answer in answers.values() if isinstance(answer, MomentsAnswer)]
        merged = pool_moments([each.merged for each in moments], shares)
        if step.role is Role.STATISTICS:
            return [restate(self.program, operator, params, merged)]
        own_moments = pool_moments([each.own for each in moments if each.own is not None], shares)
        target = counting(Target(own_moments.mean, own_moments.std), channels)
        return [rescale(self.program, operator, params, merged, target)]


def _in_terms_of(report: OperatorReport, strengths: Mapping[float, float]) -> OperatorReport:
    """A report with the strength that was asked for in place of the one that gives it."""
    fit = report.fit
    if fit is None:
        return report
    return replace(report, fit=replace(fit, strength=strengths.get(fit.strength, fit.strength)))


def _gram(answer: Answer, shrink: float) -> Tensor:
    assert isinstance(answer, GramAnswer)  # as it was read for this role
    return shrunk(answer.sums.xx / answer.sums.count, shrink)
