"""Ways to bring nodes into one basis before they are averaged, behind one interface."""

from __future__ import annotations

import math
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor, nn

from c2m3_fl.core import permutation
from c2m3_fl.core.frank_wolfe import Match, match
from c2m3_fl.core.pairwise import merge_many, pairwise_matching
from c2m3_fl.core.permutation import Permutation
from c2m3_fl.core.result import Callback
from c2m3_fl.core.spec import Params, PermutationSpec
from c2m3_fl.core.starts import Start
from c2m3_fl.errors import CalibrationError, ConfigError
from c2m3_fl.merging.activations import (
    Features,
    canonical_map,
    hardly_varies,
    match_all,
    match_to,
    two_sided_features,
    unit_features,
)
from c2m3_fl.merging.linear_maps import (
    check_mappable,
    folded,
    mapped,
    normalised,
    reading_axes,
    seen_through,
    spread_again,
)
from c2m3_fl.merging.setting import check_types, same
from c2m3_fl.merging.targets import View, as_it_is
from c2m3_fl.models.calibration import Batch
from c2m3_fl.models.program import Program, trace_batches


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
        The node whose order of units the merge shall have.
    model : nn.Module
        The architecture.
    batches : tuple of Batch
        Calibration data; empty where there are none.
    """

    spec: PermutationSpec
    params: tuple[Params, ...]
    weights: Tensor
    order: tuple[int, ...]
    basis: int
    model: nn.Module
    batches: tuple[Batch, ...] = ()

    def programs(self) -> list[Program]:
        """The traced network, one program per batch.

        Raises
        ------
        CalibrationError
            Without calibration data.
        """
        if not self.batches:
            raise CalibrationError("this method compares activations and needs calibration data; none were given")
        return trace_batches(self.model, self.batches)

    def features(self, programs: Sequence[Program], *, two_sided: bool = False) -> list[Features]:
        """What every node's units do on the calibration data: `unit_features`, or `two_sided_features`."""
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
        Each node's map into the basis; None where the maps are no permutations.
    match : Match, optional
        The maps into a universe, for methods that have one.
    seconds : float
        Wall-clock time.
    seen : tuple of (mapping of str to Tensor, View), optional
        Where `params` no longer compute what the nodes do: networks that do, and how their outputs are seen in the
        basis.
    notes : tuple of str
        What a user should know.
    """

    params: tuple[Params, ...]
    moves: tuple[Permutation, ...] | None
    match: Match | None
    seconds: float
    seen: tuple[tuple[Params, View], ...] | None = None
    notes: tuple[str, ...] = ()


class Method(Protocol):
    """Aligns nodes."""

    def __call__(self, nodes: Nodes) -> Alignment:
        """Bring all nodes into the basis of ``nodes.basis``."""
        ...


@dataclass(frozen=True)
class Mean:
    """No alignment: the plain weighted mean."""

    def __call__(self, nodes: Nodes) -> Alignment:
        """Leave every node where it is."""
        identity = permutation.identity(nodes.spec)
        return Alignment(nodes.params, (identity,) * len(nodes.params), None, 0.0)


@dataclass(frozen=True)
class CycleConsistent:
    """C2M3: all nodes and layers at once into one universe, from there into the basis; see `match`.

    Attributes
    ----------
    start : str or sequence of Permutation
        Where the search starts.
    max_steps : int
        Upper limit of Frank-Wolfe steps.
    tolerance : float
        Relative duality gap at which to stop.
    callback : callable, optional
        Called with a `Step` after every step.
    """

    start: Start = "auto"
    max_steps: int = 100
    tolerance: float = 1e-4
    callback: Callback | None = None

    def __call__(self, nodes: Nodes) -> Alignment:
        """Match the nodes, then map each through the universe into the basis."""
        begin = time.perf_counter()
        found = match(
            nodes.spec,
            nodes.params,
            weights=nodes.weights,
            start=self.start,
            max_steps=self.max_steps,
            tolerance=self.tolerance,
            callback=self.callback,
        )
        moves = [found.between(nodes.basis, index) for index in range(len(nodes.params))]
        return moved(nodes, moves, found, begin)


@dataclass(frozen=True)
class GitReBasin:
    """Weight matching of every node with the basis, pair by pair; see `weight_matching`."""

    def __call__(self, nodes: Nodes) -> Alignment:
        """Match each node to the basis."""
        begin = time.perf_counter()
        return moved(nodes, pairwise_matching(nodes.spec, nodes.params, nodes.basis), None, begin)


@dataclass(frozen=True)
class MergeMany:
    """Every node in turn matched to the mean of the others; see `merge_many`.

    Attributes
    ----------
    seed : int
        Decides the order in which nodes are visited.
    """

    seed: int = 0

    def __call__(self, nodes: Nodes) -> Alignment:
        """Match the nodes, then map each into the basis."""
        begin = time.perf_counter()
        generator = torch.Generator().manual_seed(self.seed)
        found = merge_many(nodes.spec, [nodes.params[index] for index in nodes.order], generator=generator)
        perms = dict(zip(nodes.order, found, strict=True))
        moves = [permutation.between(perms[nodes.basis], perms[index]) for index in range(len(nodes.params))]
        return moved(nodes, moves, None, begin)


@dataclass(frozen=True)
class ActivationMatching:
    """Permutations from the correlation of calibration activations.

    Attributes
    ----------
    universe : bool
        Match every node to the weighted sum of all others instead of to the basis alone.
    """

    universe: bool = False

    def __call__(self, nodes: Nodes) -> Alignment:
        """Match by what units do."""
        begin = time.perf_counter()
        features = nodes.features(nodes.programs())
        if not self.universe:
            moves = [match_to(nodes.spec, features[nodes.basis], each) for each in features]
            return moved(nodes, moves, None, begin)
        share = nodes.weights.tolist()
        ordered = [features[index] for index in nodes.order]
        found = match_all(nodes.spec, ordered, [share[index] for index in nodes.order])
        perms = dict(zip(nodes.order, found, strict=True))
        moves = [permutation.between(perms[nodes.basis], perms[index]) for index in range(len(features))]
        return moved(nodes, moves, None, begin)


@dataclass(frozen=True)
class CCA:
    """CCA Merge: linear maps from regularised canonical correlation, every node to the basis.

    A map goes onto every axis that makes a group's units and its inverse onto every axis that reads them. The scales
    of a BatchNorm right behind a linear operator are first moved into that operator, which makes the maps exact there;
    those of other norms are mapped as spreads. Linear maps do not commute with nonlinearities, so unlike permutations
    they change what a node computes: units are compared on both sides of the nonlinearity, and recalibration aims at
    the outputs of the nodes themselves, mapped.

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
            spread_again(program, pairs, spec, maps, given, moved)
            aligned.append(moved)
            seen.append((given, seen_through(spec, maps)))
        return Alignment(
            tuple(aligned), None, None, time.perf_counter() - begin, seen=tuple(seen), notes=_left_in_place(still)
        )


