"""C2M3 for servers that still speak `flwr.server.strategy`: parameters without names, fit instead of train."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Literal

import torch
from flwr.common import EvaluateIns, EvaluateRes, FitIns, Parameters, Scalar
from flwr.common import parameters_to_ndarrays as to_ndarrays
from flwr.server.client_manager import ClientManager
from flwr.server.client_proxy import ClientProxy
from flwr.server.strategy import FedAvg, FedAvgM, FedOpt, Strategy
from torch import nn

from c2m3_fl.core.spec import Params, PermutationSpec
from c2m3_fl.errors import ConfigError
from c2m3_fl.flower.adapters import Lora, averaging_products, bases_of, check_lora
from c2m3_fl.flower.aligning.aligner import Basis, Mode
from c2m3_fl.flower.exchanged import exchanging
from c2m3_fl.flower.incoming.admitted import Sorted
from c2m3_fl.flower.incoming.records import Schema, reply_schema, schema_of_params
from c2m3_fl.flower.legacy_messages import (
    Result,
    aggregate_evaluations,
    aggregate_results,
    named_params,
    node_of,
    sort_results,
    to_parameters,
    to_scalars,
)
from c2m3_fl.flower.metrics import reported
from c2m3_fl.flower.misuse import LEGACY, check_exchanged, check_fits, naming_options_of
from c2m3_fl.flower.options import Feedback, Options
from c2m3_fl.flower.privacy import check_callers, check_privacy
from c2m3_fl.flower.queries.refit import ClientRefit, RegMean
from c2m3_fl.flower.queries.repair import ClientStatistics
from c2m3_fl.flower.rounds import Aggregate
from c2m3_fl.flower.server import Server
from c2m3_fl.flower.setup import build_setup
from c2m3_fl.flower.widths.arriving import widen_results
from c2m3_fl.flower.widths.asking import ask_proxies
from c2m3_fl.flower.widths.sizes import check_no_adapters, check_whole
from c2m3_fl.flower.wrapped import chain, check_instance, refuse_steps
from c2m3_fl.merging.recalibrate.short_names import Recalibration
from c2m3_fl.network.calibration import Calibration, ExampleInputs
from c2m3_fl.network.calls import Outputs


class C2M3(Strategy):
    """Align the clients' neurons before another legacy strategy aggregates them.

    The same as the current strategy, `c2m3_fl.flower.C2M3`, in the dialect of `flwr.server.strategy`. Parameters are
    the tensors of the model's state dict in its order: ``[v.numpy() for v in model.state_dict().values()]``. The weight
    of a reply is its number of examples.

    Differences: there is no grid to query clients, so `ClientStatistics`, `moments`, `ClientRefit`, `head` and `judge`
    are refused, `deploy` and `judge_key` do not exist; arrays have no names, so where clients send a part of them
    `exchanged` has to say which, in their order; a legacy server saves no state, but `state_dict` and `load_state_dict`
    are there for one that does; there is no `start`, so a second run on the same object goes on with the trajectory if
    it is given the very model that was returned last.

    Parameters
    ----------
    strategy, model, example_inputs, inputs, outputs, spec, rotations, device, alignment, min_replies
        As for the current strategy; so are `outliers`, `memory`, `max_steps`, `tolerance`, `max_seconds`,
        `memory_limit`, `diagnostics`, `feedback`, `lora`, `sizes`: a client says which width it has by `width_of`
        among its properties, else by the shapes of its first reply.
    calibration : iterable of batches, optional
        Inputs that the server holds, with labels or without, read once, scaled as in training: only BatchNorm's
        buffers show where they are not.
    recalibrate : str or Recalibration, optional
        What the deployed model is made of. None (default): what the evidence supports, labels in the calibration
        data, else REPAIR after rounds in which units moved, else the aggregate. "none", "repair", or any other
        name or object that `merge` takes: that, in every round.
    basis : {"global", "largest", "client"} or int
        Where every round ends: in the basis of the model that was sent out ("global", the default), the same with
        every client's model sent in its own basis ("client"), or in the basis of the reply of largest weight or of
        that node.
    exchanged : sequence of str, optional
        The names of the tensors that clients send, in their order, where these are not the whole state dict.
    head, judge, moments : None
        Refused: they ask clients.

    Raises
    ------
    ConfigError
        For options out of range or that ask clients, and for wrappers for privacy whose bound would no longer hold.
    CalibrationError, TraceError, SpecError
        As there.
    """

    @naming_options_of(LEGACY)
    def __init__(
        self,
        strategy: Strategy | None = None,
        *,
        model: nn.Module,
        example_inputs: ExampleInputs | None = None,
        inputs: Sequence[str] | None = None,
        outputs: Outputs | None = None,
        calibration: Calibration | None = None,
        recalibrate: Recalibration | str | None = None,
        spec: PermutationSpec | None = None,
        rotations: bool = False,
        exchanged: Sequence[str] | None = None,
        lora: Lora = "apart",
        device: torch.device | str | None = None,
        alignment: Mode = "joint",
        basis: Basis = "global",
        min_replies: int = 1,
        outliers: Literal["report", "drop"] = "report",
        memory: int = 1000,
        max_steps: int = 100,
        tolerance: float = 1e-4,
        max_seconds: float | None = None,
        memory_limit: int | None = None,
        diagnostics: bool = False,
        feedback: Feedback = "moved",
        head: None = None,
        judge: None = None,
        moments: None = None,
        sizes: Iterable[nn.Module] | None = None,
    ) -> None:
        self.strategy = FedAvg() if strategy is None else strategy
        check_instance(self.strategy, Strategy, C2M3)
        _refuse_asking(calibration=calibration, recalibrate=recalibrate, head=head, judge=judge, moments=moments)
        options = Options(
            alignment=alignment,
            basis=basis,
            min_replies=min_replies,
            outliers=outliers,
            memory=memory,
            max_steps=max_steps,
            tolerance=tolerance,
            max_seconds=max_seconds,
            memory_limit=memory_limit,
            diagnostics=diagnostics,
            feedback=feedback,
        )
        self.setup = build_setup(
            model,
            options,
            example_inputs=example_inputs,
            inputs=inputs,
            outputs=outputs,
            calibration=calibration,
            recalibrate=recalibrate,
            spec=spec,
            rotations=rotations,
            device=device,
            sizes=sizes,
        )
        names = list(model.state_dict()) if exchanged is None else check_exchanged(exchanged, ordered=True)
        check_whole(self.setup.sizes, names, self.setup.spec.tensors)
        self.setup = exchanging(self.setup, names)
        check_lora(lora, self.strategy)
        check_no_adapters(self.setup.sizes, lora)
        refuse_steps(self.strategy, self.setup.spec)
        self._lora, self._bases = lora, bases_of(lora, self.setup)
        self.server = Server(self.setup)
        state = self.setup.state_dict()
        self.schema = schema_of_params({name: state[name] for name in names})
        self.expected: Schema = self.schema
        self.sent: Parameters | None = None
        self._chosen: list[int] = []
        check_privacy(self.strategy, **self.setup.bounds)

    @property
    def wrapped(self) -> Strategy:
        """The strategy that was passed: its attributes, and the methods that are its own, are there."""
        return self.strategy

    @property
    def trajectory(self) -> Parameters | None:
        """What clients train next; None before the first aggregate."""
        found = self.server.models.trajectory
        return None if found is None else to_parameters(found)

    def state_dict(self) -> dict[str, torch.Tensor]:
        """What is remembered between rounds: where each node was last found, its width, the trajectory, its digest."""
        return self.server.state_dict()

    def load_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        """Remember that instead."""
        self.server.load_state_dict(state)

    def initialize_parameters(self, client_manager: ClientManager) -> Parameters | None:
        """Let the wrapped strategy choose the initial model."""
        return self.strategy.initialize_parameters(client_manager)

    def configure_fit(
        self, server_round: int, parameters: Parameters, client_manager: ClientManager
    ) -> list[tuple[ClientProxy, FitIns]]:
        """Send out the trajectory, or `parameters` where they are a new start, to whom the wrapped strategy chooses."""
        check_callers(**self.setup.bounds)
        named = named_params(self.schema, parameters, "the parameters to send out")
        check_fits(named, self.setup, "the parameters to send out")
        start = self.server.next_start(named)
        self.expected = reply_schema(self.schema, schema_of_params(start))
        self.sent = parameters if start is named else to_parameters(start)
        _continue_from(self.strategy, self.sent)
        chosen = self.strategy.configure_fit(server_round, self.sent, client_manager)
        self._chosen = [node_of(proxy) for proxy, _ in chosen]
        own = self._personal([proxy for proxy, _ in chosen], deployed=False)
        return [(proxy, FitIns(own(proxy, ins.parameters), ins.config)) for proxy, ins in chosen]

    def aggregate_fit(
        self, server_round: int, results: list[Result], failures: list[Result | BaseException]
    ) -> tuple[Parameters | None, dict[str, Scalar]]:
        """Align the replies, aggregate them with the wrapped strategy, and recalibrate the result."""
        if self.sent is None:
            return self.strategy.aggregate_fit(server_round, results, failures)
        aggregate: Aggregate[dict[str, Scalar]] = partial(
            aggregate_results, self.strategy, server_round, failures, self.schema
        )
        if self._lora != "apart":
            aggregate = averaging_products(aggregate, self._bases)
        found = self._sorted(results)
        params, metrics, numbers = self.server.play(server_round, found, self.strategy, aggregate)
        if failures and self.server.resizing is not None:
            self.server.resizing.replied({}, {*self._chosen} - {node_of(proxy) for proxy, _ in results})
        told = to_scalars(reported(numbers, every=self.setup.options.diagnostics))
        return to_parameters(params), {**(metrics or {}), **told}

    def at_width(self, parameters: Parameters, size: int) -> Parameters:
        """A deployed model at one of the narrower widths: see the current strategy."""
        params = named_params(self.schema, parameters, "parameters")
        check_fits(params, self.setup, "parameters")
        return to_parameters(self.server.at_width(params, size))

    def configure_evaluate(
        self, server_round: int, parameters: Parameters, client_manager: ClientManager
    ) -> list[tuple[ClientProxy, EvaluateIns]]:
        """Let the wrapped strategy configure the evaluation."""
        chosen = self.strategy.configure_evaluate(server_round, parameters, client_manager)
        own = self._personal([proxy for proxy, _ in chosen], deployed=True)
        return [(proxy, EvaluateIns(own(proxy, ins.parameters), ins.config)) for proxy, ins in chosen]

    def aggregate_evaluate(
        self,
        server_round: int,
        results: list[tuple[ClientProxy, EvaluateRes]],
        failures: list[tuple[ClientProxy, EvaluateRes] | BaseException],
    ) -> tuple[float | None, dict[str, Scalar]]:
        """Let the wrapped strategy aggregate the evaluations that can be averaged; a failure does not end the run."""
        return aggregate_evaluations(self.strategy, server_round, results, failures)

    def evaluate(self, server_round: int, parameters: Parameters) -> tuple[float, dict[str, Scalar]] | None:
        """Let the wrapped strategy evaluate."""
        return self.strategy.evaluate(server_round, parameters)

    def _sorted(self, results: Sequence[Result]) -> Sorted[Result]:
        """The usable replies in a stable order, and the others with the reasons."""
        arrived = self.server.arrived(results, self.expected, widen_results)
        found = sort_results(arrived.replies, self.expected)
        return replace(found, dropped=(*arrived.dropped, *found.dropped))

    def _personal(
        self, proxies: Sequence[ClientProxy], *, deployed: bool
    ) -> Callable[[ClientProxy, Parameters], Parameters]:
        """From a client and parameters to those that it is sent: at its width, or in its own basis if asked for."""
        resizing, aligner = self.server.resizing, self.setup.aligner
        if resizing is not None:
            ask_proxies(resizing, proxies)

        def own(proxy: ClientProxy, parameters: Parameters) -> Parameters:
            if resizing is None and aligner.basis != "client":
                return parameters
            params: Params = named_params(self.schema, parameters, "the parameters to send out")
            if resizing is not None:
                found = resizing.cuts(params, deployed=deployed).params(resizing.places.get(node_of(proxy), 0))
            else:
                found = aligner.own_basis(node_of(proxy), params)
            return parameters if found is params else to_parameters(found)

        return own


def _refuse_asking(**options: object) -> None:
    """Raise `ConfigError` for options that ask clients: a legacy server has no grid."""
    for name, value in options.items():
        asks = isinstance(value, ClientStatistics | ClientRefit | RegMean)
        if asks or (name in ("head", "judge", "moments") and value is not None):
            raise ConfigError(
                f"{name} is {value!r}, which asks the clients, and the legacy dialect has no grid to ask them: "
                "use c2m3_fl.flower.C2M3"
            )


def _continue_from(strategy: Strategy, parameters: Parameters) -> None:
    """Let server optimisers step from the model that is sent out: they remember their own last result."""
    for each in chain(strategy):
        if isinstance(each, FedAvgM) and each.initial_parameters is not None:
            each.initial_parameters = parameters
        if isinstance(each, FedOpt):
            each.current_weights = to_ndarrays(parameters)
