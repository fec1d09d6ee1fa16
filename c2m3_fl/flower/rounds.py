"""One round on state dicts, from checked replies to the wrapped strategy's aggregate: data in, data out.

The current and the legacy strategy are two dialects of this. The wrapped strategy is the one callable.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from logging import ERROR, WARNING
from operator import and_
from time import perf_counter
from typing import Any, Generic, TypeVar

from flwr.supercore import log

from c2m3_fl.core.outliers import find_outliers
from c2m3_fl.core.spec import Params
from c2m3_fl.errors import ParamsError
from c2m3_fl.flower.aligning.aligned_replies import AlignedReplies, Narrow
from c2m3_fl.flower.aligning.aligner import Aligner
from c2m3_fl.flower.arriving.ahead import Ahead
from c2m3_fl.flower.incoming.replies import Reply, Sorted, report_dropped
from c2m3_fl.flower.incoming.sybils import find_copies, votes_by_distance
from c2m3_fl.flower.metrics import Numbers, aligned_numbers, failure, report_alignment
from c2m3_fl.flower.options import Options
from c2m3_fl.flower.rewind import Before
from c2m3_fl.flower.round_match import RoundMatch
from c2m3_fl.flower.widths.rounds import RoundWidths
from c2m3_fl.flower.wrapped import ignores_weights, remembers_squares, restore_types

Metrics = TypeVar("Metrics")
_LARGEST_NORM = 3.0  # medians, as for outliers: see `find_outliers`
_COPY = "coincides with another reply once both are aligned, and not before: the two count once"

Aggregate = Callable[[AlignedReplies], tuple[Params | None, Metrics | None]]


@dataclass(frozen=True, eq=False)
class RoundStart:
    """What a round starts from, besides the replies.

    Attributes
    ----------
    aligner : Aligner
        Aligns; its memory of the nodes is updated.
    options : Options
        Of the strategy.
    sent : mapping of str to Tensor
        The model that was sent out, in its own element types.
    strategy : Strategy
        The wrapped strategy, which is taken back to its state of now where its result is unusable.
    plain : bool
        Whether to aggregate the replies without alignment as well: one more candidate for a guard.
    accept : callable
        From the aggregate and the aligned replies to what becomes of it; `ParamsError` where it is not to be used.
    sound : callable
        Which of the replies work by themselves: asked where the aggregate is not to be used.
    widths : RoundWidths, optional
        Where clients may have other widths than the model's.
    ahead : Ahead, optional
        What was computed before all replies had come.
    """

    aligner: Aligner
    options: Options
    sent: Params
    strategy: object
    plain: bool = False
    accept: Callable[[Params, AlignedReplies], Params] = lambda merged, aligned: merged
    sound: Callable[[Sequence[Params]], Sequence[bool]] = lambda replies: [True] * len(replies)
    widths: RoundWidths | None = None
    ahead: Ahead | None = None


@dataclass(frozen=True, eq=False)
class Outcome(Generic[Metrics]):
    """How a round ended.

    Attributes
    ----------
    params : mapping of str to Tensor, optional
        The wrapped strategy's aggregate; None where the previous model stays.
    metrics : optional
        Those of the wrapped strategy.
    numbers : Numbers
        Ours.
    aligned : AlignedReplies, optional
        What was aggregated; None where nothing was.
    plain : mapping of str to Tensor, optional
        The aggregate without alignment, where it was asked for.
    reason, level : str, int
        Why the previous model stays, and how loudly to say so.
    """

    params: Params | None
    metrics: Metrics | None
    numbers: Numbers
    aligned: AlignedReplies | None = None
    plain: Params | None = None
    reason: str = ""
    level: int = WARNING


def run_round(start: RoundStart, found: Sorted[Any], aggregate: Aggregate[Metrics]) -> Outcome[Metrics]:
    """One round, from checked replies to the aggregate; a failure ends the round, not the run.

    Parameters
    ----------
    start : RoundStart
        What the round starts from.
    found : Sorted
        The usable replies and the dropped ones.
    aggregate : callable
        From the aligned replies to the wrapped strategy's arrays and metrics.
    """
    report_dropped(found.dropped)
    memory, counts = start.aligner.memory, _counts(found)
    if len(found.replies) < start.options.min_replies:
        return Outcome(None, None, counts, reason=f"{len(found.replies)} valid replies are too few")
    noted = memory.noted()
    try:
        aligned = _align(start, found.replies)
    except Exception as error:  # a failed round must not end the run
        return Outcome(None, None, counts, reason=failure("the alignment", error), level=ERROR)
    outcome = _aggregated(start, aligned, aggregate)
    used = aligned if outcome.aligned is None else outcome.aligned
    memory.take_back([each.node for each in used.dropped], noted)
    counts |= {**used.numbers, "c2m3-dropped": len(found.dropped) + len(used.dropped)}
    return replace(outcome, numbers={**counts, **outcome.numbers})


def _counts(found: Sorted[Any]) -> Numbers:
    return {
        "c2m3-replies": len(found.replies),
        "c2m3-dropped": len(found.dropped),
        "c2m3-check-seconds": found.seconds,
    }


def _align(start: RoundStart, replies: Sequence[Reply[Any]]) -> AlignedReplies:
    """Bring the replies into one basis, and name those that do not fit the others."""
    nodes = [reply.node for reply in replies]
    equally = ignores_weights(start.strategy)
    weights = [1.0 if equally else reply.weight for reply in replies]
    seen = None if start.ahead is None else start.ahead.seen(replies, weights)
    match = start.aligner.align(nodes, [reply.params for reply in replies], weights, start.sent, seen)
    narrow: tuple[Narrow | None, ...] = (None,) * len(nodes)
    if start.widths is not None:
        match, narrow = start.widths.settle(nodes, match, weights)
    if start.widths is not None and any(narrow):
        odd = start.widths.outliers(match, narrow)
    else:
        odd = find_outliers(start.aligner.spec, match.params, match.sent) if match.odd is None else match.odd
    numbers = aligned_numbers(nodes, match, odd)
    if start.options.diagnostics:
        numbers |= {f"c2m3-agreement/{name}": layer.tolist() for name, layer in match.consensus.layers.items()}
    report_alignment(nodes, match, odd)
    aligned = AlignedReplies(
        tuple(replies),
        tuple(weights),
        tuple(match.params),
        tuple(match.moves),
        tuple(match.share_moved),
        (),
        numbers,
        tuple(index not in odd for index in range(len(replies))),
        narrow,
    )
    if start.options.outliers == "drop":
        aligned = aligned.only(aligned.fits)
    elif remembers_squares(start.strategy):
        aligned = aligned.only(_of_usual_norm(match))
    if not votes_by_distance(start.strategy):
        return aligned
    copies = find_copies([reply.params for reply in aligned.replies], aligned.params, match.sent)
    return aligned.only([index not in copies for index in range(len(aligned.replies))], _COPY)


def _of_usual_norm(match: RoundMatch) -> list[bool]:
    """Which replies are not far larger than most; all of them where there is no majority."""
    norms = match.consensus.norms
    usual: list[bool] = (norms <= _LARGEST_NORM * norms.median()).tolist()
    return usual if len(norms) > 2 else [True] * len(norms)


def _aggregated(start: RoundStart, aligned: AlignedReplies, aggregate: Aggregate[Metrics]) -> Outcome[Metrics]:
    """Let the wrapped strategy aggregate; where it fails, once more without the replies that do not fit the others."""
    report_dropped(aligned.dropped)
    least = start.options.min_replies
    if len(aligned.replies) < least:
        return Outcome(None, None, {}, reason=f"{len(aligned.replies)} replies that fit each other are too few")
    before, started = Before(start.strategy), perf_counter()
    whole = not any(aligned.narrow)  # entries that a narrower reply lacks have no plain mean
    plain = _aggregate_plain(aligned, aggregate, before) if start.plain and whole else None
    found, fitting = _attempt(start, aligned, aggregate, before), aligned
    if found.reason:
        fitting = aligned.only(list(map(and_, aligned.fits, start.sound([reply.params for reply in aligned.replies]))))
    if found.reason and least <= len(fitting.replies) < len(aligned.replies):
        log(found.level, "\t> %s: once more without the replies that do not fit the others", found.reason)
        report_dropped(fitting.dropped[len(aligned.dropped) :])
        found, plain = _attempt(start, fitting, aggregate, before), None
    if found.params is None:
        return replace(found, reason=found.reason or "the wrapped strategy returned no arrays")
    return replace(found, numbers={"c2m3-aggregate-seconds": perf_counter() - started}, plain=plain)


def _attempt(
    start: RoundStart, aligned: AlignedReplies, aggregate: Aggregate[Metrics], before: Before
) -> Outcome[Metrics]:
    """The wrapped strategy's result; where that or the state that it leaves is unusable, its state of before."""
    metrics: Metrics | None = None
    try:
        if start.widths is not None:
            aligned = start.widths.filled(aligned, start.sent, start.strategy)
        arrays, metrics = aggregate(aligned)
        replies = aligned.params
        merged = None if arrays is None else start.accept(restore_types(arrays, replies), aligned)
        before.check()
    except ParamsError as error:
        before.rewind()
        return Outcome(None, metrics, {}, reason=str(error))
    except Exception as error:  # say, a trimmed mean that trims more than there is
        before.rewind()
        reason = failure(f"the wrapped strategy {type(start.strategy).__name__}", error)
        return Outcome(None, metrics, {}, reason=reason, level=ERROR)
    return Outcome(merged, metrics, {}, aligned)


def _aggregate_plain(aligned: AlignedReplies, aggregate: Aggregate[Metrics], before: Before) -> Params | None:
    """The aggregate of the replies as they came; leaves no trace in the wrapped strategy."""
    raw = [reply.params for reply in aligned.replies]
    try:
        arrays, _ = aggregate(replace(aligned, params=tuple(raw)))
        return None if arrays is None else restore_types(arrays, raw)
    except Exception as error:  # it will raise again on the aligned replies, where that is dealt with
        log(WARNING, "\t> no plain result to compare with: %s", error)
        return None
    finally:
        before.rewind()
