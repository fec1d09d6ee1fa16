"""Refit without calibration data on the server: clients answer sums over their own data, the server solves.

In forward order the server sends every client its own aligned network and the network merged so far; a client answers,
per linear operator, the second moments of the inputs and their products with what its own network gives beyond the
merged one. The server pools these and solves, and sends the corrected network before it asks about later operators.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from logging import INFO, WARNING

import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid
from flwr.supercore import log
from torch import Tensor

from c2m3_fl.core.spec import Params
from c2m3_fl.core.state_dicts import to_device
from c2m3_fl.errors import CalibrationError, ParamsError
from c2m3_fl.flower.admitted import fault_of, report_unanswered
from c2m3_fl.flower.client_networks import Sealed, is_stale, write_networks
from c2m3_fl.flower.client_refit_options import ClientRefit, Price, RegMean, asks_clients, plan_of, price
from c2m3_fl.flower.client_sums import ACTION
from c2m3_fl.flower.records import Entry, to_params
from c2m3_fl.flower.replies import only_arrays
from c2m3_fl.merging.recalibrate.client_fit import fit_operator
from c2m3_fl.merging.recalibrate.client_packing import expected, expected_channels, unpack
from c2m3_fl.merging.recalibrate.client_plan import Plan, Question, Role, norm_behind
from c2m3_fl.merging.recalibrate.client_pool import far_networks, outlying, pool_fits, pool_moments, shares_of
from c2m3_fl.merging.recalibrate.client_sketch import SketchedFit
from c2m3_fl.merging.recalibrate.correction import rescale, restate
from c2m3_fl.merging.recalibrate.fit_sums import Answer, FitAnswer, GramAnswer, MomentsAnswer
from c2m3_fl.merging.recalibrate.folded_norm import effective
from c2m3_fl.merging.recalibrate.regmean import assign_regression_mean, shrunk
from c2m3_fl.merging.recalibrate.targets import Target
from c2m3_fl.merging.reports import OperatorReport, Recalibrated, RecalibrationReport
from c2m3_fl.network.operators import Operator
from c2m3_fl.network.program import Program

__all__ = ["ClientRefit", "Price", "RegMean", "asks_clients", "price", "refit_by_clients"]

_SILENT = "no client gave a usable answer about it"
_CPU = torch.device("cpu")
_NO_HOLDOUT = 5  # where all examples count alike
_CLIENTS, _SEEDS = 100_003, 2**31  # every client draws positions of its own


def refit_by_clients(
    options: ClientRefit | RegMean,
    grid: Grid,
    nodes: Sequence[int],
    program: Program,
    merged: Params,
    endpoints: Sequence[Params],
    weights: Sequence[float],
    *,
    equally: bool = False,
) -> Recalibrated:
    """Refit a merged network with the sums that clients answer.

    Parameters
    ----------
    options : ClientRefit or RegMean
        What to ask, and what to do with it.
    grid : Grid
        Where the clients are.
    nodes : sequence of int
        Whom to ask, one node per endpoint, in a stable order.
    program : Program
        The traced network.
    merged : mapping of str to Tensor
        The merged state dict; not mutated.
    endpoints : sequence of mappings of str to Tensor
        The aligned replies of these nodes.
    weights : sequence of float
        The strategy's averaging weights; none counts more than ten times the median.
    equally : bool
        Whether the strategy ignores the weights.

    Raises
    ------
    CalibrationError
        When an exchange gets no usable answer at all.
    """
    start = time.perf_counter()
    plan = plan_of(options, program, merged)
    _log_price(options, price(options, program, merged))
    params, own = to_device(merged, _CPU), [to_device(endpoint, _CPU) for endpoint in endpoints]
    far = far_networks(program, own)
    for index in far:
        log(WARNING, "\t> node %d is not asked for sums: its weights are far from the others'", nodes[index])
    kept = [index for index in range(len(nodes)) if index not in far]
    clients = _Clients(
        options,
        grid,
        program,
        plan,
        {nodes[index]: own[index] for index in kept},
        {nodes[index]: weights[index] for index in kept},
        equally,
    )
    reports: list[OperatorReport] = []
    reasons = {**program.skipped, **_left_out(options, program, plan)}
    with torch.no_grad():
        for exchange in plan.exchanges:
            answers = clients.ask(exchange, params)
            layers = {step.place: _layer(program, step, params) for step in exchange}
            for step in exchange:
                operator = program.operators[step.place]
                trusted = clients.trusted(operator, answers, layers[step.place])
                if trusted:
                    reports += clients.correct(step, trusted, params)
                else:
                    reasons |= dict.fromkeys(filter(None, (operator.weight, operator.bias)), _SILENT)
    method = "refit by the clients" if isinstance(options, ClientRefit) else "regression mean by the clients"
    seconds = time.perf_counter() - start
    if plan.exchanges and not reports:
        raise CalibrationError("no client gave a usable answer about any operator; the log says what was wrong")
    home = {name: value.to(merged[name].device) for name, value in params.items()}
    return Recalibrated(home, RecalibrationReport(method, tuple(reports), tuple(reasons.items()), seconds=seconds))


class _Clients:
    """Asks clients, reads what can be read of their answers, and corrects operators with it."""

    def __init__(
        self,
        options: ClientRefit | RegMean,
        grid: Grid,
        program: Program,
        plan: Plan,
        own: Mapping[int, Params],
        weights: Mapping[int, float],
        equally: bool,
    ) -> None:
        self._options, self._grid, self._program, self._plan = options, grid, program, plan
        self._nodes, self._weights, self._equally = list(own), weights, equally
        self._own = {node: Sealed.of(params) for node, params in own.items()}
        self._held: dict[int, Sealed] = {}  # the merged network that a client was sent last, if it answered

    def ask(self, exchange: Sequence[Question], params: Params) -> dict[str, dict[int, Answer]]:
        """The usable answers, by operator name and node in the order of the nodes."""
        networks, last = Sealed.of(params), exchange is self._plan.exchanges[-1]
        read: dict[int, dict[str, Answer]] = {}
        failed: dict[int, str] = {}
        asked = self._nodes
        for whole in (False, True):
            lacking: set[int] = set()
            messages = self._messages(exchange, networks, asked, whole=whole, keep=not last)
            for reply in self._grid.send_and_receive(messages, timeout=self._options.timeout):
                node = reply.metadata.src_node_id
                try:
                    if node not in asked or node in read or node in lacking:
                        raise ParamsError("nobody asked it for an answer, or for a second one")
                    if is_stale(reply) and not whole:
                        lacking.add(node)
                    else:
                        read[node] = self._read(reply, exchange, params)
                except Exception as error:  # whatever one client sends is its fault
                    failed[node] = fault_of(node, error).reason
            asked = [node for node in asked if node in lacking]
            if not asked:
                break
        self._held = dict.fromkeys(read, networks)
        found: dict[str, dict[int, Answer]] = {}
        for node in self._nodes:
            for name, answer in read.get(node, {}).items():
                found.setdefault(name, {})[node] = answer
        if not read:
            first = f" (the first reply: {next(iter(failed.values()))})" if failed else ""
            raise CalibrationError(
                f"no client answered the query for sums{first}; every client needs it: add answer_statistics to its app"
            )
        report_unanswered("sums", failed)
        return found

    def trusted(
        self, operator: Operator, answers: Mapping[str, Mapping[int, Answer]], layer: tuple[Tensor, Tensor] | None
    ) -> dict[int, Answer]:
        """The answers about one operator that fit each other."""
        found = answers.get(operator.name, {})
        odd = outlying(found, layer)
        for node, reason in odd.items():
            log(WARNING, "\t> node %d's sums of %s are left out: %s", node, operator.module or operator.name, reason)
        return {node: answer for node, answer in found.items() if node not in odd}

    def correct(self, step: Question, answers: Mapping[int, Answer], params: dict[str, Tensor]) -> list[OperatorReport]:
        """Put an operator's correction in place."""
        operator = self._program.operators[step.place]
        shares = shares_of([self._weights[node] for node in answers], equally=self._equally)
        if isinstance(self._options, RegMean):
            grams = [_gram(answer, self._options.shrink) for answer in answers.values()]
            own = [self._own[node].params for node in answers]
            return [assign_regression_mean(self._program, operator, params, own, grams, shares)]
        if step.role is Role.FIT:
            fits = [answer for answer in answers.values() if isinstance(answer, FitAnswer | SketchedFit)]
            return fit_operator(self._program, operator, params, pool_fits(fits, shares), self._options.strengths)
        moments = [answer for answer in answers.values() if isinstance(answer, MomentsAnswer)]
        merged = pool_moments([each.merged for each in moments], shares)
        if step.role is Role.STATISTICS:
            return [restate(self._program, operator, params, merged)]
        own_moments = pool_moments([each.own for each in moments if each.own is not None], shares)
        target = Target(own_moments.mean, own_moments.std)
        return [rescale(self._program, operator, params, merged, target)]

    def _messages(
        self, exchange: Sequence[Question], merged: Sealed, nodes: Sequence[int], *, whole: bool, keep: bool
    ) -> list[Message]:
        options = self._options
        found = []
        for node in nodes:
            networks, held = {"own": self._own[node]}, {}
            if isinstance(options, ClientRefit):
                networks["merged"] = merged
            if node in self._held and not whole:
                held = {"own": self._own[node], "merged": self._held[node]}
            records, about = write_networks(networks, held, keep=keep)
            config = ConfigRecord(
                {
                    "places": [step.place for step in exchange],
                    "roles": [step.role.value for step in exchange],
                    "sketches": [step.sketch for step in exchange],
                    "positions": options.positions,
                    "holdout": _NO_HOLDOUT if isinstance(options, RegMean) else options.holdout,
                    "seed": (options.seed * _CLIENTS + self._nodes.index(node)) % _SEEDS,
                    "double": int(options.double),
                    **about,
                }
            )
            found.append(Message(RecordDict({**records, "config": config}), node, f"query.{ACTION}"))
        return found

    def _read(self, reply: Message, exchange: Sequence[Question], params: Params) -> dict[str, Answer]:
        """A client's answers by operator name; what cannot be read of it is left out, operator by operator."""
        record = only_arrays(reply)
        node, found = reply.metadata.src_node_id, {}
        for step in exchange:
            operator = self._program.operators[step.place]
            try:
                found[operator.name] = self._read_one(record, step, params)
            except Exception as error:  # as above
                reason = fault_of(node, error).reason
                log(WARNING, "\t> no sums of %s from node %d: %s", operator.module or operator.name, node, reason)
        return found

    def _read_one(self, record: ArrayRecord, step: Question, params: Params) -> Answer:
        operator = self._program.operators[step.place]
        channels = expected_channels(operator, params)
        shapes = expected(self._program, operator, params, step, channels, self._options.double)
        prefix = f"{operator.name}/"
        own = ArrayRecord({name: record[name] for name in record if name.startswith(prefix)})
        schema = {prefix + name: Entry(*entry) for name, entry in shapes.items()}
        tensors = to_params(own, schema, "sums")
        return unpack({name.removeprefix(prefix): value for name, value in tensors.items()}, step.role)


