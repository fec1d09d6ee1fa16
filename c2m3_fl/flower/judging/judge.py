"""The clients judge: candidates go to a sample of them as ordinary evaluation messages."""

from __future__ import annotations

import math
import random
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from logging import INFO

from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.supercore import log

from c2m3_fl.core.spec import Params
from c2m3_fl.errors import ConfigError, ParamsError
from c2m3_fl.flower.incoming.admitted import fault_of, report_unanswered
from c2m3_fl.flower.incoming.records import from_params
from c2m3_fl.flower.incoming.replies import check_weight, only_metrics
from c2m3_fl.flower.metrics import Numbers
from c2m3_fl.merging.evaluate.decide import DeploymentCandidate, DeploymentDecision, Vote, decide
from c2m3_fl.ranges import check_number, check_positive, check_whole

# words of a metric's name that say that less of it is better
_LESS = re.compile(r"loss|error|nll|perplexity|(?:^|[^a-z])(?:r?mse|mae)(?:$|[^a-z])")


@dataclass(frozen=True)
class ClientJudge:
    """Let clients compare the candidates for deployment with their own `@app.evaluate()`; pass it as `judge`.

    A candidate replaces the aggregate only if its pooled paired gain stays positive when any one client is left out:
    one client that lies can veto, not install. With two clients both must gain; one client decides nothing. A metric
    that is NaN or infinite is worse than any number.

    Attributes
    ----------
    key : str, optional
        The metric. By default the one whose name contains "loss". Metrics named like losses and errors are
        minimised, others maximised; a leading "-" or "+" decides otherwise ("-distance" is minimised).
    fraction : float
        Share of the nodes that are asked: those of the round, and others that are connected, a hundred in all.
    least : int
        How many are asked at least, where there are so many.
    seed : int
        With the round it decides which nodes are asked; the global random state is not used.
    timeout : float
        Seconds to wait for the answers.

    Raises
    ------
    ConfigError
        For values out of range.
    """

    key: str | None = None
    fraction: float = 1.0
    least: int = 3
    seed: int = 0
    timeout: float = 600.0

    def __post_init__(self) -> None:
        key: object = self.key  # whatever was passed
        if key is not None and not (isinstance(key, str) and key.lstrip("+-")):
            raise ConfigError(f"judge key is {key!r}, expected the name of a metric, or None")
        check_positive("judge fraction", self.fraction)
        check_number("judge fraction", self.fraction, 0, 1)
        check_whole("judge least", self.least, 1)
        check_whole("judge seed", self.seed, 0)
        check_positive("judge timeout", self.timeout)

    def sample(self, nodes: Sequence[int], round_number: int) -> list[int]:
        """Whom to ask in a round; the same nodes in any order give the same sample."""
        count = min(len(nodes), max(self.least, round(self.fraction * len(nodes))))
        return random.Random(f"{self.seed} {round_number}").sample(sorted(nodes), count)


def judge_candidates(
    options: ClientJudge,
    grid: Grid,
    nodes: Sequence[int],
    candidates: Mapping[str, Params | ArrayRecord],
    *,
    round_number: int,
    config: ConfigRecord | None = None,
    arrays_key: str = "arrays",
    config_key: str = "config",
    weighted_by: str = "num-examples",
    equally: bool = False,
    personal: Callable[[Iterable[Message]], Iterable[Message]] = iter,
) -> DeploymentDecision:
    """Send every candidate to a sample of clients and decide by their metrics; see `merging.evaluate.decide.decide`.

    Parameters
    ----------
    options : ClientJudge
        Whom to ask, and what to compare.
    grid : Grid
        Where the clients are.
    nodes : sequence of int
        From whom to sample.
    candidates : mapping of str to Params or ArrayRecord
        By name, the aggregate first; not mutated.
    round_number : int
        Of the deployment.
    config : ConfigRecord, optional
        The user's evaluate_config, sent along with "server-round"; not mutated.
    arrays_key, config_key : str
        Names of the records, as the wrapped strategy has them.
    weighted_by : str
        Metric that clients are weighted by.
    equally : bool
        Whether every client counts the same, for strategies that ignore weights.
    personal : callable
        From messages to those that are sent: with every client's model in its own basis, where that was asked for.
    """
    names = list(candidates)
    asked = options.sample(nodes, round_number)
    sent = ConfigRecord({**(config or {}), "server-round": round_number})
    messages = []
    for index, candidate in enumerate(candidates.values()):
        arrays = candidate if isinstance(candidate, ArrayRecord) else from_params(candidate)
        for node in asked:
            content = RecordDict({arrays_key: arrays, config_key: ConfigRecord(dict(sent))})
            messages.append(Message(content, node, MessageType.EVALUATE, group_id=str(index)))
    answers, faults = _answers(grid.send_and_receive(personal(messages), timeout=options.timeout), asked, names)
    key, sign = _metric(options.key, answers.values())
    if not key:
        wanted = "whose name contains 'loss'" if options.key is None else f"{options.key!r}"
        _report(faults if answers else [])
        reason = f"no metric {wanted} in {len(answers)} evaluations"
        reason += f" (the first fault: {faults[0]})" if faults else ""
        reason += ": name one as judge_key"
        return DeploymentDecision(names[0], reason, "", tuple(_unjudged(name) for name in names), judged=False)
    votes, more = _votes(answers, names, key, sign, None if equally else weighted_by)
    _report([*faults, *more])
    return decide(names, votes, key)


