"""How far a match has come, estimated from what its callback is told."""

from __future__ import annotations

from math import log

from c2m3_fl.core.block_ascent import TAIL
from c2m3_fl.core.result import Step
from c2m3_fl.core.search import expected_reheating


class Estimate:
    """The share of a match that is done, step by step.

    Gains shrink about geometrically until they are too small to go on for, so the logarithm of the smallest gain so far
    says how much of the ascent is done. Reheatings, where the budget allows any, take about .8 of the first ascent's
    counted work each.

    Parameters
    ----------
    tolerance : float
        The tolerance of the match.
    """

    def __init__(self, tolerance: float = 1e-4) -> None:
        self._target = TAIL * tolerance
        self._first = self._smallest = 0.0
        self._ascent, self._tried = 0, False
        self.done = 0.0

    def add(self, step: Step) -> float:
        """Take in a step; the share of the match that is done, in [0, 1], which never falls."""
        more = expected_reheating(step.nodes)
        self._tried |= step.trial
        if self._tried:
            share = 1 + min(more, step.work / max(self._ascent, 1) - 1)
        else:
            share, self._ascent = self._share(step), step.work
        self.done = min(max(self.done, share / (1 + more)), 1.0)
        return self.done

    def _share(self, step: Step) -> float:
        """Share of the first ascent that is done."""
        gain = max(step.gain, self._target)
        self._smallest = min(self._smallest, gain)
        if step.step == 1:
            self._first = self._smallest = gain
        rise = log(self._first / self._target)
        return log(self._first / self._smallest) / rise if rise > 0 else 1.0

    def rest(self, seconds: float) -> float:
        """Estimated seconds to go when it took so many to come here; infinite where nothing is known yet."""
        return seconds * (1 - self.done) / self.done if self.done > 0 else float("inf")