def _layer(program: Program, step: Question, params: Params) -> tuple[Tensor, Tensor] | None:
    """The layer to which an answer's residuals refer."""
    operator = program.operators[step.place]
    return effective(operator, norm_behind(program, operator), params) if step.role is Role.FIT else None


def _gram(answer: Answer, shrink: float) -> Tensor:
    assert isinstance(answer, GramAnswer)  # as it was read for this role
    return shrunk(answer.sums.xx / answer.sums.count, shrink)


def _left_out(options: ClientRefit | RegMean, program: Program, plan: Plan) -> dict[str, str]:
    """Weights that are not fitted, with the reason."""
    large = f"its sums exceed max_bytes of {options.max_bytes / 1e6:.0f} MB: not fitted"
    first = "it reads the network's input, whose second moments need first_layer=True: not fitted"
    return {
        operator.weight: large if operator.name in plan.too_large else first
        for operator in program.operators
        if operator.name in (*plan.too_large, *plan.kept_back)
    }


def _log_price(options: ClientRefit | RegMean, found: Price) -> None:
    log(
        INFO,
        "\t> %s: %d exchanges; every client is sent %.1f MB and answers %.1f MB%s%s",
        type(options).__name__,
        found.exchanges,
        found.sent / 1e6,
        found.answered / 1e6,
        f"; by sketches: {', '.join(found.sketched)}" if found.sketched else "",
        f"; beyond max_bytes and not fitted: {', '.join(found.too_large)}" if found.too_large else "",
    )
