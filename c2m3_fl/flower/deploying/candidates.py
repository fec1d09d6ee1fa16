"""Candidates for the deployment of a round: the aggregate, and what recalibration makes of it.

A candidate that fails is logged and left out: the aggregate is always there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from logging import ERROR, INFO

from flwr.supercore import log

from c2m3_fl.core.spec import Params
from c2m3_fl.core.state_dicts import check_finite, same
from c2m3_fl.errors import ParamsError
from c2m3_fl.flower.acceptance import check_runs
from c2m3_fl.flower.aligning.aligned_replies import AlignedReplies
from c2m3_fl.flower.deploying.refit_widths import refit_by_replies
from c2m3_fl.flower.deploying.request import Clients, Request
from c2m3_fl.flower.deploying.server_side import ServerSide, UnsupportedError, unless_repaired
from c2m3_fl.flower.judging.evidence import Means, choose_means
from c2m3_fl.flower.judging.judge import ClientJudge
from c2m3_fl.flower.metrics import Numbers, failure, report_candidate
from c2m3_fl.flower.queries.head import Head, head_by_clients, report_head, why_no_head
from c2m3_fl.flower.queries.refit import refit_by_clients
from c2m3_fl.flower.setup import Setup
from c2m3_fl.flower.wrapped import typed_like
from c2m3_fl.merging.recalibrate.auto import Auto
from c2m3_fl.merging.recalibrate.refit import Refit
from c2m3_fl.merging.recalibrate.repair import BatchNormStatistics, Repair
from c2m3_fl.merging.recalibrate.short_names import Recalibration
from c2m3_fl.merging.reports import Recalibrated

AGGREGATE = "aggregate"


class Candidates:
    """The candidates of a round by name, the aggregate first.

    Parameters
    ----------
    setup : Setup
        Of the strategy.
    request : Request
        What the round gave.

    Attributes
    ----------
    params : dict of str to Params
        The candidates, in the model's element types.
    numbers : Numbers
        What was measured while making them.
    failed : int
        How many could not be made.
    finite : bool
        Whether all that were made are finite.
    last : str
        The candidate in which every step was taken that the evidence supports without a judge.
    headless : str
        Why clients do not answer for a head that nobody asked for; "" otherwise.
    unlike : str
        What shows that the calibration inputs are unlike the clients' data; "" otherwise.
    answered : tuple of int
        The nodes by whose answers the clients' refit was made; none where it was not.
    """

    def __init__(self, setup: Setup, request: Request) -> None:
        self.setup, self.request = setup, request
        self.params: dict[str, Params] = {AGGREGATE: typed_like(setup.state_dict(), request.aggregate)}
        self.numbers: Numbers = {}
        self.failed = 0
        self.finite = True
        self._said: set[str] = set()  # failures, which candidates may share
        self.headless = self.unlike = ""
        self.answered: tuple[int, ...] = ()
        self.last = AGGREGATE
        if request.aligned is not None:
            self._add_server_side(request.aligned)
        elif request.returned is not None:
            self.params["returned"] = typed_like(setup.state_dict(), request.returned)
            self.last = "returned"
        if request.deploys and request.clients is not None:
            self._add_client_side(request.clients)
        if self._compares_previous() and request.returned is not None:
            self.params["previous"] = typed_like(setup.state_dict(), request.returned)

    @property
    def judged(self) -> dict[str, Params]:
        """The candidates to compare, each network once; the first is deployed unless another one is better.

        Where the server's labels chose, the clients may refuse: the aggregate has to be better than the choice. The
        aggregate alone where nobody is to judge.
        """
        distinct: dict[str, Params] = {}
        chosen = [self.last] if self.request.deploys else []
        for name in self.params if self.compares_all else [*chosen, AGGREGATE]:
            params = self.params[name]
            if not any(same(params, known) for known in distinct.values()):
                distinct[name] = params
        return distinct

    @property
    def compares_all(self) -> bool:
        """Whether whoever judges compares all candidates: not where the server's labels chose one of them."""
        return not self.setup.tentative or self._open()

    def _open(self) -> bool:
        """Whether clients judge by default: of what the server makes, its labels are the stronger evidence."""
        asked = self.setup.refit is not None or self.setup.head is not None
        return self.request.deploys and (asked or not self.setup.data.labelled)

    def _compares_previous(self) -> bool:
        """Whether the model that was returned before is compared: for a judge, where there is anything new."""
        setup, request = self.setup, self.request
        if setup.judge is None or not request.deploys or request.aligned is None:
            return False
        return not setup.tentative or (self._open() and len(self.params) > 1)

    def _add(self, name: str, make: Callable[[], Recalibrated], *, step: bool = True) -> None:
        try:
            found = make()
            self._check_finite(found.state_dict)
            check_runs(self.setup.model, self.setup.data.example, found.state_dict, self.params[AGGREGATE])
        except UnsupportedError as unsupported:
            log(INFO, "\t> no candidate %r: %s", name, unsupported)
            return
        except Exception as error:  # if recalibration fails, keep the aggregate
            reason = failure(_WHO.get(name, "recalibration"), error)
            if reason not in self._said:
                log(ERROR, "\t> %s: the merged model stays as it is", reason)
            self._said.add(reason)
            self.failed += 1
            return
        self.numbers |= report_candidate(name, found.report) | report_head(found.report)
        self.params[name] = found.state_dict
        self.answered = self.answered or found.report.nodes
        if step:
            self.last = name

    def _check_finite(self, params: Params) -> None:
        try:
            check_finite(params)
        except ParamsError:
            self.finite = False
            raise

    def _add_server_side(self, aligned: AlignedReplies) -> None:
        setup, request = self.setup, self.request
        grid = request.clients.grid if request.clients is not None else None
        server = ServerSide(
            setup,
            self.params[AGGREGATE],
            aligned,
            plain=request.plain,
            grid=grid,
            widths=request.widths,
            equally=request.equally,
        )
        moved = server.moved()
        means = _means(setup, request, moved=moved)
        if setup.calibrated and setup.decides:
            log(INFO, "\t> the evidence supports: %s", means.value)
        labels = means is Means.LABELS
        unjudged = _means(setup, request, moved=moved, judge=False)
        steps = {name for name, _ in _methods(setup, unjudged)}
        for name, recalibration in _methods(setup, means):
            make = partial(server.recalibrate, recalibration, insists=means is Means.ASKED)
            self._add(
                name,
                partial(unless_repaired, make) if name == "auto" and not labels and not moved else make,
                step=means is not Means.JUDGED or name in steps,
            )
        self.unlike = server.unlike

    def _add_client_side(self, clients: Clients) -> None:
        setup, request, aligned = self.setup, self.request, self.request.aligned
        program = setup.data.program
        if setup.refit is not None and aligned is not None:
            where = setup.refit, clients.grid, aligned.nodes, program, self.params[AGGREGATE]
            weights, equally, widths = aligned.weights, request.equally, request.widths
            if widths is not None:
                refit = partial(refit_by_replies, widths, aligned, *where, weights, equally=equally)
            else:
                refit = partial(refit_by_clients, *where, aligned.params, weights, equally=equally)
            self._add("client-refit", refit)
        elif setup.refit is not None:
            log(INFO, "\t> no refit by the clients: the replies that the trajectory was aggregated from are gone")
        if setup.head is None or (setup.offered and not self._offers(setup.head, clients)):
            return
        final, newest = self.last, list(self.params)[-1]
        bases = [final] if setup.judge is None else list(dict.fromkeys([AGGREGATE, newest, final]))
        for base in bases:
            name = "head" if base == AGGREGATE else f"{base}+head"
            head, nodes, below = setup.head, list(request.nodes), self.params[base]
            self._add(
                name,
                partial(head_by_clients, head, clients.grid, nodes, program, below, equally=request.equally),
                step=base == final and not setup.offered,
            )

    def _offers(self, head: Head, clients: Clients) -> bool:
        """Whether clients answer for a head that nobody asked for; a client's refusal is no failure."""
        if not self.request.offers:
            return False
        program, nodes = self.setup.data.program, list(self.request.nodes)
        try:
            reason, lasts = why_no_head(head, clients.grid, nodes, program, self.params[AGGREGATE])
        except Exception as error:  # a network or a grid of an unforeseen kind leaves the aggregate
            reason, lasts = str(error), True
        self.headless = reason if lasts else ""
        if reason and not lasts:
            log(INFO, "\t> no head from labels in this round: %s", reason)
        return not reason


