"""Networks of one draw, merged with permutations and with rotations: what both benchmarks of rotations share."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from c2m3_fl.core.averaging import normalise_weights, weighted_mean
from c2m3_fl.core.state_dicts import order_by_weight, to_device
from c2m3_fl.merging import ActivationMatching, CycleConsistent, Mean, Method, Nodes
from c2m3_fl.merging.recalibrate.setting import prepare
from c2m3_fl.merging.recalibrate.short_names import recalibrate, resolve
from c2m3_fl.network.calibration_set import CalibrationSet
from c2m3_fl.symmetry.discover import permutation_spec
from c2m3_fl.symmetry.folding import find_folding

METHODS: dict[str, tuple[bool, Method]] = {  # whether groups rotate, and how nodes are aligned
    "plain mean": (False, Mean()),
    "C2M3, permutations": (False, CycleConsistent()),
    "activations, permutations": (False, ActivationMatching(universe=True)),
    "C2M3, rotations": (True, CycleConsistent()),
    "C2M3, rotations, from the identity": (True, CycleConsistent(start="identity")),
    "C2M3, rotations, from activations": (True, CycleConsistent(start="activations")),
}
RECALIBRATIONS = {"": "none", " + REPAIR": "repair", " + refit": "refit"}


class Draw:
    """Some networks, to be merged in many ways, as `merge` does it: every method aligns them once.

    Parameters
    ----------
    model : nn.Module
        The architecture, on the CPU.
    calibration : sequence of Tensor
        Batches of unlabelled inputs.
    nodes : sequence of dict of str to Tensor
        The networks.
    place : torch.device
        Where they are merged.
    """

    def __init__(
        self, model: nn.Module, calibration: Sequence[Tensor], nodes: Sequence[dict[str, Tensor]], place: torch.device
    ) -> None:
        self._model, self._place = model.eval(), place
        self._nodes = tuple(to_device(node, place) for node in nodes)
        self._held = CalibrationSet.of(self._model, [batch.cpu() for batch in calibration])
        self._share = normalise_weights(None, len(nodes))
        self._order = order_by_weight(self._nodes, self._share)

    def aligned(self, method: str) -> tuple[dict[str, Tensor], ...]:
        """The networks in one basis."""
        turning, how = METHODS[method]
        inputs = self._held.example_inputs
        spec = permutation_spec(self._model, inputs, rotations=turning)
        folding = find_folding(self._model, inputs) if turning else None
        folded = tuple(node if folding is None else folding.fold(node) for node in self._nodes)
        order, data = tuple(self._order), self._held.to(self._place)
        nodes = Nodes(spec, folded, self._share, order, order[0], self._model, data)
        return tuple(dict(params) for params in how(nodes).params)

    def averages(self, aligned: Sequence[dict[str, Tensor]]) -> Iterator[tuple[str, dict[str, Tensor]]]:
        """The mean of aligned networks after every recalibration of `RECALIBRATIONS`."""
        merged = weighted_mean([aligned[index] for index in self._order], self._share)
        setting = None
        for name in RECALIBRATIONS.values():
            chosen = resolve(name)
            if chosen is None:
                yield name, dict(merged)
                continue
            setting = setting or prepare(self._model, merged, aligned, self._held.to(self._place))
            yield name, dict(recalibrate(chosen, setting).state_dict)
