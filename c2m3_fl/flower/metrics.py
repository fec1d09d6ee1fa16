"""A round's lines in the log and its numbers in the metrics."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from logging import DEBUG, ERROR, INFO, WARNING
from typing import TypeVar

from flwr.serverapp.strategy import Result
from flwr.supercore import log

from c2m3_fl.flower.incoming.client_text import shown
from c2m3_fl.flower.round_match import RoundMatch
from c2m3_fl.merging.reports import RecalibrationReport

Numbers = dict[str, float | int | list[float] | list[int]]
Value = TypeVar("Value")
_OURS = "c2m3-"  # how the names of this package's metrics begin
KEPT = _OURS + "kept-previous"  # whether a round left the global model as it was
EVALUATIONS_DROPPED = _OURS + "evaluations-dropped"
_DEPLOYED, _JUDGED = _OURS + "deployed/", _OURS + "judge-loss/"
_GUARDED = {"none": "the aggregate", "plain": "the aggregate without alignment"}  # a guard's names for them
_MAIN = (
    "replies",
    "dropped",
    "kept-previous",
    "objective-before",
    "objective-after",
    "share-moved",
    "repaired",
    "temperature",
    "fed-back",
)
_UNUSUAL = ("cast", "own-buffers", "not-averaged", "outliers", "timed-out", "on-cpu", "failed-candidates")


def without_ours(metrics: Mapping[str, Value]) -> dict[str, Value]:
    """Metrics that were made from what clients sent, without names that this package alone may set."""
    return {name: value for name, value in metrics.items() if not name.startswith(_OURS)}


def reported(numbers: Numbers, *, every: bool) -> Numbers:
    """The numbers of a round that its metrics hold, which Flower prints whole in every round; the others at DEBUG.

    Parameters
    ----------
    numbers : mapping
        All of them.
    every : bool
        Whether the metrics hold all. Otherwise they hold the main ones, counts of what is unusual that are not zero,
        the name of the model that was deployed, and, where clients judged, the losses of the candidates.
    """
    if every:
        return numbers
    log(DEBUG, "\t> numbers of the round: %s", numbers)
    main, unusual = ({_OURS + name for name in names} for names in (_MAIN, _UNUSUAL))
    return {
        name: value
        for name, value in numbers.items()
        if name in main or (value and (name in unusual or name.startswith((_DEPLOYED, _JUDGED))))
    }


def aligned_numbers(nodes: Sequence[int], alignment: RoundMatch, odd: Mapping[int, str]) -> Numbers:
    """The match in numbers, per round and per node."""
    moved = alignment.share_moved
    return {
        "c2m3-objective-before": alignment.objectives[0],
        "c2m3-objective-after": alignment.objectives[1],
        "c2m3-gap": alignment.gap,
        "c2m3-gain": alignment.gain,
        "c2m3-steps": alignment.steps,
        "c2m3-share-moved": sum(moved) / len(moved),
        "c2m3-match-seconds": alignment.seconds,
        "c2m3-on-cpu": int(alignment.on_cpu),
        "c2m3-timed-out": int(alignment.timed_out),
        "c2m3-nodes": list(nodes),
        "c2m3-node-moved": moved,
        "c2m3-node-agreement": alignment.consensus.cosines.tolist(),
        "c2m3-node-outlier": [int(index in odd) for index in range(len(nodes))],
        "c2m3-outliers": len(odd),
    }


def report_alignment(nodes: Sequence[int], alignment: RoundMatch, odd: Mapping[int, str]) -> None:
    """Log the match, and every node that does not fit the others."""
    before, after = alignment.objectives
    moved = alignment.share_moved
    log(
        INFO,
        "\t> C2M3: %d replies aligned in %.2fs: agreement %.6g -> %.6g, %.1f%% of units moved, "
        "duality gap %.1e and last gain %.1e after %d steps",
        len(nodes),
        alignment.seconds,
        before,
        after,
        100 * sum(moved) / len(moved),
        alignment.gap,
        alignment.gain,
        alignment.steps,
    )
    if alignment.timed_out:
        log(WARNING, "\t> max_seconds ended the match: this round cannot be reproduced")
    for index, reason in odd.items():
        log(WARNING, "\t> node %d does not fit the others: %s", nodes[index], reason)


def report_candidate(name: str, report: RecalibrationReport) -> Numbers:
    """Log how a candidate was made and, where a guard chose, on what evidence; the evidence in numbers."""
    decision = report.decision
    if decision is None:
        log(INFO, "\t> candidate %r: %s", name, report.method)
        return {}
    reason = decision.reason
    for known, meant in _GUARDED.items():
        reason = reason.replace(repr(known), meant)
    chosen = _GUARDED.get(decision.chosen, repr(decision.chosen))
    log(INFO, "\t> candidate %r: the guard keeps %s: %s", name, chosen, reason)
    numbers: Numbers = {} if decision.shift is None else {"c2m3-guard-shift": decision.shift}
    for each in decision.candidates:
        numbers[f"c2m3-guard-kept/{each.name}"] = int(each.name == decision.chosen)
        evidence = {"accuracy": each.accuracy, "agreement": each.agreement}
        numbers |= {f"c2m3-guard-{kind}/{each.name}": value for kind, value in evidence.items() if value is not None}
    return numbers


def failure(who: str, error: Exception) -> str:
    """What failed and how, in one line; the traceback goes to the log for those who debug."""
    log(DEBUG, "\t> the traceback of %s:", who, exc_info=error)
    return f"{who} failed: {type(error).__name__}: {shown(error)}"


def report_kept(reason: str, idle: int, level: int = WARNING) -> None:
    """Log that a round left the global model as it was: louder when it is not the first one in a row."""
    log(level, "\t> %s: the previous global model stays", shown(reason))
    if idle > 1:
        log(ERROR, "\t> nothing was aggregated in the last %d rounds", idle)


def report_idle(result: Result, rounds: int) -> None:
    """Log, at the end of a run, in how many of its rounds nothing was aggregated."""
    idle = sum(bool(metrics.get(KEPT)) for metrics in result.train_metrics_clientapp.values())
    if idle == rounds:
        log(ERROR, "NOTHING WAS AGGREGATED in any of the %d rounds: the result is the initial model", rounds)
    elif idle:
        log(WARNING, "in %d of %d rounds nothing was aggregated: the previous global model stayed", idle, rounds)
