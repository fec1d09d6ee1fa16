"""What one client measures for a refit: sums over its own data, never a row of them.

The merged network gives the inputs x of an operator, the client's own aligned network the output to aim at. The
residuals r = own output - output of the merged network's current weights, and so the sums say how those weights
should change. A convolution and the BatchNorm behind it count as one linear operator.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, fx

from c2m3_fl.core.spec import Params
from c2m3_fl.core.state_dicts import digest
from c2m3_fl.errors import CalibrationError
from c2m3_fl.merging.recalibrate.from_clients.folded_norm import effective
from c2m3_fl.merging.recalibrate.from_clients.plan import Role, norm_behind, skip_beside
from c2m3_fl.merging.recalibrate.from_clients.sketch import Noise, Sketch, SketchAnswer, SketchedFit, held_out_size
from c2m3_fl.merging.recalibrate.held_out import digest_examples, held_out
from c2m3_fl.merging.recalibrate.ridge import Sums
from c2m3_fl.network.calibration import Batch
from c2m3_fl.network.moments import Moments
from c2m3_fl.network.operators import Operator
from c2m3_fl.network.program import Program, Walk
from c2m3_fl.network.rows import input_of, input_rows, output_rows, sample_positions

_CHUNK = 4096  # rows that are in memory at once
_Chunk = tuple[Tensor, list[Tensor]]  # rows (groups, count, inputs), and residuals (groups, count, outputs) per target


@dataclass(frozen=True)
class Drawing:
    """Which rows count.

    Attributes
    ----------
    positions : int
        Largest number of positions of an operator's output, over all of a client's data.
    holdout : int
        Every so many-th example is held out.
    seed : int
        Decides which positions are drawn.
    """

    positions: int
    holdout: int
    seed: int


@dataclass(frozen=True)
class FitAnswer:
    """Sums of one operator.

    Attributes
    ----------
    train, held_out : Sums
        Over the examples to fit and the examples held out.
    sum_train, sum_held_out : Sums, optional
        Before a residual addition: the same with the residuals to "own sum - merged skip".
    """

    train: Sums
    held_out: Sums
    sum_train: Sums | None = None
    sum_held_out: Sums | None = None

    def combine(self, other: FitAnswer) -> FitAnswer:
        """Sums over both sets of rows."""
        alternative = (_both(self.sum_train, other.sum_train), _both(self.sum_held_out, other.sum_held_out))
        return FitAnswer(self.train.combine(other.train), self.held_out.combine(other.held_out), *alternative)


@dataclass(frozen=True)
class MomentsAnswer:
    """Channel moments of one operator in the merged network, and in the own one where they are wanted."""

    merged: Moments
    own: Moments | None = None

    def combine(self, other: MomentsAnswer) -> MomentsAnswer:
        """Moments of both sets of values."""
        own = None if self.own is None or other.own is None else self.own.combine(other.own)
        return MomentsAnswer(self.merged.combine(other.merged), own)


@dataclass(frozen=True)
class GramAnswer:
    """Sums of one operator's inputs in the own network; their residuals have no outputs."""

    sums: Sums

    def combine(self, other: GramAnswer) -> GramAnswer:
        """Sums over both sets of rows."""
        return GramAnswer(self.sums.combine(other.sums))


Measured = FitAnswer | MomentsAnswer | GramAnswer | SketchAnswer  # by the client
Answer = FitAnswer | MomentsAnswer | GramAnswer | SketchedFit  # as the server reads it


