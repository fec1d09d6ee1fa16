"""Input and output of alignment methods: the checked nodes, and the nodes in one basis."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from c2m3_fl.core import permutation
from c2m3_fl.core.permutation import Permutation
from c2m3_fl.core.result import Match
from c2m3_fl.core.spec import Params, PermutationSpec
from c2m3_fl.errors import CalibrationError
from c2m3_fl.merging.align.activations import Features, two_sided_features, unit_features
from c2m3_fl.merging.recalibrate.setting import check_types
from c2m3_fl.merging.recalibrate.targets import View
from c2m3_fl.network.calibration import Batch
from c2m3_fl.network.calibration_set import CalibrationSet
from c2m3_fl.network.program import Program


@dataclass(frozen=True, eq=False)
class Nodes:
    """The networks to be merged, checked.

    Attributes
    ----------
    spec : PermutationSpec
        Their symmetries.
    params : tuple of mappings of str to Tensor
        Their state dicts, on one device.
    weights : Tensor of float64, shape (nodes,)
        Averaging weights; they sum to one.
    order : tuple of int
        The nodes in an order that depends on content and weights alone.
    basis : int
        Index of the node whose order of units the merged network has.
    model : nn.Module
        The architecture.
    calibration : CalibrationSet, optional
        Calibration data.
    """

    spec: PermutationSpec
    params: tuple[Params, ...]
    weights: Tensor
    order: tuple[int, ...]
    basis: int
    model: nn.Module
    calibration: CalibrationSet | None = None

    @property
    def batches(self) -> tuple[Batch, ...]:
        """The calibration batches; empty without data."""
        return () if self.calibration is None else self.calibration.batches

    def programs(self) -> tuple[Program, ...]:
        """The exported network, one program per batch.

        Raises
        ------
        CalibrationError
            Without calibration data.
        """
        if self.calibration is None or not self.batches:
            raise CalibrationError("this method compares activations and needs calibration data; none were given")
        return self.calibration.programs

    def features(self, programs: Sequence[Program], *, two_sided: bool = False) -> list[Features]:
        """Activations of every node's units on the calibration data: `unit_features`, or `two_sided_features`."""
        for index, node in enumerate(self.params):
            check_types(self.model.state_dict(), node, f"node {index}")
        with torch.no_grad():
            measure = two_sided_features if two_sided else unit_features
            return [measure(self.spec, programs, self.batches, node) for node in self.params]


@dataclass(frozen=True, eq=False)
class Alignment:
    """The nodes in one basis.

    Attributes
    ----------
    params : tuple of mappings of str to Tensor
        The aligned state dicts, in the order of the nodes.
    moves : tuple of Permutation, optional
        Each node's map into the basis; None if the maps are not permutations.
    match : Match, optional
        The maps into a universe, for methods that have one.
    seconds : float
        Wall-clock time.
    seen : tuple of (mapping of str to Tensor, View), optional
        If `params` do not compute the nodes' functions: networks that do, each with the view of its outputs in the
        basis.
    notes : tuple of str
        Notes for the user.
    """

    params: tuple[Params, ...]
    moves: tuple[Permutation, ...] | None
    match: Match | None
    seconds: float
    seen: tuple[tuple[Params, View], ...] | None = None
    notes: tuple[str, ...] = ()


class Method(Protocol):
    """A method of alignment."""

    def __call__(self, nodes: Nodes) -> Alignment:
        """Bring all nodes into the basis of ``nodes.basis``."""
        ...


def moved(nodes: Nodes, moves: Sequence[Permutation], match: Match | None, begin: float) -> Alignment:
    """Apply each node's map into the basis.

    Parameters
    ----------
    nodes : Nodes
        The nodes.
    moves : sequence of Permutation
        Each node's map into the basis.
    match : Match, optional
        The maps into a universe, if there is one.
    begin : float
        When the alignment began, by `time.perf_counter`.
    """
    pairs = zip(moves, nodes.params, strict=True)
    params = tuple(permutation.apply(nodes.spec, move, node) for move, node in pairs)
    return Alignment(params, tuple(moves), match, time.perf_counter() - begin)
