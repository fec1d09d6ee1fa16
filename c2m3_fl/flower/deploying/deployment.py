"""From a round's aggregate to the model that is deployed: one of the candidates.

No value that one client sends and no failure of a candidate disables the deployment: the fallback is the aggregate.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from logging import ERROR, INFO
from time import perf_counter

from flwr.supercore import log

from c2m3_fl.core.spec import Params
from c2m3_fl.core.state_dicts import same
from c2m3_fl.flower.deploying.candidates import AGGREGATE, Candidates
from c2m3_fl.flower.deploying.request import Clients, Request
from c2m3_fl.flower.generators import undisturbed
from c2m3_fl.flower.judging.judge import ClientJudge, judge_candidates, report_verdict
from c2m3_fl.flower.messages import personal_messages
from c2m3_fl.flower.metrics import Numbers, failure
from c2m3_fl.flower.setup import Setup
from c2m3_fl.merging.evaluate.decide import DeploymentDecision, judge_by_labels
from c2m3_fl.merging.recalibrate.auto import Auto
from c2m3_fl.merging.recalibrate.head.last_layer import with_temperature

__all__ = ["Clients", "Deployed", "Request", "deploy", "wants_plain"]

_TEMPERATURES = (0.5, 0.7, 1.4, 2.0, 3.0)  # beside 1; the loss is smooth in them, and convex in 1 / temperature
_ASKED = 100  # nodes at most, those of the round included, if they are not more
_FEWEST = 3  # clients that choose one: two with few classes each do not know how sure of the others a model should be


@dataclass(frozen=True, eq=False)
class Deployed:
    """The deployed model, the aggregate's own object where that was chosen; and the numbers.

    `unjudged` says why clients were to judge and did not, `headless` why they did not answer for a head that nobody
    asked for, `unlike` what shows that the calibration inputs are unlike the clients' data; "" otherwise. `answered`
    are the nodes by whose answers a refit was made. `finite`: whether all candidates were.
    """

    params: Params
    numbers: Numbers
    unjudged: str = ""
    headless: str = ""
    unlike: str = ""
    answered: tuple[int, ...] = ()
    finite: bool = True


def wants_plain(setup: Setup) -> bool:
    """Whether a guard compares with the aggregate without alignment."""
    if not setup.data.batches:
        return False
    guarded = setup.decides and (setup.data.labelled or setup.moments is not None)
    return guarded or isinstance(setup.recalibration, Auto)


def deploy(setup: Setup, request: Request) -> Deployed:
    """Make the candidates that the evidence supports, and choose one; the global random states stay as they are.

    Parameters
    ----------
    setup : Setup
        Of the strategy.
    request : Request
        What the round gave.
    """
    started, request = perf_counter(), _with_others(request)
    with undisturbed():
        found = Candidates(setup, request)
        chosen, numbers, unjudged, judged = _choose(setup, request, found)
        params = request.aggregate if chosen == AGGREGATE else found.params[chosen]
        if judged and not (isinstance(setup.judge, ClientJudge) and len(request.nodes) < _FEWEST):
            params, tempered = _at_best_temperature(setup, request, params)
            numbers |= tempered
    tried = setup.calibrated or (request.deploys and bool(setup.asks))
    if not tried and len(found.params) == 1 and not found.failed:
        return Deployed(request.aggregate, {}, headless=found.headless)
    # the aggregate itself may be of another precision than the candidates: some strategies return float64
    changed = params is not request.aggregate and not same(found.params[AGGREGATE], params)
    if len(found.params) > 1:
        log(INFO, "\t> deployed: %s", chosen)
    numbers = {
        **found.numbers,
        **numbers,
        **{f"c2m3-deployed/{name}": int(name == chosen) for name in found.params},
        "c2m3-failed-candidates": found.failed,
        "c2m3-repaired": int(changed),
        "c2m3-repair-seconds": perf_counter() - started,
    }
    return Deployed(params, numbers, unjudged, found.headless, found.unlike, found.answered, found.finite)


def _with_others(request: Request) -> Request:
    """Let clients that did not train in the round judge and answer for a head, too.

    The clients of a round may know few of the classes: what is fitted to their data, and they judge better, can be
    worse for all others. Nodes whose replies are missing or were left out are not asked.
    """
    if request.clients is None or not request.deploys:
        return request
    try:
        connected = set(request.clients.grid.get_node_ids())
    except Exception as error:  # those of the round are known
        log(INFO, "\t> only the clients of this round are asked: %s: %s", type(error).__name__, error)
        return request
    others = sorted(connected - request.clients.sampled - {*request.nodes})
    room = min(len(others), max(0, _ASKED - len(request.nodes)))
    drawn = random.Random(request.clients.round_number).sample(others, room)
    return replace(request, nodes=(*request.nodes, *sorted(drawn)))


def _choose(setup: Setup, request: Request, found: Candidates) -> tuple[str, Numbers, str, bool]:
    """The judge's choice, its numbers, why there was no judgement, and whether there was one of all candidates.

    Where there is no metric to judge by, the candidate in which every step was taken; where too few clients judged,
    the one that the others would have to be better than.
    """
    candidates = found.judged
    if len(candidates) < 2:
        return found.last, {}, "", False
    try:
        verdict = _judge(setup, request, candidates)
    except Exception as error:  # if a judge fails that was asked for, keep the aggregate
        reason = failure("the judge", error)
        if setup.tentative:
            return found.last, {}, reason if found.compares_all else "", False
        log(ERROR, "\t> %s: the aggregate is deployed", reason)
        return AGGREGATE, {}, "", False
    if verdict is None:
        return found.last, {}, "", False
    numbers = report_verdict(verdict)
    if verdict.judged:
        return verdict.chosen, numbers, "", found.compares_all
    if verdict.key:
        log(INFO, "\t> judge: %r is deployed: %s", verdict.chosen, verdict.reason)
        return verdict.chosen, numbers, "", False
    return found.last, numbers, verdict.reason if found.compares_all else "", False


def _at_best_temperature(setup: Setup, request: Request, params: Params) -> tuple[Params, Numbers]:
    """The chosen network with its scores divided by the temperature that the judge prefers; 1 is the network itself.

    Averages of skewed clients are too little confident, overfitted ones too much. Networks whose output is not that of
    one linear layer stay as they are.
    """
    try:
        tempered = {f"temperature {each}": with_temperature(setup.data.program, params, each) for each in _TEMPERATURES}
        verdict = _judge(setup, request, {"temperature 1": params, **tempered})
    except Exception as error:  # the chosen network itself is judged already
        log(INFO, "\t> no temperature: %s", error)
        return params, {}
    if verdict is None or not verdict.judged:
        return params, {}
    voters = {each.name: each.voters for each in verdict.candidates}
    if isinstance(setup.judge, ClientJudge) and voters[verdict.chosen] < _FEWEST:
        return params, {}  # of the clients that were asked, too few answered
    log(INFO, "\t> judge: %s: %s", verdict.chosen, verdict.reason)
    chosen = {"temperature 1": params, **tempered}[verdict.chosen]
    return chosen, {"c2m3-temperature": float(verdict.chosen.removeprefix("temperature "))}


def _judge(setup: Setup, request: Request, candidates: Mapping[str, Params]) -> DeploymentDecision | None:
    """The verdict; None where nobody judges, or clients are to judge and are not asked in this round."""
    if setup.judge is None:
        return None
    if not isinstance(setup.judge, ClientJudge):
        return judge_by_labels(setup.judge.programs, candidates, setup.judge.batches)
    if not request.deploys or request.clients is None:
        return None
    clients = request.clients
    return judge_candidates(
        setup.judge,
        clients.grid,
        request.nodes,
        candidates,
        round_number=clients.round_number,
        config=clients.config,
        arrays_key=clients.arrays_key,
        config_key=clients.config_key,
        weighted_by=clients.weighted_by,
        equally=request.equally,
        personal=partial(personal_messages, setup.aligner),
    )
