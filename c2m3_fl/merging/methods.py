"""Ways to bring nodes into one basis before they are averaged, behind one interface."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from c2m3_fl.core import permutation
from c2m3_fl.core.frank_wolfe import Match, match
from c2m3_fl.core.permutation import Permutation
from c2m3_fl.core.spec import Params, PermutationSpec
from c2m3_fl.core.starts import Start
from c2m3_fl.errors import ConfigError


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
    """

    spec: PermutationSpec
    params: tuple[Params, ...]
    weights: Tensor
    order: tuple[int, ...]
    basis: int


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
    """

    params: tuple[Params, ...]
    moves: tuple[Permutation, ...] | None
    match: Match | None
    seconds: float


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
    """

    start: Start = "identity"
    max_steps: int = 100
    tolerance: float = 1e-4

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
        )
        moves = [found.between(nodes.basis, index) for index in range(len(nodes.params))]
        return moved(nodes, moves, found, begin)


def moved(nodes: Nodes, moves: Sequence[Permutation], match: Match | None, begin: float) -> Alignment:
    """Apply each node's map into the basis."""
    pairs = zip(moves, nodes.params, strict=True)
    params = tuple(permutation.apply(nodes.spec, move, node) for move, node in pairs)
    return Alignment(params, tuple(moves), match, time.perf_counter() - begin)


METHODS: dict[str, Method] = {"mean": Mean(), "c2m3": CycleConsistent()}


def resolve_method(method: Method | str) -> Method:
    """Return the method of a short name.

    Raises
    ------
    ConfigError
        For an unknown name.

    Examples
    --------
    >>> resolve_method("mean")
    Mean()
    """
    if not isinstance(method, str):
        return method
    if method not in METHODS:
        raise ConfigError(f"method is {method!r}, expected one of {', '.join(map(repr, METHODS))}")
    return METHODS[method]