_WHO = {"client-refit": "refit by the clients", "head": "the head from labels"}


def _means(setup: Setup, request: Request, *, moved: bool, judge: bool = True) -> Means:
    return choose_means(
        asked=setup.recalibration is not None,
        decides=setup.decides,
        data=setup.calibrated,
        labels=setup.data.labelled,
        judge=judge and isinstance(setup.judge, ClientJudge) and request.deploys and request.clients is not None,
        moments=setup.moments is not None,
        moved=moved,
    )


def _methods(setup: Setup, means: Means) -> Iterator[tuple[str, Recalibration]]:
    """The recalibrations of a means, by candidate name."""
    if means is Means.ASKED and setup.recalibration is not None:
        kind = getattr(setup.recalibration, "__name__", type(setup.recalibration).__name__)
        yield kind.lower(), setup.recalibration
    elif means in (Means.LABELS, Means.MOMENTS):
        yield "auto", Auto()
    elif means is Means.JUDGED:
        if any(operator.mean for operator in setup.data.program.operators):
            yield "batchnorm", BatchNormStatistics()
        yield "repair", Repair()
        if setup.data.batches:
            yield ("auto", Auto()) if setup.moments is not None else ("refit", Refit())
    elif means is Means.REPAIR:
        yield "repair", Repair()
