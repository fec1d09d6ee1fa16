"""CCA Merge (Horoi et al. 2024, arXiv 2407.05385): linear maps in place of permutations."""

from __future__ import annotations

import math
import time
from collections.abc import Collection
from dataclasses import dataclass, replace

from c2m3_fl.core import permutation
from c2m3_fl.core.spec import Params, refuse_rotations
from c2m3_fl.core.state_dicts import same
from c2m3_fl.errors import ConfigError
from c2m3_fl.merging.align.activations import canonical_map, hardly_varies
from c2m3_fl.merging.align.base import Alignment, Nodes
from c2m3_fl.merging.align.linear_maps import (
    check_mappable,
    folded,
    mapped,
    normalised,
    reading_axes,
    seen_through,
    spread_again,
)
from c2m3_fl.merging.recalibrate.targets import View, as_it_is


@dataclass(frozen=True)
class CCA:
    """CCA Merge: linear maps from regularised canonical correlation, every node to the basis.

    A group's map is applied to every axis that produces its units, and the inverse to every axis that reads them. The
    scales of a BatchNorm right after a linear operator are first folded into that operator, so that the maps are exact
    there; the scales of other norms are mapped as standard deviations. Linear maps do not commute with nonlinearities,
    so unlike permutations they change a node's function. Units are therefore compared on both sides of the
    nonlinearity, and the targets of recalibration are the mapped outputs of the original nodes.

    Attributes
    ----------
    regularisation : float
        Added to the diagonals of the covariances, as a share of the units' mean variance.
    """

    regularisation: float = 0.1

    def __post_init__(self) -> None:
        value: object = self.regularisation
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
            raise ConfigError(f"regularisation is {self.regularisation!r}, expected a number above 0, such as 0.1")

    def __call__(self, nodes: Nodes) -> Alignment:
        """Map each node onto the basis."""
        begin = time.perf_counter()
        refuse_rotations(nodes.spec, "CCA")
        check_mappable(nodes.spec)
        spec, reference = nodes.spec, nodes.params[nodes.basis]
        if all(same(node, reference) for node in nodes.params):
            identity = permutation.identity(spec)
            return Alignment(nodes.params, (identity,) * len(nodes.params), None, time.perf_counter() - begin)
        programs = nodes.programs()
        program = programs[0]
        reads, pairs = reading_axes(spec, program), normalised(program)
        folds = [folded(program, pairs, node) for node in nodes.params]
        features = replace(nodes, params=tuple(folds)).features(programs, two_sided=True)
        goal = features[nodes.basis]
        still = {name for name in spec.groups if any(hardly_varies(goal[name], own[name]) for own in features)}
        aligned: list[Params] = []
        seen: list[tuple[Params, View]] = []
        for given, own in zip(folds, features, strict=True):
            if same(given, folds[nodes.basis]):
                aligned.append(given)
                seen.append((given, as_it_is))
                continue
            maps = {name: canonical_map(goal[name], own[name], self.regularisation) for name in spec.groups}
            moved = mapped(spec, maps, given, reads, program)
            spread_again(program, pairs, moved)
            aligned.append(moved)
            seen.append((given, seen_through(spec, maps)))
        return Alignment(
            tuple(aligned), None, None, time.perf_counter() - begin, seen=tuple(seen), notes=_left_in_place(still)
        )


def _left_in_place(groups: Collection[str]) -> tuple[str, ...]:
    names = ", ".join(map(repr, sorted(groups)))
    note = f"the units of {names} hardly vary in some network on the calibration data and were not mapped"
    return (note,) if groups else ()
