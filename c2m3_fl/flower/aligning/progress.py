"""What the log says while a match is under way: every step for those who debug, and a sign of life for all."""

from __future__ import annotations

import time
from collections.abc import Callable
from logging import DEBUG, INFO
from math import isfinite

from flwr.supercore import log

from c2m3_fl.core.estimate import Estimate
from c2m3_fl.core.result import Step

_SILENCE = 5.0  # seconds between two lines at INFO, and before the first: most matches are over by then


class MatchLog:
    """A callback that logs the steps of one match.

    Every step has a line at DEBUG. A match that takes longer than a few seconds also has a line at INFO every few
    seconds: nodes, pass, agreement, gap or gain, and about how long it will still take.

    Parameters
    ----------
    tolerance : float
        The tolerance of the match.
    clock : callable
        Seconds that pass.
    """

    def __init__(self, tolerance: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock, self._estimate = clock, Estimate(tolerance)
        self._began = self._spoke = clock()

    def __call__(self, step: Step) -> None:
        """Log a step."""
        self._estimate.add(step)
        kind = "reheating, step" if step.trial else "step"
        text = "\t> match: %s %d, agreement %.6g, %s, step size %.2f, %.0f %% of units moved"
        log(DEBUG, text, kind, step.step, step.objective, measure(step), step.step_size, 100 * step.share_moved)
        now = self._clock()
        if now - self._spoke < _SILENCE:
            return
        self._spoke = now
        rest = self._estimate.rest(now - self._began)
        left = f", about {rest:.0f} s to go" if isfinite(rest) else ""
        text = "\t> matching %d nodes for %.0f s: %s %d, agreement %.6g, %s%s"
        kind = "reheating, pass" if step.trial else "pass"
        log(INFO, text, step.nodes, now - self._began, kind, step.step, step.objective, measure(step), left)


def measure(step: Step) -> str:
    """The gap of a Frank-Wolfe step, the gain of a sweep or a reheating."""
    return f"gain {step.gain:.1e}" if step.gap is None else f"gap {step.gap:.1e}"
