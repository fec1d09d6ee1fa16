"""What a refit aims at: the aligned endpoints' mean output of every operator, at drawn positions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from c2m3_fl.merging.setting import Setting
from c2m3_fl.merging.targets import Target
from c2m3_fl.models.operators import Operator
from c2m3_fl.models.patches import input_of, output_rows, sample_positions
from c2m3_fl.models.program import Walk

FOLDS = 5  # every fifth input is held out for the choice of the strength


@dataclass(frozen=True)
class Drawn:
    """Positions of one operator's output in one batch.

    Attributes
    ----------
    positions : Tensor of int64, shape (positions,)
        Flat places on every axis but that of the channels.
    held_out : Tensor of bool, shape (positions,)
        Whether they belong to an input that is held out.
    rows : Tensor, shape (positions, channels)
        The endpoints' mean output there.
    shape : tuple of int
        Shape of the whole output.
    """

    positions: Tensor
    held_out: Tensor
    rows: Tensor
    shape: tuple[int, ...]


class MeanOutputs:
    """The endpoints' mean outputs, measured in one pass per endpoint and batch.

    Parameters
    ----------
    setting : Setting
        Endpoints and calibration data.
    wanted : callable
        Which operators.
    positions : int
        Largest number of positions per operator, over all batches.
    seed : int
        Decides which positions are drawn.
    floor : float, optional
        Least probability, where outputs of the network are met by the log of the mean softmax; None where they
        are met by their mean like all others.
    """

    def __init__(
        self,
        setting: Setting,
        wanted: Callable[[Operator], bool],
        positions: int,
        seed: int,
        floor: float | None,
    ) -> None:
        self._share = setting.weights.tolist()
        self._floor = floor
        self._drawn: dict[tuple[int, int], Drawn] = {}
        seen = 0
        for index, (program, batch) in enumerate(zip(setting.programs, setting.batches, strict=True)):
            walks = [Walk(program, endpoint, batch) for endpoint in setting.endpoints]
            inputs = len(batch.inputs[0])
            held_out = (torch.arange(seen, seen + inputs) % FOLDS == FOLDS - 1).to(batch.inputs[0].device)
            seen += inputs
            count = -(-positions * inputs // setting.inputs)
            for place, operator in enumerate(program.operators):
                outputs = [walk.output(operator) for walk in walks]
                if wanted(operator):
                    own_seed = seed + 1009 * place + 1_000_003 * index
                    self._drawn[place, index] = self._draw(operator, outputs, held_out, count, own_seed)

    def at(self, place: int, batch: int) -> Drawn:
        """What was drawn for operator number `place` in a batch."""
        return self._drawn[place, batch]

    def target(self, place: int, operator: Operator, moments: Target) -> Target:
        """Moments that the operator shall have: those of the endpoints, or of the rows where these are logarithms."""
        if self._floor is None or not operator.gives_output:
            return moments
        rows = torch.cat([drawn.rows for (found, _), drawn in self._drawn.items() if found == place]).double()
        return Target(rows.mean(0), rows.std(0, correction=0))

    def _draw(self, operator: Operator, outputs: Sequence[Tensor], held_out: Tensor, count: int, seed: int) -> Drawn:
        positions = sample_positions(operator, outputs[0], count, seed)
        rows = [output_rows(operator, output, positions) for output in outputs]
        if self._floor is not None and operator.gives_output:
            logarithm = self._mean([each.softmax(-1) for each in rows]).clamp_min(self._floor).log()
            mean = logarithm - logarithm.mean(-1, keepdim=True)
        else:
            mean = self._mean(rows)
        shape = tuple(outputs[0].shape)
        axis = operator.layout.channel % len(shape)
        owner = input_of(positions, shape[:axis] + shape[axis + 1 :], len(held_out))
        return Drawn(positions, held_out[owner.clamp_max(len(held_out) - 1)], mean, shape)

    def _mean(self, rows: Sequence[Tensor]) -> Tensor:
        """Weighted mean as differences from the first: exact where all are equal."""
        total = torch.zeros_like(rows[0])
        for each, weight in zip(rows[1:], self._share[1:], strict=True):
            total += weight * (each - rows[0])
        return rows[0] + total
