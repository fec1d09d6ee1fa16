"""A server from round to round, in state dicts: what both dialects of the strategy share."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import partial
from logging import INFO, WARNING
from time import perf_counter
from typing import Any, TypeVar

import torch
from flwr.supercore import log
from torch import Tensor

from c2m3_fl.core.spec import Params
from c2m3_fl.errors import ConfigError, SpecError
from c2m3_fl.flower.acceptance import Gate, entry_numbers
from c2m3_fl.flower.aligning.aligned_replies import AlignedReplies
from c2m3_fl.flower.arriving.ahead import Ahead
from c2m3_fl.flower.deploying.deployment import Clients, Deployed, Request, deploy, wants_plain
from c2m3_fl.flower.deploying.refit_widths import Asked, refit_widths
from c2m3_fl.flower.incoming.records import Schema
from c2m3_fl.flower.incoming.replies import Sorted, check_shared_fault
from c2m3_fl.flower.metrics import KEPT, Numbers, report_kept
from c2m3_fl.flower.rounds import Aggregate, Outcome, RoundStart, run_round
from c2m3_fl.flower.setup import Setup
from c2m3_fl.flower.two_models import PREFIX, TwoModels
from c2m3_fl.flower.widths.arriving import Arrived
from c2m3_fl.flower.widths.rounds import RoundWidths
from c2m3_fl.flower.widths.sizes import Cuts, Sizes
from c2m3_fl.flower.widths.stage import PREFIX as WIDTHS
from c2m3_fl.flower.widths.stage import Resizing
from c2m3_fl.flower.wrapped import ignores_weights, typed_like

Metrics = TypeVar("Metrics")
Source = TypeVar("Source")
_HEADLESS = "asking/headless"  # in a state: clients did not answer for a head that nobody asked for


class Server:
    """Runs one round after another and remembers what must outlive them.

    Parameters
    ----------
    setup : Setup
        Of the strategy.

    Attributes
    ----------
    models : TwoModels
        The trajectory and what was returned for it.
    sent : mapping of str to Tensor, optional
        The model that was sent out.
    total : int, optional
        Number of rounds of the run, where it is known.
    over : bool
        Whether the run has ended: the next round begins another one.
    idle : int
        Rounds in a row in which nothing was aggregated.
    resizing : Resizing, optional
        The widths of the clients, where they may differ.
    ahead : Ahead, optional
        What is computed before the replies of this round have come.
    """

    def __init__(self, setup: Setup) -> None:
        self.setup = setup
        self.models = TwoModels(setup.options.feedback)
        self.sent: Params | None = None
        self.ahead: Ahead | None = None
        self.resizing = None if setup.sizes is None else Resizing(setup.sizes, setup.options.memory)
        self._gate = Gate(setup)
        self._incoming: Params = {}
        self._places: Mapping[int, int] = {}  # widths of this round's replies
        self.begin_run(None)

    def rebuild(self, setup: Setup) -> None:
        """Go on with another setup of the same model: clients exchange other tensors of it."""
        self.setup, self._gate = setup, Gate(setup)

    def begin_run(self, num_rounds: int | None) -> None:
        """Forget the trajectory of an earlier run; the last of `num_rounds` rounds deploys, each where it is None."""
        self.models.forget()
        self.total, self.over, self.idle = num_rounds, False, 0
        # to the pending deployment, for a refit
        self._waiting: tuple[AlignedReplies | None, RoundWidths | None] = (None, None)
        self._said = self._unjudged = self._headless = self._unlike = False  # its clients may be others

    def next_start(self, incoming: Params) -> Params:
        """What clients train next: the trajectory, or `incoming` where it is a new start."""
        if self.over:  # a run that nobody announced, as by a wrapper that knows nothing of this strategy
            self.begin_run(None)
        self._incoming = incoming
        self.sent = self.models.next_start(incoming)
        self.drop_ahead()
        self._gate.prepare()  # here, before any client of this process may train the very object that is copied
        self.ahead = Ahead(self.setup.spec, partial(typed_like, self.setup.state_dict(), self.sent))
        return self.sent

    def drop_ahead(self) -> None:
        """Forget what was computed of a round that is not aggregated."""
        if self.ahead is not None:
            self.ahead.drop()
        self.ahead = None

    def arrived(
        self,
        replies: Iterable[Source],
        expected: Schema,
        widen: Callable[[Iterable[Source], Sizes, Cuts, Schema, Mapping[int, int]], Arrived[Source]],
    ) -> Arrived[Source]:
        """The replies of a round, all of the model's width.

        Parameters
        ----------
        replies : iterable of Message or legacy result
            As Flower delivered them.
        expected : mapping of str to Entry
            What replies of the model's width look like.
        widen : callable
            Of one dialect: `widen_messages` or `widen_results`.
        """
        resizing = self.resizing
        if resizing is None or self.sent is None:
            return Arrived(tuple(replies), {}, ())
        cuts = resizing.cuts(self.sent, deployed=False)
        found = widen(replies, resizing.sizes, cuts, expected, resizing.places)
        self._places = found.places
        return found

    def at_width(self, params: Params, size: int) -> Params:
        """A deployed model at one of the narrower widths; `ConfigError` where there is no such one."""
        count = 0 if self.resizing is None else len(self.resizing.sizes.networks) - 1
        if self.resizing is None or not 0 <= size < count:
            raise ConfigError(f"size is {size!r}, expected one of {count} sizes that C2M3 was given, from 0")
        if self.resizing.refits_another(params):
            log(INFO, "\t> at_width: the clients' refits are of another model than these arrays, so they are not used")
        return self.resizing.cuts(params, deployed=True).params(size + 1)

    def play(
        self,
        server_round: int,
        found: Sorted[Any],
        strategy: object,
        aggregate: Aggregate[Metrics],
        clients: Clients | None = None,
    ) -> tuple[Params, Metrics | None, Numbers]:
        """One round, from checked replies to the deployed model, the wrapped strategy's metrics and our numbers.

        Parameters
        ----------
        server_round : int
            The round.
        found : Sorted
            The usable replies and the dropped ones.
        strategy : Strategy
            The wrapped strategy.
        aggregate : callable
            From the aligned replies to the wrapped strategy's arrays and metrics.
        clients : Clients, optional
            The clients that can be asked.

        Raises
        ------
        ParamsError
            When no reply of the first round can be used, for one reason: a mistake that all clients share.
        """
        sent = typed_like(self.setup.state_dict(), self.sent or {})
        found = self._gate.admit(found, sent)
        if self.resizing is not None:
            failed = {each.node for each in found.dropped if not each.passing}
            self.resizing.replied({each.node: self._places.get(each.node, 0) for each in found.replies}, failed)
        if server_round == 1 and self.models.trajectory is None:
            check_shared_fault(found)
        accept, sound = partial(self._gate.accept, sent=sent), partial(self._gate.sound, sent=sent)
        where = self.setup.aligner, self.setup.options
        widths, ahead = self._round_widths(), self.ahead
        self.ahead = None  # it holds the replies
        start = RoundStart(
            *where, sent, strategy, wants_plain(self.setup), accept=accept, sound=sound, widths=widths, ahead=ahead
        )
        outcome = run_round(start, found, aggregate)
        outcome = replace(outcome, numbers={**entry_numbers(found), **outcome.numbers})
        deploys, equally = self._deploys(server_round), ignores_weights(strategy)
        self.over = server_round == self.total
        if outcome.params is None or outcome.aligned is None:
            params, numbers = self._keep(outcome, clients, deploys=deploys, equally=equally)
            return params, outcome.metrics, {**outcome.numbers, **numbers, KEPT: 1}
        self.idle = 0
        aligned, returned = outcome.aligned, self._incoming if self.models.follows() else None
        asked = (outcome.params, tuple(aligned.nodes), aligned, outcome.plain, returned, clients, deploys, equally)
        deployed = deploy(self.setup, Request(*asked, offers=not self._headless, widths=widths))
        self._say(deployed)
        pending = not deploys and (bool(self.setup.asks) or self.setup.offered)
        self._waiting = (aligned, widths) if pending and self.setup.refit is not None else (None, None)
        further = self._refit_widths(deployed, aligned, clients, equally=equally)
        fed = self.models.record(outcome.params, deployed.params, aligned, pending=pending, finite=deployed.finite)
        numbers = {**further, **({} if deployed.params is outcome.params else {"c2m3-fed-back": fed})}
        return deployed.params, outcome.metrics, {**outcome.numbers, **numbers, KEPT: 0}

    def _round_widths(self) -> RoundWidths | None:
        """The widths of a round's replies."""
        if self.resizing is None or self.sent is None:
            return None
        return RoundWidths(
            self.resizing.sizes, self.resizing.cuts(self.sent, deployed=False), dict(self.resizing.places)
        )

    def _keep(
        self, outcome: Outcome[Any], clients: Clients | None, *, deploys: bool, equally: bool
    ) -> tuple[Params, Numbers]:
        """Nothing was aggregated: what was returned before stays; a pending deployment is made in the last round."""
        self.idle += 1
        report_kept(outcome.reason, self.idle, outcome.level)
        trajectory = self.models.trajectory
        if trajectory is None or not deploys or not self.models.pending:
            return self._incoming, {}
        aligned, widths = self._waiting
        asked = (trajectory, self.models.pending, aligned, None, self._incoming, clients, deploys, equally)
        deployed: Deployed = deploy(self.setup, Request(*asked, offers=not self._headless, widths=widths))
        self._say(deployed)
        numbers = self._refit_widths(deployed, aligned, clients, equally=equally)
        self.models.deploy(deployed.params)
        return deployed.params, numbers

    def _refit_widths(
        self, deployed: Deployed, aligned: AlignedReplies | None, clients: Clients | None, *, equally: bool
    ) -> Numbers:
        """Let the clients that answered for a refit refit the deployed model's restrictions to narrower widths, too.

        Returns the deployment's numbers with what that cost and how often it failed.
        """
        options, resizing = self.setup.refit, self.resizing
        if resizing is None or options is None or aligned is None or clients is None or not deployed.answered:
            return deployed.numbers
        started = perf_counter()
        weights = dict(zip(aligned.nodes, aligned.weights, strict=True))
        asked = Asked(options, clients.grid, {node: weights[node] for node in deployed.answered}, equally)
        failed = refit_widths(resizing, deployed.params, asked)
        numbers = dict(deployed.numbers)
        for name, value in {"c2m3-failed-candidates": failed, "c2m3-repair-seconds": perf_counter() - started}.items():
            known = numbers[name]
            assert not isinstance(known, list)  # as `deploy` counts them
            numbers[name] = known + value
        return numbers

    def _say(self, deployed: Deployed) -> None:
        """Log once what the clients were asked for by default and do not give, and data that are unlike theirs."""
        if deployed.headless and not self._headless:
            self._headless = True
            log(INFO, "\t> no head from labels among the candidates: %s", deployed.headless)
        if deployed.unlike and not self._unlike:
            self._unlike = True
            log(WARNING, "\t> %s", deployed.unlike)
        if deployed.unjudged and not self._unjudged:
            self._unjudged = True
            log(WARNING, "\t> the clients do not judge, other evidence decides: %s", deployed.unjudged)

    def _deploys(self, server_round: int) -> bool:
        """Whether clients are asked for the deployment in this round."""
        how = self.setup.options.deploy
        if how == "every" or server_round == self.total:
            return True
        if how != "last":
            return server_round % how == 0
        if self.total is None and (self.setup.asks or self.setup.offered) and not self._said:
            self._said = True
            log(INFO, "\t> the number of rounds is unknown: every round deploys")
        return self.total is None

    def state_dict(self) -> dict[str, Tensor]:
        """Everything remembered, as tensors."""
        widths = {} if self.resizing is None else self.resizing.state_dict()
        headless = {_HEADLESS: torch.ones((), dtype=torch.uint8)} if self._headless else {}
        return self.setup.aligner.memory.state_dict() | self.models.state_dict() | widths | headless

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Remember that instead; `SpecError` for widths where the strategy has one width.

        A state that is refused changes nothing.
        """
        before = self.state_dict()
        try:
            self._load(state)
        except Exception:
            self._load(before)
            raise

    def _load(self, state: Mapping[str, Tensor]) -> None:
        ours = {prefix: {k: v for k, v in state.items() if k.startswith(prefix)} for prefix in (PREFIX, WIDTHS)}
        rest = {k: v for k, v in state.items() if k != _HEADLESS and not k.startswith((PREFIX, WIDTHS))}
        if self.resizing is not None:
            self.resizing.load_state_dict(ours[WIDTHS])
        elif ours[WIDTHS]:
            raise SpecError("the state is of clients of several widths: pass the same sizes=")
        self.setup.aligner.memory.load_state_dict(rest)
        self.models.load_state_dict(ours[PREFIX])
        self.over = False
        self._headless = _HEADLESS in state
