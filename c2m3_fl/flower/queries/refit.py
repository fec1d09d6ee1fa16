"""Refit without calibration data on the server: clients answer sums over their own data, the server solves.

In forward order the server sends every client its own aligned network and the network merged so far; a client answers,
per linear operator, the second moments of the inputs and their products with what its own network gives beyond the
merged one. The server pools these and solves, and sends the corrected network before it asks about later operators.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from logging import INFO, WARNING

import torch
from flwr.serverapp import Grid
from flwr.supercore import log

from c2m3_fl.core.spec import Params
from c2m3_fl.core.state_dicts import to_device
from c2m3_fl.errors import CalibrationError
from c2m3_fl.flower.queries.corrections import Corrections, Owners
from c2m3_fl.flower.queries.exchanges import Exchanges
from c2m3_fl.flower.queries.refit_options import ClientRefit, Price, RegMean, asks_clients, plan_of, price
from c2m3_fl.merging.recalibrate.from_clients.plan import Plan
from c2m3_fl.merging.recalibrate.from_clients.pool import far_networks
from c2m3_fl.merging.reports import OperatorReport, Recalibrated, RecalibrationReport
from c2m3_fl.network.program import Program

__all__ = ["ClientRefit", "Price", "RegMean", "asks_clients", "price", "refit_by_clients"]

_SILENT = "no client gave a usable answer about it"
_CPU = torch.device("cpu")


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
    owners: Owners | None = None,
    title: str = "",
    further: int = 0,
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
        The aligned replies of these nodes, or what else they run beside the merged network.
    weights : sequence of float
        The strategy's averaging weights; none counts more than ten times the median.
    equally : bool
        Whether the strategy ignores the weights.
    owners : Owners, optional
        Who has which channels, where the replies differ in width; None: all have all.
    title : str
        What is refit, for the log; by default the merged network.
    further : int
        How many refits of narrower widths follow, for the log.

    Raises
    ------
    CalibrationError
        When an exchange gets no usable answer at all.
    """
    start = time.perf_counter()
    plan = plan_of(options, program, merged)
    _log_price(options, price(options, program, merged), title, further)
    params, own = to_device(merged, _CPU), [to_device(endpoint, _CPU) for endpoint in endpoints]
    far = far_networks(program, own) if owners is None else owners.far
    for index in far:
        log(WARNING, "\t> node %d is not asked for sums: its weights are far from the others'", nodes[index])
    kept = [index for index in range(len(nodes)) if index not in far]
    asked = {nodes[index]: own[index] for index in kept}
    exchanges = Exchanges(options, grid, program, plan, asked, title)
    corrections = Corrections(
        options,
        program,
        asked,
        {nodes[index]: weights[index] for index in kept},
        equally,
        None if owners is None else lambda operator: dict(zip(nodes, owners.channels(operator), strict=True)),
        None if owners is None else owners.inputs,
        title,
    )
    reports: list[OperatorReport] = []
    used: set[int] = set()
    reasons = {**program.skipped, **_left_out(options, program, plan)}
    with torch.no_grad():
        for exchange in plan.exchanges:
            answers, asked_about = exchanges.ask(exchange, params), dict(params)
            for step in exchange:
                operator = program.operators[step.place]
                trusted = corrections.trusted(step, answers.get(operator.name, {}), asked_about)
                found = corrections.correct(step, trusted, params) if trusted else []
                reports += found
                used |= trusted.keys()
                if not found:
                    reasons |= dict.fromkeys(filter(None, (operator.weight, operator.bias)), _SILENT)
    method = "refit by the clients" if isinstance(options, ClientRefit) else "regression mean by the clients"
    seconds = time.perf_counter() - start
    if plan.exchanges and not reports:
        raise CalibrationError("no client gave a usable answer about any operator; the log says what was wrong")
    home = {name: value.to(merged[name].device) for name, value in params.items()}
    skipped, answered = tuple(reasons.items()), tuple(node for node in nodes if node in used & exchanges.answered)
    return Recalibrated(home, RecalibrationReport(method, tuple(reports), skipped, seconds=seconds, nodes=answered))


def _left_out(options: ClientRefit | RegMean, program: Program, plan: Plan) -> dict[str, str]:
    """Weights that are not fitted, with the reason."""
    large = f"its sums exceed max_bytes of {options.max_bytes / 1e6:.0f} MB: not fitted"
    first = "it reads the network's input, whose second moments need first_layer=True: not fitted"
    return {
        operator.weight: large if operator.name in plan.too_large else first
        for operator in program.operators
        if operator.name in (*plan.too_large, *plan.kept_back)
    }


def _log_price(options: ClientRefit | RegMean, found: Price, title: str, further: int) -> None:
    log(
        INFO,
        "\t> %s%s: %d exchanges%s; every client is sent %.1f MB and answers %.1f MB%s%s",
        f"{title}: " if title else "",
        type(options).__name__,
        found.exchanges,
        f", then as many for each of {further} narrower width{'s' if further > 1 else ''}" if further else "",
        found.sent / 1e6,
        found.answered / 1e6,
        f"; by sketches: {', '.join(found.sketched)}" if found.sketched else "",
        f"; beyond max_bytes and not fitted: {', '.join(found.too_large)}" if found.too_large else "",
    )
