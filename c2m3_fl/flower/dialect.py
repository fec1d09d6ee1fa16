"""The callbacks of a round in the current dialect of Flower's strategies."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import replace
from functools import partial
from logging import INFO

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result, Strategy
from flwr.supercore import log
from torch import Tensor

from c2m3_fl.flower.adapters import Lora, averaging_products, bases_of, check_lora
from c2m3_fl.flower.arriving.listening import Listening
from c2m3_fl.flower.deploying.deployment import Clients
from c2m3_fl.flower.exchanged import exchanging, model_names
from c2m3_fl.flower.incoming.records import (
    Schema,
    check_record,
    from_params,
    reply_schema,
    schema_of,
    schema_of_params,
    to_params,
)
from c2m3_fl.flower.incoming.replies import sort_messages
from c2m3_fl.flower.messages import aggregate_evaluations, aggregate_messages, personal_messages
from c2m3_fl.flower.metrics import report_idle, reported
from c2m3_fl.flower.misuse import check_exchanged, check_fits, check_prefixes, check_start
from c2m3_fl.flower.privacy import check_callers, check_privacy
from c2m3_fl.flower.rounds import Aggregate
from c2m3_fl.flower.server import Server
from c2m3_fl.flower.setup import Setup
from c2m3_fl.flower.two_models import trajectory_names
from c2m3_fl.flower.widths.arriving import widen_messages
from c2m3_fl.flower.widths.leaving import sized_messages
from c2m3_fl.flower.widths.padding import check_padding
from c2m3_fl.flower.widths.sizes import check_no_adapters, check_whole
from c2m3_fl.flower.wrapped import continue_from, ignores_weights, record_keys, refuse_steps, required_metrics

Evaluate = Callable[[int, ArrayRecord], MetricRecord | None]
_SENT = "the arrays to send out"
_SUMMARY = {
    "exact": "averaged as products",
    "residual": "averaged as products, the rest is added to the base",
}


class Dialect(Strategy):
    """A server in messages: `C2M3` without its options.

    Parameters
    ----------
    strategy : Strategy
        Aggregates the aligned replies.
    setup : Setup
        What was built from the options.
    exchanged : iterable of str, optional
        See `C2M3`.
    lora : {"apart", "exact", "residual"}
        See `C2M3`.
    """

    def __init__(self, strategy: Strategy, setup: Setup, exchanged: Iterable[str] | None, lora: Lora) -> None:
        check_lora(lora, strategy)
        check_no_adapters(setup.sizes, lora)
        if setup.sizes is not None and setup.refit is not None:
            check_padding(setup.sizes.networks, setup.refit)
        refuse_steps(strategy, setup.spec)
        self.strategy, self.setup, self._lora = strategy, setup, lora
        self._whole, self._named = setup, exchanged is not None
        self.server = Server(setup)
        schema_of_params(setup.model.state_dict())
        if exchanged is not None:
            check_whole(setup.sizes, check_exchanged(exchanged), setup.spec.tensors)
            self.setup = exchanging(setup, check_exchanged(exchanged))
            self.server.rebuild(self.setup)
        self._bases = bases_of(lora, self.setup)
        self.sent = from_params(self.setup.state_dict())
        self._grid: Grid | None = None
        self._sampled: frozenset[int] = frozenset()  # whom a message of this round was sent to
        self._listening: Listening | None = None
        self._evaluate_config: ConfigRecord | None = None
        check_privacy(self.strategy, **self.setup.bounds, asks=self.setup.asks)
        self.own_names = frozenset(vars(self))  # a subclass has others, too

    @property
    def wrapped(self) -> Strategy:
        """The strategy that was passed: its attributes, and the methods that are its own, are there."""
        return self.strategy

    @property
    def trajectory(self) -> ArrayRecord | None:
        """What clients train next; None before the first aggregate of a run."""
        found = self.server.models.trajectory
        return None if found is None else from_params(found)

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
        check_record(initial_arrays, "initial_arrays")
        self.begin_run(num_rounds, evaluate_config)
        try:
            result = super().start(
                grid, initial_arrays, num_rounds, timeout, train_config, evaluate_config, evaluate_fn
            )
        finally:
            self._stop_listening()
            self.server.drop_ahead()
            self.server.over = True
        report_idle(result, num_rounds)
        return result

    def begin_run(self, num_rounds: int, evaluate_config: ConfigRecord | None = None) -> None:
        """Forget the trajectory of an earlier run; called by whoever starts a run, outer wrappers included.

        Parameters
        ----------
        num_rounds : int
            Of the whole run: the last one deploys.
        evaluate_config : ConfigRecord, optional
            Sent along when clients judge.
        """
        self.server.begin_run(num_rounds)
        self._evaluate_config = evaluate_config

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Send out the trajectory, or `arrays` where they are a new start, to whom the wrapped strategy chooses."""
        check_callers(**self.setup.bounds, asks=self.setup.asks)
        params = to_params(arrays)
        check_prefixes(params, self._whole.spec.tensors, _SENT)
        if self._named:
            check_start(params, self.setup.spec.tensors)
        elif params and model_names(params, self._whole.spec.tensors) is not None:
            self._exchange(list(params))
        check_fits(params, self.setup, _SENT)
        start = self.server.next_start(params)
        self.sent = arrays.copy() if start is params else from_params(start)
        self._grid = grid
        continue_from(self.strategy, self.sent)
        messages = list(self.strategy.configure_train(server_round, self.sent.copy(), config, grid))
        self._sampled = frozenset(each.metadata.dst_node_id for each in messages)
        if self.server.resizing is not None:
            return sized_messages(self.server.resizing, messages, grid, deployed=False)
        self._listen(grid)
        return personal_messages(self.setup.aligner, messages)

    def _listen(self, grid: Grid) -> None:
        """Read the replies of this round as they arrive."""
        self._stop_listening()
        if self.server.ahead is not None:
            weight = None if ignores_weights(self.strategy) else record_keys(self.strategy)[-1]
            self._listening = Listening(
                grid, partial(self.server.ahead.hear, schema=self._expected, weighted_by=weight)
            )

    def _stop_listening(self) -> None:
        if self._listening is not None:
            self._listening.close()
            self._listening = None

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Align the replies, aggregate them with the wrapped strategy, and deploy the result."""
        self._stop_listening()
        expected = self._expected
        *_, weight = record_keys(self.strategy)
        if self.server.sent is None:
            self.server.next_start(to_params(self.sent))
        arrived = self.server.arrived(replies, expected, widen_messages)
        required, ahead = required_metrics(self.strategy), self.server.ahead
        decode = None if ahead is None else ahead.finished().decoded
        found = sort_messages(arrived.replies, expected, weighted_by=weight, required=required, decode=decode)
        found = replace(found, dropped=(*arrived.dropped, *found.dropped))
        aggregate: Aggregate[MetricRecord] = partial(aggregate_messages, self.strategy, server_round)
        if self._lora != "apart":
            aggregate = averaging_products(aggregate, self._bases)
        params, metrics, numbers = self.server.play(
            server_round, found, self.strategy, aggregate, self._clients(server_round)
        )
        told = reported(numbers, every=self.setup.options.diagnostics)
        return from_params(params), MetricRecord({**(metrics or {}), **told})

    def at_width(self, arrays: ArrayRecord, size: int) -> ArrayRecord:
        """A deployed model at one of the narrower widths, refit by the clients or recalibrated by the server's data.

        Parameters
        ----------
        arrays : ArrayRecord
            Of the model's width: what `start` returns, say.
        size : int
            Which of the option `sizes`, from 0.

        Raises
        ------
        ConfigError
            When there is no such size.
        """
        params = to_params(arrays)
        check_fits(params, self.setup, "arrays")
        return from_params(self.server.at_width(params, size))

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Let the wrapped strategy configure the evaluation."""
        self._evaluate_config = ConfigRecord(dict(config))
        messages = self.strategy.configure_evaluate(server_round, arrays, config, grid)
        if self.server.resizing is not None:
            return sized_messages(self.server.resizing, messages, grid, deployed=True)
        return personal_messages(self.setup.aligner, messages)

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """Let the wrapped strategy aggregate the evaluations that can be averaged; a failure does not end the run."""
        return aggregate_evaluations(self.strategy, server_round, replies)

    def summary(self) -> None:
        """Log the configuration of the strategy and of the one that it wraps."""
        options, spec = self.setup.options, self.setup.spec
        log(INFO, "\t├──> C2M3 settings:")
        log(INFO, "\t│\t├── Wrapped strategy: %s", type(self.strategy).__name__)
        units = sum(group.size for group in spec.groups.values())
        log(INFO, "\t│\t├── Permutable: %d units in %d groups", units, len(spec.groups))
        if self.setup.sizes is not None:
            log(INFO, "\t│\t├── Widths: %d", len(self.setup.sizes.networks))
        log(INFO, "\t│\t├── Alignment: %s | basis: %s", options.alignment, options.basis)
        log(INFO, "\t│\t├── Recalibration: %s", self.setup.describe())
        if self._lora != "apart":
            log(INFO, "\t│\t├── Adapters: %s", _SUMMARY[self._lora])
        log(INFO, "\t│\t├── Feedback: %s | deploy: %s", options.feedback, options.deploy)
        log(INFO, "\t│\t└── Device: %s", self.setup.device)
        self.strategy.summary()

    def state_dict(self) -> dict[str, Tensor]:
        """What is remembered between rounds: where each node was last found, the trajectory and its digest.

        Also that clients did not answer for a head that nobody asked for, so that none is asked again. With `sizes` the
        nodes' widths, and the restrictions of the deployed model that clients have refit.
        """
        return self.server.state_dict()

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Remember that instead; a state that is refused changes nothing."""
        names, before = trajectory_names(state), (self.setup, self._bases)
        try:
            if names and not self._named:
                self._exchange(names)
            self.server.load_state_dict(state)
        except Exception:
            self.setup, self._bases = before
            self.server.rebuild(self.setup)
            raise

    def _exchange(self, names: Collection[str]) -> None:
        """Expect the tensors of these names from now on."""
        check_whole(self.setup.sizes, names, self.setup.spec.tensors)
        if set(names) != set(self.setup.spec.tensors):
            self.setup = exchanging(self._whole, names)
            self._bases = bases_of(self._lora, self.setup)
            self.server.rebuild(self.setup)

    @property
    def _expected(self) -> Schema:
        """What replies look like."""
        return reply_schema(schema_of_params(self.setup.state_dict()), schema_of(self.sent))

    def _clients(self, server_round: int) -> Clients | None:
        """Whom to ask in this round; None before anything was sent out."""
        if self._grid is None:
            return None
        keys = record_keys(self.strategy)
        return Clients(self._grid, server_round, self._evaluate_config, *keys, sampled=self._sampled)
