"""What a match returns, and what it tells on the way."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from c2m3_fl.core import permutation
from c2m3_fl.core.permutation import Permutation
from c2m3_fl.errors import ConfigError


@dataclass(frozen=True)
class Step:
    """What a callback is told after every step.

    Attributes
    ----------
    step : int
        Number of the step, from 1; the sweeps of the polish and the reheatings count on.
    objective : float
        The agreement after it.
    gap : float
        The relative duality gap before a step; what a sweep or a reheating has gained, by the same measure.
    step_size : float
        How far the step went towards the vertex, in [0, 1]; sweeps go all the way.
    share_moved : float
        Share of all units that the vertex sends elsewhere than where they were, for the most part, before.
    """

    step: int
    objective: float
    gap: float
    step_size: float
    share_moved: float


Callback = Callable[[Step], None]


@dataclass(frozen=True)
class Match:
    """The result of `match`.

    Attributes
    ----------
    permutations : tuple of Permutation
        Each node's map into the universe, in the order in which the nodes were given.
    objectives : tuple of float
        The agreement at the start, after every step, after every sweep of the polish, and after every reheating that
        gained; the last is that of the permutations.
    gap : float
        Relative duality gap as the last pass of Frank-Wolfe met it; after a polish what its last sweep over all blocks
        has gained, which is zero where no block can improve.
    converged : bool
        Whether the gap reached the tolerance within the allowed steps.
    steps : int
        Number of Frank-Wolfe steps, not counting those after a reheating.
    order : tuple of int
        The nodes in an order that depends on their content alone, for sums that must not depend on the given one.
    """

    permutations: tuple[Permutation, ...]
    objectives: tuple[float, ...]
    gap: float
    converged: bool
    steps: int
    order: tuple[int, ...]

    def __str__(self) -> str:
        start, end = self.objectives[0], self.objectives[-1]
        moved = ", ".join(f"{permutation.share_moved(perm):.0%}" for perm in self.permutations)
        return (
            f"{len(self.permutations)} nodes: agreement {start:.6g} before, {end:.6g} after {self.steps} steps, "
            f"gap {self.gap:.1e}{'' if self.converged else ' (not converged)'}; units moved {moved}"
        )

    def between(self, to: int, source: int) -> dict[str, Tensor]:
        """The map from node `source` to node `to`; around any cycle these maps compose to the identity.

        Raises
        ------
        ConfigError
            When there is no node of that number.
        """
        count = len(self.permutations)
        if not (0 <= to < count and 0 <= source < count):
            raise ConfigError(f"between({to}, {source}): the {count} nodes have the numbers 0 to {count - 1}")
        return permutation.between(self.permutations[to], self.permutations[source])
