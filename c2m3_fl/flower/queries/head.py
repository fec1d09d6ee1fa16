"""A head from labels: clients answer sums of the last layer's inputs and labels, the server fits the layer.

Two exchanges. In the first a client answers, of the model to be deployed, AᵀA, AᵀY and the number of examples per
class. In the second it scores the fitted layer on its held-out examples, for the temperature.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from logging import INFO, WARNING
from typing import TypeVar

import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid
from flwr.supercore import log

from c2m3_fl.core.spec import Params
from c2m3_fl.errors import CalibrationError, ConfigError, ParamsError
from c2m3_fl.flower.incoming.admitted import fault_of, report_unanswered
from c2m3_fl.flower.incoming.records import Entry, from_params, to_params
from c2m3_fl.flower.incoming.replies import only_arrays
from c2m3_fl.flower.metrics import Numbers
from c2m3_fl.flower.queries.labels import ACTION, LAYERS, SIDES, SPARSEST
from c2m3_fl.merging.recalibrate.head.checks import check_label_sums, outlying
from c2m3_fl.merging.recalibrate.head.fit import METHOD, FitHead, fit_head, operator_report
from c2m3_fl.merging.recalibrate.head.label_sums import LabelSums, pool_sums, read_sums
from c2m3_fl.merging.recalibrate.head.last_layer import last_layer, with_head
from c2m3_fl.merging.recalibrate.head.reliability import BINS, Reliability, pool_reliability, quality
from c2m3_fl.merging.reports import HeadReport, Recalibrated, RecalibrationReport
from c2m3_fl.network.program import Program
from c2m3_fl.network.rows import weight_matrix
from c2m3_fl.ranges import check_positive, check_whole

Answer = TypeVar("Answer")

_PROBED = 3  # clients that are asked before a head that nobody asked for is given up
_UNKNOWN = "No query function registered"  # Flower's reason where an app lacks the query


@dataclass(frozen=True)
class Head(FitHead):
    """Fit the last layer to the clients' labels, in closed form; pass it, or "labels", as `head`.

    The result is the ridge classifier on the features that the deployed model gives all clients' examples, however
    the labels are spread over the clients, with a temperature folded in. A client counts at most ten times the median
    client's number of examples, so that no claim outweighs all others. Every client needs `answer_statistics`.

    Attributes
    ----------
    strengths, temperatures, holdout
        See `FitHead`; held-out examples are held out at every client.
    timeout : float
        Seconds to wait for the answers to a query; clients that do not answer in time are left out.
    max_bytes : int
        Largest answer of a client. The answer of a layer of d inputs and c classes takes about 8 (d² + 2 d c) bytes.

    Raises
    ------
    ConfigError
        For values out of range.
    """

    timeout: float = 600.0
    max_bytes: int = 64_000_000

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive("timeout", self.timeout)
        check_whole("max_bytes", self.max_bytes, 1)
        if self.holdout > SPARSEST:
            raise ConfigError(
                f"holdout is {self.holdout}, expected at most {SPARSEST}: clients refuse to hold out less"
            )


def resolve_head(head: Head | str | None) -> Head | None:
    """The head's options: "labels" and "auto" stand for `Head()`, "none" and None for no head.

    Raises
    ------
    ConfigError
        For anything else.
    """
    if isinstance(head, Head):
        return head
    if head in (None, "none"):
        return None
    if head in ("auto", "labels"):
        return Head()
    raise ConfigError(f"head is {head!r}, expected 'auto', 'labels', Head(...) or None")


def check_head(program: Program, params: Params, options: Head) -> None:
    """Raise `CalibrationError` where a model has no last layer that can be fitted to labels within `max_bytes`.

    Parameters
    ----------
    program : Program
        The traced network.
    params : mapping of str to Tensor
        Its state dict.
    options : Head
        Says how many bytes a client may be asked for.
    """
    _Wire.of(program, params, options)


def why_no_head(options: Head, grid: Grid, nodes: Sequence[int], program: Program, merged: Params) -> tuple[str, bool]:
    """Why the first three clients answer no query for label sums ("" where one does), and whether it is so for good.

    They are asked one after another. It is, where none of their apps has the query. See `head_by_clients`.
    """
    wire = _Wire.of(program, merged, options)
    query, reasons = {"arrays": from_params(merged)}, list[str]()
    for node in nodes[:_PROBED]:
        try:
            _ask(options, grid, [node], "sums", query, wire.read_sums)
        except CalibrationError as error:
            reasons.append(str(error))
        else:
            return "", False
    others = [reason for reason in reasons if _UNKNOWN not in reason]
    if reasons and not others:
        return "the clients' app does not answer for labels; answer_statistics in it does", True
    return others[0] if others else "there is no client to ask", False


def head_by_clients(
    options: Head,
    grid: Grid,
    nodes: Sequence[int],
    program: Program,
    merged: Params,
    *,
    equally: bool = False,
) -> Recalibrated:
    """Replace the last layer of a network by the one that the clients' labels give.

    Parameters
    ----------
    options : Head
        Ridge strengths, temperatures, limits.
    grid : Grid
        Where the clients are.
    nodes : sequence of int
        Whom to ask, in a stable order.
    program : Program
        The traced network.
    merged : mapping of str to Tensor
        State dict of the model to be deployed; not mutated.
    equally : bool
        Whether every client counts the same, for strategies that ignore weights. Otherwise every example does, but
        a client at most as ten times the clients' median number.

    Raises
    ------
    CalibrationError
        When the outputs are not class scores, no client gives a usable answer, or labels cannot be predicted.
    """
    start = time.perf_counter()
    wire = _Wire.of(program, merged, options)
    query = {"arrays": from_params(merged)}
    sums, dropped = _ask(options, grid, nodes, "sums", query, wire.read_sums)
    found = outlying(list(sums.values()))
    odd = {node: found[index] for index, node in enumerate(sums) if index in found}
    for node, reason in odd.items():
        log(WARNING, "\t> the label sums of node %d are left out: %s", node, reason)
    kept = {node: answer for node, answer in sums.items() if node not in odd}
    operator = last_layer(program)
    fitted = fit_head(pool_sums(list(kept.values()), equally=equally), options.strengths, bias=bool(operator.bias))
    query["layer"] = from_params(
        {
            "weight": fitted.unseen.weight,
            "bias": fitted.unseen.bias,
            "temperatures": torch.tensor(options.temperatures, dtype=torch.float64),
        }
    )
    scores, silent = _ask(options, grid, list(kept), "scores", query, wire.read_scores)
    before, after = (
        quality(pool_reliability(parts, wire.classes, equally=equally), options.temperatures)
        for parts in zip(*scores.values(), strict=True)
    )
    examples = sum(answer.count for answer in kept.values())
    head = HeadReport(before, after, len(kept), examples, (*dropped.items(), *odd.items(), *silent.items()))
    result = with_head(program, merged, fitted.layer, after.temperature)
    reports, seconds = (operator_report(operator, fitted),), time.perf_counter() - start
    return Recalibrated(result, RecalibrationReport(METHOD, reports, inputs=int(examples), seconds=seconds, head=head))


def report_head(report: RecalibrationReport) -> Numbers:
    """Log how the last layer was fitted, if it was; its numbers for the metrics."""
    head = report.head
    if head is None:
        return {}
    log(
        INFO,
        "\t> head from %d labels of %d clients: held-out accuracy %.3f -> %.3f, NLL %.3f -> %.3f (%.3f before "
        "temperature %.3g), ECE %.3f -> %.3f (%.3f)",
        head.examples,
        head.clients,
        head.before.accuracy,
        head.after.accuracy,
        head.before.nll,
        head.after.nll_tempered,
        head.after.nll,
        head.after.temperature,
        head.before.ece,
        head.after.ece_tempered,
        head.after.ece,
    )
    numbers: Numbers = {"c2m3-head-clients": head.clients, "c2m3-head-dropped": len(head.dropped)}
    for when, each in (("before", head.before), ("after", head.after)):
        for name, value in vars(each).items():
            numbers[f"c2m3-head-{name.replace('_', '-')}/{when}"] = value
    return numbers


@dataclass(frozen=True)
class _Wire:
    """What answers must look like, and how they are read."""

    inputs: int
    classes: int
    temperatures: tuple[float, ...]

    @classmethod
    def of(cls, program: Program, params: Params, options: Head) -> _Wire:
        operator = last_layer(program)
        _, inputs, classes = weight_matrix(operator, params[operator.weight]).shape
        size = 8 * 2 * (inputs * (inputs + 1) // 2 + inputs * classes + classes)
        if size > options.max_bytes:
            raise CalibrationError(
                f"a head from labels on {inputs} inputs takes an answer of {size / 1e6:.0f} MB from every client, "
                f"beyond max_bytes of {options.max_bytes / 1e6:.0f} MB"
            )
        return cls(inputs, classes, options.temperatures)

    def read_sums(self, record: ArrayRecord) -> LabelSums:
        packed = self.inputs * (self.inputs + 1) // 2
        one = {
            "classes": Entry("int64", (self.classes,)),
            "by-class": Entry("float64", (self.inputs, self.classes)),
            "gram": Entry("float64", (packed,)),
        }
        schema = {f"{side}/{name}": entry for side in SIDES for name, entry in one.items()}
        tensors = to_params(record, schema, "label sums")
        train, held = (read_sums(tensors, side) for side in SIDES)
        for part in (train, held):
            check_label_sums(part)
        return LabelSums(train, held)

    def read_scores(self, record: ArrayRecord) -> tuple[Reliability, Reliability]:
        count = len(self.temperatures)
        table = Entry("float64", (count, BINS))
        one = {"nll": Entry("float64", (count,)), "members": table, "confidence": table, "correct": table}
        schema = {f"{layer}/{name}": entry for layer in LAYERS for name, entry in one.items()}
        tensors = to_params(record, schema, "scores")
        before, after = (Reliability(**{name: tensors[f"{layer}/{name}"] for name in one}) for layer in LAYERS)
        for each in (before, after):
            each.check(self.temperatures, self.classes)
        return before, after


def _ask(
    options: Head,
    grid: Grid,
    nodes: Sequence[int],
    stage: str,
    query: Mapping[str, ArrayRecord],
    read: Callable[[ArrayRecord], Answer],
) -> tuple[dict[int, Answer], dict[int, str]]:
    """The usable answers by node, in the order of the nodes; and why others cannot be used."""
    config = ConfigRecord({"stage": stage, "every": options.holdout})
    messages = [Message(RecordDict({**query, "config": config}), node, f"query.{ACTION}") for node in nodes]
    found: dict[int, Answer] = {}
    failed: dict[int, str] = {}
    for reply in grid.send_and_receive(messages, timeout=options.timeout):
        node = reply.metadata.src_node_id
        try:
            if node not in nodes or node in found:
                raise ParamsError("nobody asked it for an answer, or for a second one")
            found[node] = read(only_arrays(reply))
        except Exception as error:  # whatever one client sends is its fault
            failed[node] = fault_of(node, error).reason
    if not found:
        first = f" (the first reply: {next(iter(failed.values()))})" if failed else ""
        raise CalibrationError(
            f"no client answered the query for {stage} of labels{first}; every client needs answer_statistics in its "
            "app, with labelled data"
        )
    report_unanswered(f"{stage} of labels", failed)
    return {node: found[node] for node in nodes if node in found}, failed
