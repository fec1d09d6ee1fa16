"""One round on state dicts, from checked replies to the wrapped strategy's aggregate: data in, data out.

The current and the legacy strategy are two dialects of this. The wrapped strategy is the one callable.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from logging import ERROR, WARNING
from time import perf_counter
from typing import Any, Generic, TypeVar

from flwr.supercore import log

from c2m3_fl.core.permutation import Permutation
from c2m3_fl.core.spec import Params
from c2m3_fl.errors import ParamsError
from c2m3_fl.flower.aligner import Aligner
from c2m3_fl.flower.metrics import Numbers, aligned_numbers, failure, report_alignment
from c2m3_fl.flower.options import Options
from c2m3_fl.flower.replies import Dropped, Reply, Sorted, report_dropped
from c2m3_fl.flower.wrapped import ignores_weights, restore_types, rewinding

Metrics = TypeVar("Metrics")


@dataclass(frozen=True, eq=False)
class AlignedReplies:
    """The replies that go to the wrapped strategy, in one basis.

    Attributes
    ----------
    replies : tuple of Reply
        As they came.
    weights : tuple of float
        What they count in a recalibration: the claimed weights, or all the same under strategies that ignore those.
    params : tuple of mappings of str to Tensor
        Their aligned params; the reply's own where nothing moved.
    moves : tuple of Permutation
        Each reply's map into the basis.
    shares : tuple of float
        Share of its units that each map moves.
    dropped : tuple of Dropped
        Outliers that were left out.
    numbers : Numbers
        The match in numbers.
    """

    replies: tuple[Reply[Any], ...]
    weights: tuple[float, ...]
    params: tuple[Params, ...]
    moves: tuple[Permutation, ...]
    shares: tuple[float, ...]
    dropped: tuple[Dropped, ...]
    numbers: Numbers

    @property
    def nodes(self) -> list[int]:
        """Who replied."""
        return [reply.node for reply in self.replies]


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
    """

    aligner: Aligner
    options: Options
    sent: Params
    strategy: object
    plain: bool = False


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
    counts: Numbers = {"c2m3-replies": len(found.replies), "c2m3-dropped": len(found.dropped)}
    counts["c2m3-check-seconds"] = found.seconds
    if len(found.replies) < start.options.min_replies:
        return Outcome(None, None, counts, reason=f"{len(found.replies)} valid replies are too few")
    try:
        aligned = _align(start, found.replies)
    except Exception as error:  # a failed round must not end the run
        return Outcome(None, None, counts, reason=failure("the alignment", error), level=ERROR)
    report_dropped(aligned.dropped)
    counts = {**counts, **aligned.numbers, "c2m3-dropped": len(found.dropped) + len(aligned.dropped)}
    if len(aligned.replies) < start.options.min_replies:
        return Outcome(None, None, counts, reason=f"{len(aligned.replies)} replies that fit each other are too few")
    return _aggregated(start, aligned, aggregate, counts)


def _align(start: RoundStart, replies: Sequence[Reply[Any]]) -> AlignedReplies:
    """Bring the replies into one basis, and name those that do not fit the others."""
    nodes = [reply.node for reply in replies]
    equally = ignores_weights(start.strategy)
    weights = [1.0 if equally else reply.weight for reply in replies]
    match = start.aligner.align(nodes, [reply.params for reply in replies], weights, start.sent)
    odd = match.consensus.outliers()
    numbers = aligned_numbers(nodes, match, odd)
    if start.options.diagnostics:
        numbers |= {f"c2m3-agreement/{name}": layer.tolist() for name, layer in match.consensus.layers.items()}
    report_alignment(nodes, match, odd)
    left_out = set(odd) if start.options.outliers == "drop" else set()
    kept = [index for index in range(len(replies)) if index not in left_out]
    shares = match.share_moved
    return AlignedReplies(
        tuple(replies[index] for index in kept),
        tuple(weights[index] for index in kept),
        tuple(match.params[index] for index in kept),
        tuple(match.moves[index] for index in kept),
        tuple(shares[index] for index in kept),
        tuple(Dropped(nodes[index], "does not fit the other replies") for index in sorted(left_out)),
        numbers,
    )


def _aggregated(
    start: RoundStart, aligned: AlignedReplies, aggregate: Aggregate[Metrics], counts: Numbers
) -> Outcome[Metrics]:
    """Let the wrapped strategy aggregate; where its result is unusable, take it back to where it was."""
    rewind, started = rewinding(start.strategy), perf_counter()
    plain = _aggregate_plain(aligned, aggregate, rewind) if start.plain else None
    metrics: Metrics | None = None
    try:
        arrays, metrics = aggregate(aligned)
        merged = None if arrays is None else restore_types(arrays, [reply.params for reply in aligned.replies])
    except ParamsError as error:
        rewind()
        return Outcome(None, metrics, counts, reason=str(error))
    except Exception as error:  # say, a trimmed mean that trims more than there is
        rewind()
        reason = failure(f"the wrapped strategy {type(start.strategy).__name__}", error)
        return Outcome(None, metrics, counts, reason=reason, level=ERROR)
    if merged is None:
        return Outcome(None, metrics, counts, reason="the wrapped strategy returned no arrays")
    counts["c2m3-aggregate-seconds"] = perf_counter() - started
    return Outcome(merged, metrics, counts, aligned, plain)


def _aggregate_plain(
    aligned: AlignedReplies, aggregate: Aggregate[Metrics], rewind: Callable[[], None]
) -> Params | None:
    """The aggregate of the replies as they came; leaves no trace in the wrapped strategy."""
    raw = [reply.params for reply in aligned.replies]
    try:
        arrays, _ = aggregate(replace(aligned, params=tuple(raw)))
        return None if arrays is None else restore_types(arrays, raw)
    except Exception as error:  # it will raise again on the aligned replies, where that is dealt with
        log(WARNING, "\t> no plain result to compare with: %s", error)
        return None
    finally:
        rewind()
