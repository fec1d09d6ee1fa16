"""Temperature scaling from sums: negative log-likelihood and calibration error of class scores at given temperatures.

Guo et al., "On calibration of modern neural networks" (ICML 2017): dividing all scores by one temperature changes
no prediction, and the temperature of least negative log-likelihood on held-out examples calibrates them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from c2m3_fl.core.state_dicts import digest
from c2m3_fl.errors import ParamsError
from c2m3_fl.merging.recalibrate.outliers import capped
from c2m3_fl.merging.reports import ScoreQuality

BINS = 15  # of confidence, equally wide, as in Guo et al.
_FAR = 10.0  # larger mean negative log-likelihoods of clients are clipped to this multiple of their median
_ROUNDING = 1e-6  # relative, of sums over a client's examples


@dataclass(frozen=True)
class Reliability:
    """Sums over labelled examples, at every temperature; a monoid under `combine`.

    Attributes
    ----------
    nll : Tensor of float64, shape (temperatures,)
        Sum of the negative log-likelihoods.
    members : Tensor of float64, shape (temperatures, BINS)
        Number of examples per bin of confidence, the largest probability.
    confidence, correct : Tensor of float64, shape (temperatures, BINS)
        Per bin the sum of the confidences, and the number of correct predictions.
    """

    nll: Tensor
    members: Tensor
    confidence: Tensor
    correct: Tensor

    @classmethod
    def of(cls, scores: Tensor, labels: Tensor, temperatures: Sequence[float]) -> Reliability:
        """Sums of scores (count, classes) and class indices (count,)."""
        columns = [_at(scores.double() / temperature, labels) for temperature in temperatures]
        return cls(*(torch.stack(parts) for parts in zip(*columns, strict=True)))

    @property
    def count(self) -> float:
        """Number of examples; whole unless they are weighted."""
        return float(self.members[0].sum())

    @property
    def ece(self) -> Tensor:
        """Expected calibration error at every temperature: mean over examples of |accuracy - confidence| of a bin."""
        return (self.correct - self.confidence).abs().sum(1) / self.count

    def combine(self, other: Reliability) -> Reliability:
        """Sums over both sets of examples."""
        return Reliability(
            self.nll + other.nll,
            self.members + other.members,
            self.confidence + other.confidence,
            self.correct + other.correct,
        )

    def scaled(self, factor: float) -> Reliability:
        """The sums of the same examples, each counted `factor` times."""
        return Reliability(*(factor * value for value in vars(self).values()))

    def check(self, temperatures: Sequence[float], classes: int) -> None:
        """Raise `ParamsError` unless these can be the sums of at least one example.

        Parameters
        ----------
        temperatures : sequence of float
            Temperatures of the sums. The negative log-likelihood is convex in 1 / temperature, and at 0 it is the
            logarithm of the number of classes.
        classes : int
            Number of classes.
        """
        if not all(bool(value.isfinite().all()) and bool((value >= 0).all()) for value in vars(self).values()):
            raise ParamsError("sums of scores are negative or not finite, expected non-negative numbers")
        counts = self.members.sum(1)
        if not float(counts[0]) >= 1 or bool((counts != counts[0]).any()):
            raise ParamsError(f"sums of scores are of {counts.tolist()[:3]} examples, expected one count of at least 1")
        largest = self.members * (1 + _ROUNDING)
        if bool((self.correct > largest).any()) or bool((self.confidence > largest).any()):
            raise ParamsError("sums of scores have more correct or confident examples than examples")
        curve = sorted((1 / temperature, float(nll)) for temperature, nll in zip(temperatures, self.nll, strict=True))
        curve = [(0.0, self.count * math.log(classes)), *curve]
        for (left, low), (here, nll), (right, high) in zip(curve, curve[1:], curve[2:], strict=False):
            share = (here - left) / (right - left)
            if nll > (low + share * (high - low)) * (1 + _ROUNDING) + _ROUNDING * self.count:
                raise ParamsError(f"sums of scores: the negative log-likelihood is not convex in 1/T at {here:.3g}")


def pool_reliability(parts: Sequence[Reliability], classes: int, *, equally: bool = False) -> Reliability:
    """Sums over all clients' examples, bitwise independent of the order of the clients.

    Parameters
    ----------
    parts : sequence of Reliability
        One per client, at the same temperatures. A client's mean negative log-likelihood counts at most ten times
        the clients' median at that temperature or, where that is less, as much as that of scores that know nothing;
        its number of examples counts at most ten times their median.
    classes : int
        Number of classes.
    equally : bool
        Whether every client counts the same, whatever its number of examples.
    """
    ordered = sorted(parts, key=lambda part: digest(vars(part)))
    counts = [part.count for part in ordered]
    means = torch.stack([part.nll / part.count for part in ordered])
    means = means.minimum((_FAR * means.median(0).values).clamp_min(math.log(classes)))
    weights = [1.0] * len(ordered) if equally else capped(counts)
    total: Reliability | None = None
    for part, count, mean, weight in zip(ordered, counts, means, weights, strict=True):
        plain = torch.equal(mean, part.nll / count) and weight == count
        share = part.scaled(weight / count)
        found = part if plain else Reliability(weight * mean, share.members, share.confidence, share.correct)
        total = found if total is None else total.combine(found)
    if total is None:
        raise ParamsError("sums of scores: got none, expected those of at least one client")
    return total


def quality(pooled: Reliability, temperatures: Sequence[float]) -> ScoreQuality:
    """Quality of the scores unchanged, and divided by the temperature of least negative log-likelihood.

    Parameters
    ----------
    pooled : Reliability
        Sums at these temperatures.
    temperatures : sequence of float
        One of them is 1.
    """
    nll, ece = pooled.nll / pooled.count, pooled.ece
    plain, best = list(temperatures).index(1.0), int(nll.argmin())
    return ScoreQuality(
        accuracy=float(pooled.correct[plain].sum()) / pooled.count,
        nll=float(nll[plain]),
        ece=float(ece[plain]),
        temperature=temperatures[best],
        nll_tempered=float(nll[best]),
        ece_tempered=float(ece[best]),
    )


def _at(scores: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The sums at one temperature."""
    logarithms = scores.log_softmax(1)
    nll = -logarithms.gather(1, labels[:, None].long()).sum()
    confidence, predicted = logarithms.exp().max(1)
    place = (confidence * BINS).long().clamp(0, BINS - 1)
    empty = torch.zeros(BINS, dtype=torch.float64, device=scores.device)
    return (
        nll,
        empty.index_add(0, place, torch.ones_like(confidence)),
        empty.index_add(0, place, confidence),
        empty.index_add(0, place, (predicted == labels).double()),
    )
