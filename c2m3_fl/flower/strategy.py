"""C2M3 as a Flower strategy: align the clients' neurons, then let any strategy aggregate."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from copy import copy
from functools import partial
from inspect import currentframe
from logging import ERROR, INFO, WARNING
from typing import Unpack

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg, FedAvgM, QFedAvg, Result, Strategy
from flwr.supercore import log
from torch import Tensor, nn

from c2m3_fl.core.spec import Params
from c2m3_fl.core.state_dicts import check_finite
from c2m3_fl.errors import CalibrationError, ConfigError
from c2m3_fl.flower.client_repair import ClientStatistics, own_moments, repair_by_clients
from c2m3_fl.flower.options import Options
from c2m3_fl.flower.privacy import check_privacy
from c2m3_fl.flower.records import from_params, reply_schema, schema_of, to_params
from c2m3_fl.flower.replies import Reply, report_dropped, sort_evaluations, sort_messages
from c2m3_fl.flower.reports import Numbers, failure, report_idle
from c2m3_fl.flower.rounds import Aligned, Finish, Rounds
from c2m3_fl.flower.wrapped import chain, check_instance
from c2m3_fl.merging.recalibrate.auto import Auto
from c2m3_fl.merging.recalibrate.registry import Recalibration
from c2m3_fl.merging.reports import Recalibrated
from c2m3_fl.network.calibration import Calibration, ExampleInputs

Evaluate = Callable[[int, ArrayRecord], MetricRecord | None]


class C2M3(Strategy):
    """Align the clients' neurons before another strategy aggregates them.

    Every reply is checked, permuted into the basis of the global model that was sent out, and handed to the
    wrapped strategy, whose result is recalibrated where there is calibration data. When nothing needs to move
    and nothing is recalibrated, the floating tensors of the global model are, bit for bit, what the wrapped
    strategy returns for the same replies in the same order. A reply that cannot be used is dropped, counted and
    logged; with too few left, the previous global model stays.

    Parameters
    ----------
    strategy : Strategy, optional
        Whatever aggregates the aligned replies; `FedAvg()` by default.
    model : nn.Module
        The architecture whose arrays are exchanged; not mutated.
    example_inputs : Tensor or tuple of Tensor, optional
        Inputs that the network can be traced with; by default the first calibration batch.
    calibration : iterable of batches or ClientStatistics, optional
        Inputs that the server holds, labels or none, for recalibration; or `ClientStatistics()`, to let the
        clients measure on theirs.
    recalibrate : str or Recalibration
        What to do with them: "none", "repair", or any other name or object that `merge` takes.
    moments : ClientStatistics, optional
        For `recalibrate="auto"` with calibration data on the server: also ask every client for the channel moments
        of its own reply on its own data, which show whether the server's data are like theirs.
    device : torch.device or str, optional
        Where to match and repair; by default CUDA when there is one, else the CPU.
    **options : Options
        See `c2m3_fl.flower.options.Options`.

    Raises
    ------
    ConfigError
        For unknown options, and for wrappers for differential privacy whose bound would no longer hold.
    CalibrationError, TraceError
        For unusable calibration data, or a model that cannot be exported.

    Examples
    --------
    >>> import torch
    >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
    >>> strategy = C2M3(FedAvg(fraction_evaluate=0.5), model=net, example_inputs=torch.zeros(1, 4))
    """

    def __init__(
        self,
        strategy: Strategy | None = None,
        *,
        model: nn.Module,
        example_inputs: ExampleInputs | None = None,
        calibration: Calibration | ClientStatistics | None = None,
        recalibrate: Recalibration | str = "repair",
        moments: ClientStatistics | None = None,
        device: torch.device | str | None = None,
        **options: Unpack[Options],
    ) -> None:
        self.strategy = FedAvg() if strategy is None else strategy
        check_instance(self.strategy, Strategy, C2M3)
        self.rounds = Rounds(model, example_inputs, calibration, recalibrate, device, options)
        if not isinstance(moments, ClientStatistics | None):
            raise ConfigError(f"moments is {moments!r}, expected ClientStatistics()")
        if moments is not None and not self.rounds.holds_data:
            raise ConfigError(
                "moments tell whether the server's calibration data are like the clients': pass calibration"
            )
        if moments is not None and not isinstance(self.rounds.recalibration, Auto):
            raise ConfigError(f'moments serve recalibrate="auto" alone, not {recalibrate!r}: leave one of them out')
        self.moments = moments
        self.sent = from_params(model.state_dict())
        self._schema = schema_of(self.sent, "model")
        self._grid: Grid | None = None
        self._check_privacy(self.strategy)

    def start(
        self,
        grid: Grid,
        initial_arrays: ArrayRecord,
        num_rounds: int = 3,
        timeout: float = 3600,
        train_config: ConfigRecord | None = None,
        evaluate_config: ConfigRecord | None = None,
        evaluate_fn: Evaluate | None = None,
    ) -> Result:
        """Run the federation; see `Strategy.start`. Says in the end in how many rounds nothing was aggregated."""
        result = super().start(grid, initial_arrays, num_rounds, timeout, train_config, evaluate_config, evaluate_fn)
        report_idle(result, num_rounds)
        return result

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Remember the model that is sent out, and let the wrapped strategy choose who gets it."""
        self._refuse_private_caller()
        params = to_params(arrays)
        self.rounds.spec.check(params, "the arrays to send out")
        check_finite(params, "the arrays to send out")
        self.sent, self._grid = arrays.copy(), grid
        for each in chain(self.strategy):
            if isinstance(each, FedAvgM) and each.current_arrays is not None:
                each.current_arrays = arrays  # what it returned may have been repaired since
        return self._personal(self.strategy.configure_train(server_round, arrays, config, grid))

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Align the replies, aggregate them with the wrapped strategy, and recalibrate the result."""
        expected = reply_schema(self._schema, schema_of(self.sent))
        found = sort_messages(replies, expected, weighted_by=self._weighted_by, required=self._required)

        def aggregate(aligned: Aligned) -> tuple[Params | None, MetricRecord | None]:
            arrays, metrics = self.strategy.aggregate_train(server_round, _messages(aligned))
            return None if arrays is None else to_params(arrays), MetricRecord(dict(metrics or {}))

        sent, asking = to_params(self.sent, expected), self._asking()
        outcome = self.rounds.play(found, sent, self.strategy, aggregate, asking)
        arrays = self.sent.copy() if outcome.params is None else from_params(outcome.params)
        return arrays, _joined(outcome.metrics, outcome.numbers)

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Let the wrapped strategy configure the evaluation."""
        return self._personal(self.strategy.configure_evaluate(server_round, arrays, config, grid))

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """Let the wrapped strategy aggregate the evaluation; a round is not worth a run here either."""
        if self._averages:
            found = sort_evaluations(replies, weighted_by=self._weighted_by)
            report_dropped(found.dropped)
            replies = [each.source for each in found.replies]
        try:
            return self.strategy.aggregate_evaluate(server_round, replies)
        except Exception as error:
            log(ERROR, "\t> %s", failure(f"the evaluation of {type(self.strategy).__name__}", error))
            return None

    def summary(self) -> None:
        """Log the configuration of the strategy and of the one that it wraps."""
        spec, options = self.rounds.spec, self.rounds.options
        log(INFO, "\t├──> C2M3 settings:")
        log(INFO, "\t│\t├── Wrapped strategy: %s", type(self.strategy).__name__)
        units = sum(group.size for group in spec.groups.values())
        log(INFO, "\t│\t├── Permutable: %d units in %d groups", units, len(spec.groups))
        log(INFO, "\t│\t├── Alignment: %s | basis: %s", options["alignment"], options["basis"])
        log(INFO, "\t│\t├── Recalibration: %s", self.rounds.recalibration if self.rounds.calibrated else "OFF")
        log(INFO, "\t│\t└── Device: %s", self.rounds.device)
        self.strategy.summary()

    def state_dict(self) -> dict[str, Tensor]:
        """What is remembered between rounds: where each node was last found."""
        return self.rounds.aligner.memory.state_dict()

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Remember that instead."""
        self.rounds.aligner.memory.load_state_dict(state)

    @property
    def _averages(self) -> list[FedAvg]:
        """The strategies inside that average by a weight, outermost first."""
        return [each for each in chain(self.strategy) if isinstance(each, FedAvg)]

    @property
    def _weighted_by(self) -> str:
        """Key of the averaging weight, as the innermost wrapped strategy has it."""
        return self._averages[-1].weighted_by_key if self._averages else "num-examples"

    @property
    def _required(self) -> list[str]:
        """Metrics without which the wrapped strategy cannot aggregate."""
        return [each.train_loss_key for each in chain(self.strategy) if isinstance(each, QFedAvg)]

    def _asking(self) -> Finish | None:
        """How to recalibrate with what clients measure; None where nobody is to be asked."""
        rounds, statistics, recalibration, grid = self.rounds, self.moments, self.rounds.recalibration, self._grid
        if grid is None or recalibration is None:
            return None
        if isinstance(rounds.calibration, ClientStatistics):
            return partial(self._repaired_by_clients, rounds.calibration, recalibration, grid)
        if statistics is None:
            return None

        def finish(merged: Params, aligned: Aligned) -> Recalibrated:
            try:
                found = own_moments(statistics, grid, aligned.nodes, rounds.model, rounds.inputs, aligned.params)
            except CalibrationError as error:
                log(WARNING, "\t> the clients' own moments are not known, so nothing shows a shift: %s", error)
                found = []
            return rounds.recalibrated(merged, aligned, found)

        return finish

    def _repaired_by_clients(
        self, statistics: ClientStatistics, how: Recalibration, grid: Grid, merged: Params, aligned: Aligned
    ) -> Recalibrated:
        model, inputs, weights = self.rounds.model, self.rounds.inputs, aligned.weights
        return repair_by_clients(statistics, how, grid, aligned.nodes, model, inputs, merged, aligned.params, weights)

    def _personal(self, messages: Iterable[Message]) -> Iterable[Message]:
        """The same messages, every client's model in its own basis where that was asked for."""
        if self.rounds.options["basis"] != "client":
            return messages
        aligner = self.rounds.aligner
        personal = []
        for message in messages:
            key, record = next(iter(message.content.array_records.items()))
            params = to_params(record)
            own = aligner.own_basis(message.metadata.dst_node_id, params)
            personal.append(message if own is params else _carrying(message, {key: from_params(own)}))
        return personal

    def _check_privacy(self, strategy: object) -> None:
        check_privacy(
            strategy, separate=self.rounds.options["alignment"] == "separate", calibrated=self.rounds.calibrated
        )

    def _refuse_private_caller(self) -> None:
        """Refuse to be wrapped for differential privacy: who wraps a strategy is only seen among its callers."""
        frame = currentframe()
        while frame is not None:
            self._check_privacy(frame.f_locals.get("self"))
            frame = frame.f_back


