"""What aligning the replies of a round gives."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from c2m3_fl.core import permutation
from c2m3_fl.core.basis import Consensus
from c2m3_fl.core.permutation import Permutation
from c2m3_fl.core.spec import Params


@dataclass(frozen=True, eq=False)
class RoundMatch:
    """The replies of a round in one basis.

    Attributes
    ----------
    params : tuple of mappings of str to Tensor
        The aligned replies; a reply that nothing moves is the very one that came in.
    moves : tuple of Permutation
        Each reply's map into the basis.
    sent : mapping of str to Tensor
        The model that was sent out, in the basis.
    consensus : Consensus
        How well each aligned reply agrees with the others.
    objectives : tuple of float
        Agreement before and after the match.
    gap : float
        Relative duality gap where the solver stopped; the largest one when replies are aligned separately.
    gain : float
        What the solver's last step, sweep or reheating gained; the largest one when replies are aligned separately.
    steps : int
        Steps of the solver.
    seconds : float
        Wall-clock time.
    on_cpu : bool
        Whether the accelerator ran out of memory and the CPU took over.
    timed_out : bool
        Whether the clock ended the search.
    odd : dict of int to str, optional
        The replies that do not fit the others, and why, where that is known already: see `find_outliers`.
    """

    params: tuple[Params, ...]
    moves: tuple[Permutation, ...]
    sent: Params
    consensus: Consensus
    objectives: tuple[float, float]
    gap: float
    gain: float
    steps: int
    seconds: float
    on_cpu: bool
    timed_out: bool = False
    odd: dict[int, str] | None = None

    @cached_property
    def share_moved(self) -> list[float]:
        """Share of units that each reply's map moves."""
        found = {id(move): permutation.share_moved(move) for move in {id(each): each for each in self.moves}.values()}
        return [found[id(move)] for move in self.moves]
