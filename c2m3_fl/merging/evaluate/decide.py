"""Decide by paired losses whether another network replaces the aggregate; no single voter can force a replacement."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from c2m3_fl.core.spec import Params
from c2m3_fl.errors import CalibrationError
from c2m3_fl.merging.recalibrate.head.last_layer import class_labels
from c2m3_fl.merging.recalibrate.outliers import capped
from c2m3_fl.network.calibration import Batch
from c2m3_fl.network.program import Program, Walk

_FAR = 10.0  # larger gains are clipped to this multiple of the gains' median size
# Share of the aggregate's loss that a gain must exceed. Digits, seeds 10 and 11, which no table shows: where clients
# judge with 13 images each, 4 of 11 candidates that gain less have a larger loss on test images than the aggregate, and
# the median of the others gains .3 % there; where they judge with 52, all 26 gain there, 2 % on average: given up.
_MARGIN = 0.01
_DEVIATIONS = 2.0  # standard errors by which a gain on labelled data must be positive
_LIKELIHOOD = "negative log-likelihood"
_LEAST = 2  # number of voters; with two, each alone must have a gain


@dataclass(frozen=True)
class Vote:
    """Losses of the candidates at one voter.

    Attributes
    ----------
    losses : mapping of str to float
        By candidate; smaller is better, and infinite is worse than any number. Candidates that it did not answer for
        are missing.
    weight : float
        Positive and finite.
    """

    losses: Mapping[str, float]
    weight: float


@dataclass(frozen=True)
class DeploymentCandidate:
    """One of the networks that were compared by their losses.

    Attributes
    ----------
    name : str
        Short name.
    loss : float, optional
        Weighted mean over the voters for which it is finite; None if there are none.
    gain : float, optional
        Weighted mean of aggregate's loss - own loss over the voters that answered for both; None for the aggregate.
    robust_gain : float, optional
        The smallest such mean when any one voter is left out; None with fewer than two.
    voters : int
        Number of voters that answered for both; with labelled data, number of examples.
    """

    name: str
    loss: float | None
    gain: float | None
    robust_gain: float | None
    voters: int


@dataclass(frozen=True)
class DeploymentDecision:
    """Which network a federation deploys, with the losses that decided it.

    Which recalibration a merge applies is decided by other evidence: see `merging.reports.RecalibrationDecision`.

    Attributes
    ----------
    chosen : str
        Short name of the candidate.
    reason : str
        Reason for the choice.
    key : str
        The metric that was compared; "" if nothing was.
    candidates : tuple of DeploymentCandidate
        The aggregate first.
    judged : bool
        Whether anything was compared; otherwise the aggregate is chosen.
    """

    chosen: str
    reason: str
    key: str
    candidates: tuple[DeploymentCandidate, ...]
    judged: bool


def decide(names: Sequence[str], votes: Sequence[Vote], key: str) -> DeploymentDecision:
    """Replace the aggregate by the candidate of largest robust gain, if that is more than a hundredth of its loss.

    A candidate's pooled paired gain must stay that large when any one voter is left out. One dishonest voter can
    therefore veto a candidate but not install it: the pooled gain of the others alone must be large enough. With two
    voters, each must have a gain. With one voter the aggregate is kept. What bounds gains and weights is computed
    without the voter that is left out, too.

    Parameters
    ----------
    names : sequence of str
        Candidates, the aggregate first.
    votes : sequence of Vote
        A vote counts in a comparison if it has both losses and one of them is finite. Gains count up to ten times the
        median size of the finite ones (where there is none, all count the same), weights up to ten times their median.
    key : str
        Name of the metric, for the reason.
    """
    found = tuple(_compared(name, names[0], votes) for name in names)
    gains = {each.name: each.robust_gain for each in found if each.robust_gain is not None}
    aggregate = names[0]
    if not gains:
        most = max((each.voters for each in found[1:]), default=0)
        reason = f"{most} voters answered for {aggregate!r} and another candidate, expected at least {_LEAST}"
        return DeploymentDecision(aggregate, reason, key, found, judged=False)
    best = max(gains, key=gains.__getitem__)
    least = _MARGIN * _robust_size(votes, aggregate)
    if not gains[best] > least:
        reason = f"no candidate lowers {key!r} of {aggregate!r} by more than {least:.3g} whichever voter is left out"
        return DeploymentDecision(aggregate, f"{reason} (best: {best!r}, {gains[best]:.3g})", key, found, judged=True)
    reason = f"it lowers {key!r} of {aggregate!r} by at least {gains[best]:.3g} whichever voter is left out"
    return DeploymentDecision(best, reason, key, found, judged=True)


def _compared(name: str, aggregate: str, votes: Sequence[Vote]) -> DeploymentCandidate:
    heard = [vote for vote in votes if name in vote.losses]
    told = sorted((vote.losses[name], vote.weight) for vote in heard if math.isfinite(vote.losses[name]))
    loss = _mean([each for each, _ in told], capped([weight for _, weight in told])) if told else None
    if name == aggregate:
        return DeploymentCandidate(name, loss, None, None, len(heard))
    pairs = sorted(
        (vote.losses[aggregate] - vote.losses[name], vote.weight) for vote in heard if aggregate in vote.losses
    )
    pairs = [(gain, weight) for gain, weight in pairs if not math.isnan(gain)]
    if not pairs:
        return DeploymentCandidate(name, loss, None, None, 0)
    robust = min(map(_pooled, _without_one(pairs))) if len(pairs) >= _LEAST else None
    return DeploymentCandidate(name, loss, _pooled(pairs), robust, len(pairs))


def _robust_size(votes: Sequence[Vote], name: str) -> float:
    """The largest size of a candidate's mean loss when any one voter is left out, so that none can make it small."""
    told = sorted((vote.losses[name], vote.weight) for vote in votes if math.isfinite(vote.losses.get(name, math.inf)))
    rests = _without_one(told)
    means = [_mean([loss for loss, _ in rest], capped([weight for _, weight in rest])) for rest in rests]
    return max(map(abs, means), default=0.0)