def _left_in_place(groups: Collection[str]) -> tuple[str, ...]:
    names = ", ".join(map(repr, sorted(groups)))
    note = f"the units of {names} hardly vary in some network on the calibration data and stayed as they were"
    return (note,) if groups else ()


def moved(nodes: Nodes, moves: Sequence[Permutation], match: Match | None, begin: float) -> Alignment:
    """Apply each node's map into the basis."""
    pairs = zip(moves, nodes.params, strict=True)
    params = tuple(permutation.apply(nodes.spec, move, node) for move, node in pairs)
    return Alignment(params, tuple(moves), match, time.perf_counter() - begin)


METHODS: dict[str, Method] = {
    "mean": Mean(),
    "git-rebasin": GitReBasin(),
    "mergemany": MergeMany(),
    "c2m3": CycleConsistent(),
    "activations": ActivationMatching(),
    "activations-universe": ActivationMatching(universe=True),
    "cca": CCA(),
}


def resolve_method(method: Method | str) -> Method:
    """Return the method of a short name.

    Raises
    ------
    ConfigError
        For an unknown name, or a class in place of its instance.

    Examples
    --------
    >>> resolve_method("mean")
    Mean()
    """
    if isinstance(method, type):
        raise ConfigError(f"method is the class {method.__name__}, expected an object such as CycleConsistent()")
    if callable(method):
        return method
    if method not in list(METHODS):  # a list is no key
        raise ConfigError(f"method is {method!r}, expected one of {', '.join(map(repr, METHODS))}")
    return METHODS[method]