def report_verdict(verdict: DeploymentDecision) -> Numbers:
    """Log what was compared and, where there was a comparison, decided; the numbers for the metrics."""
    if verdict.judged:
        log(INFO, "\t> judge: %r is deployed: %s", verdict.chosen, verdict.reason)
    numbers: Numbers = {}
    for each in verdict.candidates:
        facts = {"loss": each.loss, "gain": each.gain, "robust-gain": each.robust_gain}
        known = {name: value for name, value in facts.items() if value is not None}
        if known:
            text = ", ".join(f"{name} {value:.4g}" for name, value in known.items())
            log(INFO, "\t> judge: %r: %s (%d voters)", each.name, text, each.voters)
        numbers[f"c2m3-judge-chosen/{each.name}"] = int(verdict.judged and each.name == verdict.chosen)
        numbers[f"c2m3-judge-voters/{each.name}"] = each.voters
        numbers |= {f"c2m3-judge-{name}/{each.name}": value for name, value in known.items()}
    return numbers


Answers = dict[tuple[int, str], MetricRecord]  # by node and candidate


@dataclass(frozen=True)
class _Fault:
    """What is wrong with a node's evaluation of a candidate; None where it is not known which."""

    node: int
    about: str | None
    reason: str

    def __str__(self) -> str:
        return f"no evaluation of {self.about!r} from node {self.node}: {self.reason}"


def _report(faults: Iterable[_Fault]) -> None:
    """Log the faults, once for all candidates and nodes with one reason."""
    about: dict[tuple[int, str], list[str]] = {}
    for each in faults:
        about.setdefault((each.node, each.reason), []).append(repr(each.about))
    for names in dict.fromkeys(map(tuple, about.values())):
        nodes = {node: reason for (node, reason), own in sorted(about.items()) if tuple(own) == names}
        report_unanswered(f"evaluation of {', '.join(names)}", nodes)


def _answers(replies: Iterable[Message], asked: Sequence[int], names: Sequence[str]) -> tuple[Answers, list[_Fault]]:
    """The metrics of every readable reply, and what is wrong with the others; a second reply makes both unreadable."""
    found: Answers = {}
    faults: list[_Fault] = []
    twice: set[tuple[int, str]] = set()
    places = {str(index): name for index, name in enumerate(names)}
    for reply in replies:
        node, about = reply.metadata.src_node_id, places.get(reply.metadata.group_id)
        try:
            if node not in asked or about is None:
                raise ParamsError("nobody asked it")
            metrics = only_metrics(reply)
        except Exception as error:  # whatever one client sends must not end the judgement
            faults.append(_Fault(node, about, fault_of(node, error).reason))
            continue
        if (node, about) in found:
            twice.add((node, about))
        found[node, about] = metrics
    return {key: record for key, record in found.items() if key not in twice}, faults


def _metric(key: str | None, records: Iterable[MetricRecord]) -> tuple[str, float]:
    """The metric to compare, "" for none, and the factor that makes it a loss.

    Most records decide, so that one client's odd names do not; of equals "loss" itself, then the first by name.
    """
    if key is not None:
        name = key.lstrip("+-") if key[0] in "+-" else key
        less = key[0] == "-" or (key[0] != "+" and bool(_LESS.search(name.lower())))
        return (name if any(name in record for record in records) else ""), 1.0 if less else -1.0
    counts = Counter(name for record in records for name in record if "loss" in name.lower())
    best = min(counts, key=lambda name: (-counts[name], name != "loss", name), default="")
    return best, 1.0


def _votes(
    answers: Mapping[tuple[int, str], MetricRecord],
    names: Sequence[str],
    key: str,
    sign: float,
    weighted_by: str | None,
) -> tuple[list[Vote], list[_Fault]]:
    """The votes of all nodes that have any, and the metrics that cannot be used."""
    votes, faults = [], []
    for node in sorted({node for node, _ in answers}):
        losses, weights = {}, []
        for name in names:
            record = answers.get((node, name))
            if record is None:
                continue
            try:
                weights.append(1.0 if weighted_by is None else check_weight(record.get(weighted_by), weighted_by))
                losses[name] = _loss(record.get(key), key, sign)
            except Exception as error:  # as above
                faults.append(_Fault(node, name, fault_of(node, error).reason))
        if losses:
            votes.append(Vote(losses, min(weights)))
    return votes, faults


def _loss(value: object, key: str, sign: float) -> float:
    """The metric as a loss; one that is NaN or infinite is worse than any other, of whichever sign."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ParamsError(f"metric {key!r} is {value!r}, expected a number")
    return sign * value if math.isfinite(value) else math.inf


def _unjudged(name: str) -> DeploymentCandidate:
    return DeploymentCandidate(name, None, None, None, 0)