def _without_one(pairs: Sequence[tuple[float, float]]) -> list[list[tuple[float, float]]]:
    """The values and weights without each one in turn; nothing of fewer than two."""
    rests = [[*pairs[:left_out], *pairs[left_out + 1 :]] for left_out in range(len(pairs))]
    return [rest for rest in rests if rest]


def _pooled(pairs: Sequence[tuple[float, float]]) -> float:
    """Weighted mean gain, of gains and weights that are bounded by these alone."""
    return _mean(_clipped([gain for gain, _ in pairs]), capped([weight for _, weight in pairs]))


def _clipped(gains: Sequence[float]) -> list[float]:
    sizes = sorted(abs(gain) for gain in gains if gain and math.isfinite(gain))
    bound = _FAR * sizes[(len(sizes) - 1) // 2] if sizes else 1.0  # the lower median of an even number
    return [max(-bound, min(bound, gain)) for gain in gains]


def _mean(values: Sequence[float], weights: Sequence[float]) -> float:
    total = math.fsum(weight / max(weights) for weight in weights)
    shares = [weight / max(weights) / total for weight in weights]
    return sum(share * value for share, value in zip(shares, values, strict=True))


def judge_by_labels(
    programs: Sequence[Program], candidates: Mapping[str, Params], batches: Sequence[Batch]
) -> DeploymentDecision:
    """Decide by labelled data on the server to which no candidate was fitted (see `split_batches`).

    The aggregate is replaced by the candidate of largest robust gain in negative log-likelihood, if that is positive:
    the mean over the examples less two standard errors.

    Parameters
    ----------
    programs : sequence of Program
        The traced network, one per batch.
    candidates : mapping of str to Params
        State dicts by name, the aggregate first.
    batches : sequence of Batch
        With labels.

    Raises
    ------
    CalibrationError
        When labels are missing or out of range, or the outputs are not class scores.
    """
    names = list(candidates)
    losses = {name: _likelihoods(programs, params, batches) for name, params in candidates.items()}
    aggregate = losses[names[0]]
    found, count = [DeploymentCandidate(names[0], float(aggregate.mean()), None, None, len(aggregate))], len(aggregate)
    for name in names[1:]:
        gains = aggregate - losses[name]
        robust = float(gains.mean() - _DEVIATIONS * gains.std() / count**0.5) if count > 1 else None
        found.append(DeploymentCandidate(name, float(losses[name].mean()), float(gains.mean()), robust, count))
    sure = {each.name: each.robust_gain for each in found if each.robust_gain is not None and each.robust_gain > 0}
    if not sure:
        reason = f"no candidate lowers the loss of {names[0]!r} on {count} labelled examples beyond chance"
        return DeploymentDecision(names[0], reason, _LIKELIHOOD, tuple(found), judged=count > 1)
    best = max(sure, key=sure.__getitem__)
    reason = f"it lowers the loss of {names[0]!r} on {count} labelled examples by at least {sure[best]:.3g}"
    return DeploymentDecision(best, reason, _LIKELIHOOD, tuple(found), judged=True)


def _likelihoods(programs: Sequence[Program], params: Params, batches: Sequence[Batch]) -> Tensor:
    """Negative log-likelihood of every example's label."""
    found = []
    with torch.no_grad():
        for program, batch in zip(programs, batches, strict=True):
            outputs = Walk(program, params, batch).finish()
            scores = outputs[0] if isinstance(outputs, (tuple, list)) and len(outputs) == 1 else outputs
            if not isinstance(scores, Tensor) or scores.ndim != 2 or scores.shape[1] < 2:
                raise CalibrationError("the network's output is not one tensor of class scores, (batch, classes)")
            labels = class_labels(batch, scores)
            found.append(-scores.double().log_softmax(1).gather(1, labels[:, None])[:, 0])
    return torch.cat(found)