def measure(
    programs: Sequence[Program],
    batches: Sequence[Batch],
    merged: Params,
    own: Params,
    roles: Mapping[int, Role],
    drawing: Drawing,
    sketches: Mapping[int, int] | None = None,
) -> dict[str, Measured]:
    """One client's answers about several operators, by operator name, in one pass over its data.

    Parameters
    ----------
    programs, batches : sequences of equal length
        The traced network for every batch of the client's data.
    merged, own : mappings of str to Tensor
        The merged network so far and the client's own aligned network.
    roles : mapping of int to Role
        The operators' numbers, and what is wanted about each.
    drawing : Drawing
        Which rows count.
    sketches : mapping of int to int, optional
        Operators to be fitted that are answered about by a sketch, and its number of rows. The sketch depends on the
        data and the merged network, so that nobody who lacks the data can draw it again.

    Raises
    ------
    CalibrationError
        When there are too few examples to hold one out, or the network cannot take a batch.
    """
    masks = _held_out(batches, drawing.holdout)
    examples = sum(len(batch.inputs[0]) for batch in batches)
    found: dict[str, Measured] = {}
    secret = _secret(batches, merged) if sketches else 0
    with torch.no_grad():
        for index, (program, batch) in enumerate(zip(programs, batches, strict=True)):
            count = max(1, -(-drawing.positions * len(batch.inputs[0]) // examples))
            pair = _Pair(program, Walk(program, merged, batch), Walk(program, own, batch), merged, own)
            for place in sorted(roles):
                seed = drawing.seed + 1009 * place + 1_000_003 * index
                sketch = (sketches or {}).get(place, 0)
                noise = Noise(secret ^ seed)
                answer = pair.answer(place, roles[place], count, seed, masks[index], sketch, noise)
                name = program.operators[place].name
                found[name] = _joined(found[name], answer) if name in found else answer
    return found


def _held_out(batches: Sequence[Batch], every: int) -> list[Tensor]:
    masks = held_out(batches, every)
    if not any(bool(mask.any()) for mask in masks):
        examples = sum(len(mask) for mask in masks)
        raise CalibrationError(
            f"the data have {examples} examples, expected at least {every}: every {every}th is held out"
        )
    return masks


def _secret(batches: Sequence[Batch], merged: Params) -> int:
    """A seed that depends on every example and on the network that they are measured with."""
    state = hashlib.blake2b(digest_examples(batches) + bytes.fromhex(digest(merged)), digest_size=7)
    return int.from_bytes(state.digest(), "big")


class _Pair:
    """The merged and the own network on one batch."""

    def __init__(self, program: Program, merged: Walk, own: Walk, merged_params: Params, own_params: Params) -> None:
        self._program = program
        self._merged, self._own = merged, own
        self._merged_params, self._own_params = merged_params, own_params

    def answer(
        self, place: int, role: Role, count: int, seed: int, mask: Tensor, sketch: int, noise: Noise
    ) -> Measured:
        """What is wanted about one operator; places are asked for in forward order."""
        operator = self._program.operators[place]
        if role is Role.FIT:
            return self._fit(operator, count, seed, mask, sketch, noise)
        if role is Role.GRAM:
            return self._gram(operator, count, seed)
        axes = operator.channel_axes(self._merged_params) if operator.weight else (operator.layout.channel,)
        self._merged.advance(operator.index)
        if role is Role.STATISTICS:
            return MomentsAnswer(Moments.of(self._merged.value(operator.input), axes))
        own = Moments.of(self._own.output(operator), axes)
        return MomentsAnswer(Moments.of(self._merged.output(operator), axes), own)

    def _gram(self, operator: Operator, count: int, seed: int) -> GramAnswer:
        shape = tuple(operator.node.meta["val"].shape)
        self._own.advance(operator.index)
        source, weight = self._own.value(operator.input), self._own_params[operator.weight]
        positions = sample_positions(operator, operator.node.meta["val"], count, seed).to(source.device)
        total: Sums | None = None
        for chosen in torch.split(positions, _CHUNK):
            rows = input_rows(operator, source, weight, shape, chosen)
            part = Sums.of(rows, rows[:, :, :0])
            total = part if total is None else total.combine(part)
        assert total is not None  # at least one position is drawn
        return GramAnswer(total)

    def _fit(
        self, operator: Operator, count: int, seed: int, mask: Tensor, sketch: int, noise: Noise
    ) -> FitAnswer | SketchAnswer:
        norm, skip = norm_behind(self._program, operator), skip_beside(self._program, operator)
        output = self._own.output(operator if norm is None else norm)
        self._merged.advance(operator.index)
        positions = sample_positions(operator, output, count, seed)
        goal = output_rows(operator, output, positions)
        detour = None if skip is None else self._detour(operator, skip, positions)
        shape = tuple(output.shape)
        axis = operator.layout.channel % len(shape)
        owner = input_of(positions, shape[:axis] + shape[axis + 1 :], len(mask))
        held = mask[owner.clamp_max(len(mask) - 1)]
        sides = [
            self._rows(
                operator, norm, shape, positions[chosen], goal[chosen], None if detour is None else detour[chosen]
            )
            for chosen in (~held, held)
        ]
        if sketch:
            sizes = (sketch, held_out_size(sketch))
            return SketchAnswer(*(_sketch(side, noise, size) for side, size in zip(sides, sizes, strict=True)))
        (train, sum_train), (held_sums, sum_held) = (_sums(side) for side in sides)
        return FitAnswer(train, held_sums, sum_train, sum_held)

    def _detour(self, operator: Operator, skip: fx.Node, positions: Tensor) -> Tensor:
        """By how much the own summand beside an operator's output exceeds the merged one."""
        own, merged = (output_rows(operator, walk.value(skip), positions) for walk in (self._own, self._merged))
        return own.double() - merged.double()

    def _rows(
        self,
        operator: Operator,
        norm: Operator | None,
        shape: tuple[int, ...],
        positions: Tensor,
        goal: Tensor,
        detour: Tensor | None,
    ) -> Iterator[_Chunk]:
        """Inputs at some positions, and their residuals to each target: the own output, and the own sum if any."""
        source, weight = self._merged.value(operator.input), self._merged_params[operator.weight]
        matrix, offset = effective(operator, norm, self._merged_params)
        # without positions there is one empty chunk
        for chosen in torch.split(torch.arange(len(positions), device=positions.device), _CHUNK):
            rows = input_rows(operator, source, weight, shape, positions[chosen]).double()
            residuals = _grouped(goal[chosen].double(), len(matrix)) - (rows @ matrix + offset[:, None, :])
            further = [] if detour is None else [residuals + _grouped(detour[chosen], len(matrix))]
            yield rows, [residuals, *further]


def _sums(chunks: Iterable[_Chunk]) -> tuple[Sums, Sums | None]:
    """Sums with the residuals to the first target, and to the second if there is one."""
    total: Sums | None = None
    beside: Sums | None = None
    for rows, (residuals, *further) in chunks:
        part = Sums.of(rows, residuals)
        total = part if total is None else total.combine(part)
        for each in further:
            other = replace(part, r=each.sum(1), xr=rows.mT @ each, rr=each.square().sum(1))
            beside = other if beside is None else beside.combine(other)
    assert total is not None  # there is at least one chunk
    return total, beside


def _sketch(chunks: Iterable[_Chunk], noise: Noise, size: int) -> Sketch:
    total: Sketch | None = None
    for rows, residuals in chunks:
        part = Sketch.of(rows, residuals, noise, size)
        total = part if total is None else total.combine(part)
    assert total is not None  # there is at least one chunk
    return total


def _grouped(rows: Tensor, groups: int) -> Tensor:
    return rows.reshape(len(rows), groups, rows.shape[1] // groups).movedim(1, 0)


def _both(one: Sums | None, other: Sums | None) -> Sums | None:
    return None if one is None or other is None else one.combine(other)


def _joined(one: Measured, other: Measured) -> Measured:
    if isinstance(one, FitAnswer) and isinstance(other, FitAnswer):
        return one.combine(other)
    if isinstance(one, MomentsAnswer) and isinstance(other, MomentsAnswer):
        return one.combine(other)
    if isinstance(one, GramAnswer) and isinstance(other, GramAnswer):
        return one.combine(other)
    if isinstance(one, SketchAnswer) and isinstance(other, SketchAnswer):
        return one.combine(other)
    raise CalibrationError("one operator cannot have two roles in one query")
