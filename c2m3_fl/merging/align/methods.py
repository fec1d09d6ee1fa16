"""Ways to bring nodes into one basis before they are averaged, behind one interface."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Literal

import torch

from c2m3_fl.core import permutation
from c2m3_fl.core.match import match
from c2m3_fl.core.pairwise import merge_many, pairwise_matching
from c2m3_fl.core.permutation import Permutation
from c2m3_fl.core.result import Callback
from c2m3_fl.core.starts import Start
from c2m3_fl.errors import ConfigError
from c2m3_fl.merging.align.activations import match_all, match_to
from c2m3_fl.merging.align.base import Alignment, Method, Nodes, moved
from c2m3_fl.merging.align.cca import CCA

MergeStart = Start | Literal["activations"]


@dataclass(frozen=True)
class Mean:
    """No alignment: the plain weighted mean."""

    def __call__(self, nodes: Nodes) -> Alignment:
        """Return every node unchanged."""
        identity = permutation.identity(nodes.spec)
        return Alignment(nodes.params, (identity,) * len(nodes.params), None, 0.0)


@dataclass(frozen=True)
class CycleConsistent:
    """C2M3: match all nodes and layers at once to one universe, then map them into the basis; see `match`.

    Attributes
    ----------
    start : str or sequence of Permutation
        Where the search starts: as for `match`, or "activations" for the result of universe-wide activation matching
        on the calibration data. That found higher agreement on deep networks.
    max_steps : int
        Upper limit of Frank-Wolfe steps.
    tolerance : float
        Relative duality gap at which to stop.
    callback : callable, optional
        Called with a `Step` after every step.
    """

    start: MergeStart = "auto"
    max_steps: int = 100
    tolerance: float = 1e-4
    callback: Callback | None = None

    def __call__(self, nodes: Nodes) -> Alignment:
        """Match the nodes, then map each through the universe into the basis."""
        begin = time.perf_counter()
        start = self.start
        if start == "activations":
            start = ActivationMatching(universe=True).moves(nodes)
        found = match(
            nodes.spec,
            nodes.params,
            weights=nodes.weights,
            start=start,
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
    """Match every node in turn to the mean of the others; see `merge_many`.

    Attributes
    ----------
    seed : int
        Seed of the order in which nodes are visited.
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
        """Match units by their activations."""
        begin = time.perf_counter()
        return moved(nodes, self.moves(nodes), None, begin)

    def moves(self, nodes: Nodes) -> list[Permutation]:
        """Each node's map into the basis."""
        features = nodes.features(nodes.programs())
        if not self.universe:
            return [match_to(nodes.spec, features[nodes.basis], each) for each in features]
        share = nodes.weights.tolist()
        ordered = [features[index] for index in nodes.order]
        found = match_all(nodes.spec, ordered, [share[index] for index in nodes.order])
        perms = dict(zip(nodes.order, found, strict=True))
        return [permutation.between(perms[nodes.basis], perms[index]) for index in range(len(features))]


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
    if method not in list(METHODS):  # a list, because the given value may be unhashable
        raise ConfigError(f"method is {method!r}, expected one of {', '.join(map(repr, METHODS))}")
    return METHODS[method]
