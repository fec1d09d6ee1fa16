"""Targets of a recalibration: the aligned endpoints' channel moments; and measurement of the merged network."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from c2m3_fl.core.averaging import mean_from_first, normalise_weights
from c2m3_fl.core.spec import Params
from c2m3_fl.errors import CalibrationError
from c2m3_fl.merging.recalibrate.outliers import capped
from c2m3_fl.network.calibration import Batch
from c2m3_fl.network.moments import Moments
from c2m3_fl.network.operators import Operator
from c2m3_fl.network.program import Program, Walk

View = Callable[[Operator, Tensor], Tensor]  # an operator's output, or a norm's input, in the basis of the merge

_BUDGET = 4 << 30  # bytes of activations in memory; beyond it, batches are run again from the start at every operator


@dataclass(frozen=True)
class Target:
    """Moments that every channel of an operator's output should have.

    Attributes
    ----------
    mean, std : Tensor of float64, shape (channels,)
        Weighted means of the endpoints' means and of their standard deviations.
    """

    mean: Tensor
    std: Tensor


def as_it_is(_: Operator, value: Tensor) -> Tensor:
    """The view of a network whose units are in the order of the merge already."""
    return value


def output_moments(
    programs: Sequence[Program], batches: Sequence[Batch], params: Params, view: View = as_it_is
) -> dict[str, Moments]:
    """Moments of every operator's output, in one pass over the batches.

    Parameters
    ----------
    programs : sequence of Program
        The exported network, one entry per batch.
    batches : sequence of Batch
        Calibration data.
    params : mapping of str to Tensor
        State dict of the network.
    view : View
        View of the outputs in the basis of the merge.
    """
    found: dict[str, Moments] = {}
    for program, batch in zip(programs, batches, strict=True):
        walk = Walk(program, params, batch)
        for operator in program.operators:
            moments = Moments.of(view(operator, walk.output(operator)), operator.channel_axes(params))
            found[operator.name] = found[operator.name].combine(moments) if operator.name in found else moments
    return found


def forecasts(
    programs: Sequence[Program],
    batches: Sequence[Batch],
    endpoints: Sequence[Params],
    views: Sequence[View],
    weights: Tensor,
) -> dict[str, Moments]:
    """Channel moments of the averaged network if it computed the mean of its endpoints' outputs, in one pass.

    A channel's variance is then wᵀ C w, with C the covariances between the endpoints' versions of it. For a norm with
    running statistics the moments are those of its input, for all other operators those of the output.

    Parameters
    ----------
    programs : sequence of Program
        The exported network, one entry per batch.
    batches : sequence of Batch
        Calibration data.
    endpoints : sequence of mappings of str to Tensor
        The aligned endpoints.
    views : sequence of View
        View of each endpoint's outputs in the basis of the merge.
    weights : Tensor of float64, shape (endpoints,)
        Averaging weights; they sum to one.
    """
    share = weights.tolist()
    found: dict[str, Moments] = {}
    for program, batch in zip(programs, batches, strict=True):
        walks = [Walk(program, endpoint, batch) for endpoint in endpoints]
        for operator in program.operators:
            node = operator.input if operator.mean else operator.node
            for walk in walks:
                walk.advance(operator.index)
            mean = mean_from_first(
                [view(operator, walk.value(node)) for view, walk in zip(views, walks, strict=True)], share
            )
            moments = Moments.of(mean, operator.channel_axes(endpoints[0]))
            found[operator.name] = found[operator.name].combine(moments) if operator.name in found else moments
    return found


def mean_targets(endpoints: Sequence[Mapping[str, Moments]], weights: Tensor) -> dict[str, Target]:
    """Weighted mean of the endpoints' means and standard deviations (not variances), per operator."""
    share = weights.tolist()
    return {
        name: Target(
            mean_from_first([moments[name].mean for moments in endpoints], share),
            mean_from_first([moments[name].std for moments in endpoints], share),
        )
        for name in endpoints[0]
    }


def pool(parts: Sequence[Mapping[str, Moments]]) -> dict[str, Moments]:
    """Moments of all parts together, per operator: those of the pooled data.

    A part's count is limited to ten times the parts' median, so that no reported count outweighs all others.

    Raises
    ------
    CalibrationError
        When there are no parts.
    """
    if not parts:
        raise CalibrationError("no usable channel moments for a network that must be measured")
    total: dict[str, Moments] = {}
    for name in parts[0]:
        counts = capped([part[name].count for part in parts])
        for part, count in zip(parts, counts, strict=True):
            own = part[name]
            moments = own if count == own.count else Moments(int(count), own.mean, own.variance * int(count))
            total[name] = total[name].combine(moments) if name in total else moments
    return total


def pooled_targets(answers: Sequence[Sequence[Mapping[str, Moments]]], weights: Sequence[float]) -> dict[str, Target]:
    """Targets from moments that several clients measured of each endpoint.

    Parameters
    ----------
    answers : sequence of sequences of mappings of str to Moments
        Moments of every endpoint, one mapping per client; endpoints without any answer are left out.
    weights : sequence of float
        The endpoints' averaging weights.
    """
    known = [(pool(parts), weight) for parts, weight in zip(answers, weights, strict=True) if parts]
    share = normalise_weights([weight for _, weight in known], len(known))
    return mean_targets([moments for moments, _ in known], share)


class Front:
    """Runs of one network on all calibration batches, stopped before the same operator.

    Parameters
    ----------
    programs, batches : sequences of equal length
        The traced network for every batch.
    params : mapping of str to Tensor
        Read during the runs, so that corrections of earlier operators apply to later ones.
    """

    def __init__(self, programs: Sequence[Program], batches: Sequence[Batch], params: Params) -> None:
        self._programs = programs
        self._batches = batches
        self._params = params
        self._walks = [self._fresh(place) for place in range(len(batches))]

    def before(self, place: int) -> Iterator[tuple[Operator, Walk]]:
        """Every batch's walk, run up to operator number `place`, which has its inputs but has not run."""
        for index, program in enumerate(self._programs):
            operator = program.operators[place]
            walk = self._walks[index]
            walk.advance(operator.index)
            yield operator, walk
            if walk.resident * len(self._batches) > _BUDGET:
                self._walks[index] = self._fresh(index)

    def measured(self, place: int, operator: Operator, params: Params, *, before: bool) -> Moments:
        """Moments over all batches of the output of operator number `place`, or of its input; a `Measure`.

        Parameters
        ----------
        place : int
            Number of the operator, in forward order.
        operator : Operator
            One of the network's operators.
        params : mapping of str to Tensor
            The state dict that the runs read.
        before : bool
            Measure the operator's input instead of its output.
        """
        total: Moments | None = None
        for own, walk in self.before(place):
            moments = Moments.of(walk.value(own.input if before else own.node), own.channel_axes(params))
            total = moments if total is None else total.combine(moments)
        if total is None:
            raise CalibrationError(f"no calibration batch to measure operator {operator.name!r} on")
        return total

    def _fresh(self, index: int) -> Walk:
        return Walk(self._programs[index], self._params, self._batches[index])