def _messages(aligned: Aligned) -> list[Message]:
    """The replies with their aligned arrays, for the wrapped strategy, which may consume them."""
    return [
        _carrying(reply.source, {next(iter(reply.source.content.array_records)): _arrays(reply, params)})
        for reply, params in zip(aligned.replies, aligned.params, strict=True)
    ]


def _arrays(reply: Reply[Message], params: Params) -> ArrayRecord:
    """The aligned arrays in the order of the schema; those that did not change are the client's own.

    Integer arrays go as float64, which every strategy's arithmetic takes, and give the same floating results.
    """
    received = next(iter(reply.source.content.array_records.values()))
    arrays = {}
    for name, value in params.items():
        if not value.is_floating_point():
            arrays[name] = Array(np.asarray(value.double().numpy()))
        else:
            arrays[name] = received[name] if value is reply.params[name] else Array(np.asarray(value.numpy()))
    return ArrayRecord(arrays)


def _carrying(message: Message, arrays: Mapping[str, ArrayRecord]) -> Message:
    """A copy of a message with other arrays: a new message cannot be made outside of a client or server app."""
    records = {
        key: copy(record) if isinstance(record, MetricRecord) else record for key, record in message.content.items()
    }
    carrying = copy(message)
    carrying.content = RecordDict({**records, **arrays})
    return carrying


def _joined(metrics: MetricRecord | None, numbers: Numbers) -> MetricRecord:
    """The wrapped strategy's metrics and ours in one record."""
    return MetricRecord({**(metrics or {}), **numbers})
