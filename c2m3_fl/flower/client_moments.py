"""What a client adds to answer the server's queries for channel moments.

The answers hold the count, the mean and the summed squared deviation of every channel, in float64: never an
activation or an input.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from copy import deepcopy

import torch
from flwr.app import ArrayRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import tree_leaves

from c2m3_fl.core.spec import Params
from c2m3_fl.flower.records import from_params, schema_of_params, to_params
from c2m3_fl.merging.recalibrate.setting import check_params
from c2m3_fl.network.calibration import Batch, Calibration, load_batches
from c2m3_fl.network.moments import Moments
from c2m3_fl.network.operators import Operator
from c2m3_fl.network.program import Program, Walk, trace

ACTION = "c2m3_statistics"
_ROUNDING = 1e-5  # of the largest output: other kernels for the same network differ by less


def answer_statistics(
    app: ClientApp,
    *,
    model: Callable[[Context], nn.Module],
    calibration: Callable[[Context], Calibration],
) -> None:
    """Let a client app answer the server's queries for channel moments.

    Parameters
    ----------
    app : ClientApp
        Gets one more query handler.
    model : callable
        From the context to the architecture, as the server has it.
    calibration : callable
        From the context to batches of the client's own data; labels are ignored.

    Examples
    --------
    >>> app = ClientApp()
    >>> answer_statistics(app, model=lambda context: Net(), calibration=lambda context: load_data(context))
    """
    traced = _Traced()

    @app.query(ACTION)
    def measure(message: Message, context: Context) -> Message:
        network = model(context)
        (arrays,), (config,) = message.content.array_records.values(), message.content.config_records.values()
        params = to_params(arrays, schema_of_params(network.state_dict()), "query")
        check_params(network, params, "query")
        batches = load_batches(calibration(context))
        place, before = int(str(config["place"])), bool(config["before"])
        found: dict[str, Moments] = {}
        with torch.no_grad():
            for batch, program in zip(batches, traced.programs(network, params, batches), strict=True):
                walk = Walk(program, params, batch)
                for operator in program.operators if place < 0 else [program.operators[place]]:
                    moments = _measured(walk, operator, params, before)
                    found[operator.name] = found[operator.name].combine(moments) if operator.name in found else moments
        return Message(RecordDict({"moments": _to_record(found)}), reply_to=message)


class _Traced:
    """Programs of earlier queries, because tracing takes longer than running.

    They are looked up by the network's class, tensors and inputs, which do not say what a network does with them;
    so one is used again only where it gives the outputs that the network gives.
    """

    def __init__(self) -> None:
        self._known: dict[Hashable, Program] = {}

    def programs(self, network: nn.Module, params: Params, batches: Sequence[Batch]) -> list[Program]:
        """The traced network for every batch."""
        looks = (type(network), *((name, value.dtype, value.shape) for name, value in params.items()))
        proven: dict[Hashable, Program] = {}
        for batch in batches:
            kind = (batch.shapes, batch.types)
            if kind in proven:
                continue
            known = self._known.get((looks, kind))
            if known is None or not _computes(known, network, params, batch):
                known = self._known[looks, kind] = trace(network, batch.inputs)
            proven[kind] = known
        return [proven[batch.shapes, batch.types] for batch in batches]


def _computes(program: Program, network: nn.Module, params: Params, batch: Batch) -> bool:
    """Whether a program gives a network's outputs, up to rounding."""
    expected = tree_leaves(functional_call(deepcopy(network).eval(), dict(params), batch.inputs))
    found = tree_leaves(Walk(program, params, batch).finish())
    return len(found) == len(expected) and all(map(_alike, found, expected))


def _alike(found: object, expected: object) -> bool:
    if not (isinstance(found, Tensor) and isinstance(expected, Tensor)):
        return type(found) is type(expected)
    if found.shape != expected.shape or found.dtype != expected.dtype:
        return False
    return torch.allclose(
        found, expected, rtol=0, atol=_ROUNDING * float(expected.abs().amax() if len(expected) else 0)
    )


def _measured(walk: Walk, operator: Operator, params: Params, before: bool) -> Moments:
    if not before:
        return Moments.of(walk.output(operator), operator.channel_axes(params))
    walk.advance(operator.index)
    return Moments.of(walk.value(operator.input), operator.channel_axes(params))


def _to_record(found: Mapping[str, Moments]) -> ArrayRecord:
    arrays = {}
    for name, moments in found.items():
        arrays[f"{name}/count"] = torch.tensor(moments.count)
        arrays[f"{name}/mean"] = moments.mean
        arrays[f"{name}/deviation"] = moments.deviation
    return from_params(arrays)
