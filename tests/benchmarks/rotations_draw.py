"""Merges with permutations and with rotations: what both benchmarks of rotations share."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from c2m3_fl.core.averaging import normalise_weights, weighted_mean
from c2m3_fl.core.spec import PermutationSpec
from c2m3_fl.core.state_dicts import order_by_weight, to_device
from c2m3_fl.merging import ActivationMatching, CycleConsistent, Mean, Method, Nodes
from c2m3_fl.merging.recalibrate.setting import prepare
from c2m3_fl.merging.recalibrate.short_names import recalibrate, resolve
from c2m3_fl.network.calibration_set import CalibrationSet
from c2m3_fl.symmetry.discover import permutation_spec
from c2m3_fl.symmetry.folding import Folding, find_folding

METHODS: dict[str, tuple[bool, Method]] = {  # whether groups rotate, and how nodes are aligned
    "plain mean": (False, Mean()),
    "C2M3, permutations": (False, CycleConsistent()),
    "activations, permutations": (False, ActivationMatching(universe=True)),
    "C2M3, rotations": (True, CycleConsistent()),
    "C2M3, rotations, from the identity": (True, CycleConsistent(start="identity")),
    "C2M3, rotations, from activations": (True, CycleConsistent(start="activations")),
}
RECALIBRATIONS = {"": "none", " + REPAIR": "repair", " + refit": "refit"}


class Merger:
    """Merges networks of one architecture in many ways, as `merge` does it; symmetries are derived once.

    Parameters
    ----------
    model : nn.Module
        The architecture, on the CPU.
    calibration : sequence of Tensor
        Batches of unlabelled inputs.
    place : torch.device
        Where networks are merged.
    """

    def __init__(self, model: nn.Module, calibration: Sequence[Tensor], place: torch.device) -> None:
        self._model, self._place = model.eval(), place
        self._held = CalibrationSet.of(self._model, [batch.cpu() for batch in calibration])
        self._symmetries: dict[bool, tuple[PermutationSpec, Folding | None]] = {}

    def aligned(self, nodes: Sequence[dict[str, Tensor]], method: str) -> tuple[dict[str, Tensor], ...]:
        """The networks in one basis, in the order in which they are averaged."""
        turning, how = METHODS[method]
        spec, folding = self._symmetries.get(turning) or self._derived(turning)
        moved = [to_device(node, self._place) for node in nodes]
        share = normalise_weights(None, len(moved))
        order = tuple(order_by_weight(moved, share))
        folded = tuple(node if folding is None else folding.fold(node) for node in moved)
        found = how(Nodes(spec, folded, share, order, order[0], self._model, self._held.to(self._place))).params
        return tuple(dict(found[index]) for index in order)

    def averages(self, aligned: Sequence[dict[str, Tensor]]) -> Iterator[tuple[str, dict[str, Tensor]]]:
        """The mean of aligned networks after every recalibration of `RECALIBRATIONS`."""
        merged = weighted_mean(aligned, normalise_weights(None, len(aligned)))
        setting = None
        for name in RECALIBRATIONS.values():
            chosen = resolve(name)
            if chosen is None:
                yield name, dict(merged)
                continue
            setting = setting or prepare(self._model, merged, aligned, self._held.to(self._place))
            yield name, dict(recalibrate(chosen, setting).state_dict)

    def _derived(self, turning: bool) -> tuple[PermutationSpec, Folding | None]:
        inputs = self._held.example_inputs
        found = permutation_spec(self._model, inputs, rotations=turning)
        self._symmetries[turning] = found, find_folding(self._model, inputs) if turning else None
        return self._symmetries[turning]
