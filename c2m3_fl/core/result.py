"""What a search tells on the way, how it is limited, and what it returns."""

from __future__ import annotations

import math
import time
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
        Number of the step, from 1; the sweeps of the polish and the reheatings that gained count on.
    objective : float
        The agreement after it.
    gap : float or None
        The relative duality gap before a Frank-Wolfe step; None for a sweep of the polish and for a reheating.
    gain : float
        How much the step raised the agreement, in the unit of the gap; not negative.
    step_size : float
        How far the step went towards the vertex, in [0, 1]; sweeps go all the way.
    share_moved : float
        Share of all units that the vertex sends elsewhere than where most of their mass was before.
    nodes : int
        Number of nodes that are matched.
    work : int
        Work since the start of the match: multiplications of the products and bounds of the assignment problems.
    trial : bool
        Whether the step belongs to a reheating under way, whose end is kept only if it is higher. Trial steps are
        numbered by themselves and are not among the match's objectives.
    """

    step: int
    objective: float
    gap: float | None
    gain: float
    step_size: float
    share_moved: float
    nodes: int = 0
    work: int = 0
    trial: bool = False


Callback = Callable[[Step], None]


@dataclass(frozen=True)
class Limits:
    """When a search ends; see `match`. `deadline` is a time of `time.monotonic`."""

    max_steps: int
    tolerance: float
    polish: bool
    together: int | None = 1
    deadline: float = math.inf

    @property
    def over(self) -> bool:
        """Whether the time is up."""
        return self.deadline < math.inf and time.monotonic() >= self.deadline


@dataclass(frozen=True)
class Course:
    """The course of a Frank-Wolfe ascent.

    Attributes
    ----------
    objectives : tuple of float
        The agreement at the start and after every pass.
    gap : float
        Relative duality gap, block by block, as measured during the last pass.
    still : bool
        Whether the last pass left every block where it stands.
    """

    objectives: tuple[float, ...]
    gap: float
    still: bool


@dataclass(frozen=True)
class Found:
    """What a search has found.

    Attributes
    ----------
    permutations : tuple of Permutation
        One per node of the problem, in its order.
    objectives : tuple of float
        The course of the agreement.
    gain : float
        What the last step, sweep or reheating gained, relative to the problem's unit.
    steps : int
        Number of Frank-Wolfe steps.
    work : int
        Products and assignments, counted; see `Step`.
    """

    permutations: tuple[Permutation, ...]
    objectives: tuple[float, ...]
    gain: float
    steps: int
    work: int


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
        Relative Frank-Wolfe duality gap at the permutations: what their oracle's answers would gain if the agreement
        were linear, relative to ``sum_{i<j} w_i w_j |W_i| |W_j|``. It is zero up to rounding where no node can improve
        any one family of groups, unless some tensor carries a family on two axes: there a gap may remain.
    gain : float
        What the last step, sweep or reheating gained, in the unit of the gap.
    converged : bool
        Whether the gap is at most the tolerance.
    steps : int
        Number of Frank-Wolfe steps, not counting those after a reheating.
    order : tuple of int
        The nodes in an order that depends on their content alone, for sums that must not depend on the given one.
    timed_out : bool
        Whether `max_seconds` ended the search: the result then depends on the machine, and the gap, which was not
        measured, is infinite.
    """

    permutations: tuple[Permutation, ...]
    objectives: tuple[float, ...]
    gap: float
    gain: float
    converged: bool
    steps: int
    order: tuple[int, ...]
    timed_out: bool = False

    def __str__(self) -> str:
        start, end = self.objectives[0], self.objectives[-1]
        moved = ", ".join(f"{permutation.share_moved(perm):.0%}" for perm in self.permutations)
        return (
            f"{len(self.permutations)} nodes: agreement {start:.6g} before, {end:.6g} after {self.steps} steps, "
            f"gap {self.gap:.1e}{'' if self.converged else ' (not converged)'}, last gain {self.gain:.1e}; "
            f"units moved {moved}"
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
