"""Repair without calibration data on the server: the clients measure, the server repairs.

The server sends networks in ``query`` messages; a client runs them on data of its own and returns the mean, the
spread and the count of every channel, never an activation or an input. The server pools them, which is exact, and
corrects the merged network operator by operator, asking again before each one because every correction changes
what the later ones see.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid

from c2m3_fl.core.spec import Params
from c2m3_fl.errors import CalibrationError, ConfigError, ParamsError
from c2m3_fl.flower.incoming.admitted import fault_of, report_unanswered
from c2m3_fl.flower.incoming.records import Entry, from_params, to_params
from c2m3_fl.flower.incoming.replies import only_arrays
from c2m3_fl.flower.queries.moments import ACTION
from c2m3_fl.merging.recalibrate.from_clients.packing import moments_shapes, read_moments
from c2m3_fl.merging.recalibrate.from_clients.pool import outlying
from c2m3_fl.merging.recalibrate.from_clients.sums import MomentsAnswer
from c2m3_fl.merging.recalibrate.repair import BatchNormStatistics, Repair, repair_measured
from c2m3_fl.merging.recalibrate.short_names import Recalibration
from c2m3_fl.merging.recalibrate.targets import Target, output_moments, pool, pooled_targets
from c2m3_fl.merging.reports import Recalibrated, RecalibrationReport
from c2m3_fl.network.calibration_set import CalibrationSet
from c2m3_fl.network.moments import Moments
from c2m3_fl.network.operators import Operator
from c2m3_fl.ranges import check_positive

_VALUES = 2**20  # that every client counts for, under strategies that ignore weights
Ask = tuple[int, str, Params]  # whom, about what, and the network to measure


@dataclass(frozen=True)
class ClientStatistics:
    """Calibrate with what the clients measure; pass it as `calibration`.

    Every client needs one line, `answer_statistics`. A round costs one query for the targets and one for every
    operator that is corrected. The merged network is always measured on all data: its moments, and so BatchNorm's
    statistics, are those of the pooled data.

    The targets differ. Repair on pooled data runs every endpoint on every client's data. Without inputs on the server,
    that requires clients to run each other's networks. `endpoints` decides whether they do.

    Attributes
    ----------
    endpoints : {"own", "all"}
        "own" (default): a client measures the merged network and its own aligned reply, two networks whatever the
        number of clients; no client sees another client's network. The result is that of a server which holds all
        data and runs every endpoint on its own client's share of them. If all shares have one distribution, that is
        repair on the pooled data; it differs the more, the more the distributions do.
        "all": every client measures every aligned reply: exactly repair on the pooled data. It costs as many
        networks per client as there are clients, and shows them to all.
    timeout : float
        Seconds to wait for the answers to a query; clients that do not answer in time are left out of it.
    """

    endpoints: Literal["own", "all"] = "own"
    timeout: float = 600.0

    def __post_init__(self) -> None:
        if self.endpoints not in ("own", "all"):
            raise ConfigError(f"endpoints is {self.endpoints!r}, expected 'own' or 'all'")
        check_positive("timeout", self.timeout)


def check_measurable(recalibration: Recalibration | None) -> None:
    """Raise `ConfigError` for a recalibration that needs more than moments."""
    if not isinstance(recalibration, Repair | BatchNormStatistics | None):
        raise ConfigError(f"{type(recalibration).__name__} needs inputs, not moments: hold calibration data instead")


def repair_by_clients(
    statistics: ClientStatistics,
    recalibration: Recalibration,
    grid: Grid,
    nodes: Sequence[int],
    calibration: CalibrationSet,
    merged: Params,
    endpoints: Sequence[Params],
    weights: Sequence[float],
    *,
    equally: bool = False,
) -> Recalibrated:
    """Repair a merged network with the moments that clients measure.

    Parameters
    ----------
    statistics : ClientStatistics
        Who measures what.
    recalibration : Repair or BatchNormStatistics
        What to do with it.
    grid : Grid
        Where the clients are.
    nodes : sequence of int
        Whom to ask, one node per endpoint, in a stable order.
    calibration : CalibrationSet
        The architecture, exported for example inputs.
    merged : mapping of str to Tensor
        The merged state dict; not mutated.
    endpoints : sequence of mappings of str to Tensor
        The aligned replies.
    weights : sequence of float
        Their averaging weights.
    equally : bool
        Whether every client counts the same, whatever number of values it claims.

    Raises
    ------
    CalibrationError
        When a query gets no usable answer at all.
    ConfigError
        For a recalibration that needs more than moments.
    """
    check_measurable(recalibration)
    assert isinstance(recalibration, Repair | BatchNormStatistics)
    program = calibration.program
    params = dict(merged)
    survey = _Survey(grid, statistics.timeout, calibration, params, equally=equally)
    targets: Mapping[str, Target] = {}
    if isinstance(recalibration, Repair):
        targets = _targets(survey, statistics.endpoints == "all", nodes, endpoints, weights)
    reports = repair_measured(recalibration, program, params, partial(survey.pooled, nodes), targets)
    method = "repair by the clients' statistics" if targets else "batchnorm by the clients' statistics"
    return Recalibrated(params, RecalibrationReport(method, reports, tuple(program.skipped.items())))


def own_moments(
    statistics: ClientStatistics,
    grid: Grid,
    nodes: Sequence[int],
    calibration: CalibrationSet,
    endpoints: Sequence[Params],
) -> dict[int, dict[str, Moments]]:
    """By node, channel moments of its aligned reply on its own data; they show a shift of the server's data.

    Parameters
    ----------
    statistics : ClientStatistics
        How long to wait.
    grid : Grid
        Where the clients are.
    nodes : sequence of int
        Whom to ask, one node per endpoint.
    calibration : CalibrationSet
        The architecture, exported for example inputs.
    endpoints : sequence of mappings of str to Tensor
        The aligned replies.

    Raises
    ------
    CalibrationError
        When fewer than half of the clients give a usable answer.
    """
    survey = _Survey(grid, statistics.timeout, calibration, endpoints[0])
    asks = [(node, str(index), endpoint) for index, (node, endpoint) in enumerate(zip(nodes, endpoints, strict=True))]
    answers = survey.ask(asks)
    found = {node: answers[node, about] for node, about, _ in asks if (node, about) in answers}
    if 2 * len(found) < len(asks):
        silent = [node for node, *_ in asks if node not in found]
        raise CalibrationError(f"no usable channel moments from nodes {silent}, more than half of them")
    return found


class _Survey:
    """Asks clients for moments, and refuses answers that are not of the expected form."""

    def __init__(
        self, grid: Grid, timeout: float, calibration: CalibrationSet, params: Params, *, equally: bool = False
    ) -> None:
        self._grid = grid
        self._equally = equally
        self._timeout = timeout
        self._operators = calibration.program.operators
        with torch.no_grad():  # one pass over the example inputs, to know how many channels to expect
            seen = output_moments([calibration.program], [calibration.example], params)
        self._channels = {name: len(moments.mean) for name, moments in seen.items()}

    def pooled(self, nodes: Sequence[int], place: int, operator: Operator, params: Params, *, before: bool) -> Moments:
        """Moments of one operator over the data of all nodes; a `Measure` once the nodes are known."""
        answers = self.ask([(node, "merged", params) for node in nodes], place, before=before)
        return pool([answers[node, "merged"] for node in nodes if (node, "merged") in answers])[operator.name]

    def ask(
        self, asks: Iterable[Ask], place: int = -1, *, before: bool = False
    ) -> dict[tuple[int, str], dict[str, Moments]]:
        """The usable answers, by node and subject; place -1 asks for every operator's output."""
        config = ConfigRecord({"place": place, "before": int(before)})
        messages = [
            Message(
                RecordDict({"arrays": from_params(params), "config": config}), node, f"query.{ACTION}", group_id=about
            )
            for node, about, params in asks
        ]
        asked = {(message.metadata.dst_node_id, message.metadata.group_id) for message in messages}
        found: dict[tuple[int, str], dict[str, Moments]] = {}
        failed: dict[int, str] = {}
        for reply in self._grid.send_and_receive(messages, timeout=self._timeout):
            node, about = reply.metadata.src_node_id, reply.metadata.group_id
            try:
                if (node, about) not in asked or (node, about) in found:
                    raise ParamsError(f"an answer about {about!r} was not asked for, or came twice")
                found[node, about] = self._read(reply, place)
            except Exception as error:  # whatever one client sends is its fault
                failed[node] = fault_of(node, error).reason
        for key, reason in self._odd(found).items():
            failed[key[0]] = reason
            del found[key]
        if not found:
            first = f" (the first reply: {next(iter(failed.values()))})" if failed else ""
            raise CalibrationError(
                f"no client answered the query for channel moments{first}; every client needs it: "
                "add answer_statistics to its app"
            )
        report_unanswered("moments", failed)
        return found

    def _read(self, reply: Message, place: int) -> dict[str, Moments]:
        record = only_arrays(reply)
        names = [operator.name for operator in (self._operators if place < 0 else [self._operators[place]])]
        schema = {
            f"{name}/{part}": Entry(*entry)
            for name in names
            for part, entry in moments_shapes(self._channels[name]).items()
        }
        arrays = to_params(record, schema, "moments")
        found = {name: read_moments(arrays, name) for name in names}
        return {name: _alike(each) for name, each in found.items()} if self._equally else found

    def _odd(self, found: Mapping[tuple[int, str], Mapping[str, Moments]]) -> dict[tuple[int, str], str]:
        """Answers of another size than the others', and why they do not fit."""
        reasons: dict[tuple[int, str], str] = {}
        for operator in self._operators:
            about = {key: MomentsAnswer(each[operator.name]) for key, each in found.items() if operator.name in each}
            for key, reason in outlying(about).items():
                reasons.setdefault(key, f"of {operator.module or operator.name} {reason}")
        return reasons


def _alike(moments: Moments) -> Moments:
    """The same mean and spread, of as many values as every client's."""
    return Moments(_VALUES, moments.mean, moments.variance * _VALUES)


def _targets(
    survey: _Survey, exact: bool, nodes: Sequence[int], endpoints: Sequence[Params], weights: Sequence[float]
) -> dict[str, Target]:
    """Target moments, from each endpoint on its own client's data or on all clients' data."""
    asks = [
        (node, str(index), endpoint)
        for index, endpoint in enumerate(endpoints)
        for node in (nodes if exact else [nodes[index]])
    ]
    answers = survey.ask(asks)
    found = [
        [answers[node, str(index)] for node in nodes if (node, str(index)) in answers]
        for index in range(len(endpoints))
    ]
    return pooled_targets(found, weights)
