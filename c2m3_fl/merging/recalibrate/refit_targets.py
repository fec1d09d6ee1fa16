"""Targets of a refit: the aligned endpoints' mean output of every operator, at drawn positions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from c2m3_fl.merging.recalibrate.setting import Setting
from c2m3_fl.merging.recalibrate.softmax_fit import balance
from c2m3_fl.network.operators import Kind, Operator
from c2m3_fl.network.program import Walk
from c2m3_fl.network.rows import input_of, output_rows, sample_positions

_NUMBERS = 1 << 25  # limit of stored probabilities: with sixty thousand classes few positions are drawn
FOLDS = 5  # every fifth input is held out for the choice of the strength
FIT, CHOOSE, LEAVE = range(3)  # inputs to fit to, to choose the strength on, and to leave to a judge


@dataclass(frozen=True)
class Drawn:
    """Positions of one operator's output in one batch.

    Attributes
    ----------
    positions : Tensor of int64, shape (positions,)
        Flat indices over all axes except that of the channels.
    role : Tensor of int64, shape (positions,)
        Use of the input that each position belongs to: FIT, CHOOSE or LEAVE.
    rows : Tensor, shape (positions, channels)
        The endpoints' mean output there, or mean probabilities.
    shape : tuple of int
        Shape of the whole output.
    """

    positions: Tensor
    role: Tensor
    rows: Tensor
    shape: tuple[int, ...]


class MeanOutputs:
    """The endpoints' mean outputs, measured in one pass per endpoint and batch.

    Parameters
    ----------
    setting : Setting
        Endpoints and calibration data.
    wanted : callable
        Whether an operator's outputs are measured.
    positions : int
        Largest number of positions per operator, over all batches.
    seed : int
        Seed of the draw of positions.
    floor : float, optional
        If given, the network's outputs are class scores: their rows are then the mean of the endpoints'
        probabilities, divided by `balance` with this floor. None: fit class scores to the mean output, like any other
        operator.
    """

    def __init__(
        self,
        setting: Setting,
        wanted: Callable[[Operator], bool],
        positions: int,
        seed: int,
        floor: float | None,
    ) -> None:
        self._setting = setting
        self._floor = floor
        self._sums: dict[str, Tensor] = {}
        self._drawn: dict[tuple[int, int], Drawn] = {}
        seen = 0
        for index, (program, batch) in enumerate(zip(setting.programs, setting.batches, strict=True)):
            sources = [setting.programs_of(place)[index] for place in range(len(setting.endpoints))]
            walks = [Walk(*pair, batch) for pair in zip(sources, setting.endpoints, strict=True)]
            inputs = len(batch.inputs[0])
            left = setting.left_out[index].cpu() if setting.left_out else torch.zeros(inputs, dtype=torch.bool)
            rank = seen + (~left).cumsum(0) - 1
            seen += int((~left).sum())
            role = torch.where(left, LEAVE, torch.where(rank % FOLDS == FOLDS - 1, CHOOSE, FIT))
            count = -(-positions * inputs // setting.inputs)
            for place, operator in enumerate(program.operators):
                own = [source.operators[place] for source in sources]
                outputs = [walk.output(each) for walk, each in zip(walks, own, strict=True)]
                if wanted(operator):
                    outputs = [
                        view(*pair) for view, pair in zip(setting.views, zip(own, outputs, strict=True), strict=True)
                    ]
                    own_seed = seed + 1009 * place + 1_000_003 * index
                    self._drawn[place, index] = self._draw(
                        operator, outputs, role.to(batch.inputs[0].device), count, own_seed
                    )
        if floor is not None:
            self._balance(floor)

    def at(self, place: int, batch: int) -> Drawn:
        """The positions drawn for operator number `place` in a batch."""
        return self._drawn[place, batch]

    def rows(self, place: int) -> int:
        """Number of positions drawn for operator number `place`, over all batches."""
        return sum(len(drawn.positions) for (found, _), drawn in self._drawn.items() if found == place)

    def scored(self, operator: Operator) -> bool:
        """Whether an operator's outputs are scores of classes, and its rows probabilities."""
        return self._floor is not None and operator.gives_output and operator.kind in (Kind.LINEAR, Kind.PRODUCT)

    def _draw(self, operator: Operator, outputs: Sequence[Tensor], role: Tensor, count: int, seed: int) -> Drawn:
        if self.scored(operator):
            count = min(count, _NUMBERS // (outputs[0].shape[operator.layout.channel] * len(self._setting.batches)))
        positions = sample_positions(operator, outputs[0], max(1, count), seed)
        rows = [output_rows(operator, output, positions) for output in outputs]
        if self.scored(operator):
            rows = [each.double().softmax(-1) for each in rows]
            means = torch.stack([each.sum(0) for each in rows])
            before = self._sums.get(operator.name)
            self._sums[operator.name] = means if before is None else before + means
        shape = tuple(outputs[0].shape)
        axis = operator.layout.channel % len(shape)
        owner = input_of(positions, shape[:axis] + shape[axis + 1 :], len(role))
        return Drawn(positions, role[owner.clamp_max(len(role) - 1)], self._setting.mean(operator, rows), shape)

    def _balance(self, floor: float) -> None:
        """Balance the mean probabilities of every operator that gives scores."""
        for (place, batch), drawn in self._drawn.items():
            sums = self._sums.get(self._setting.programs[0].operators[place].name)
            if sums is not None:
                even = drawn.rows / balance(sums / self.rows(place), self._setting.weights, floor)
                self._drawn[place, batch] = replace(drawn, rows=even / even.sum(-1, keepdim=True))
