"""What a client adds to its app to answer the server's queries, and the answers with channel moments.

These hold the count, the mean and the summed squared deviation of every channel, in float64: never an activation
or an input. Sums and labels are answered in `sums` and `head`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from flwr.app import ArrayRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.clientapp.mod import LocalDpMod, adaptiveclipping_mod, fixedclipping_mod
from torch import nn

from c2m3_fl.core.spec import Params
from c2m3_fl.errors import ConfigError
from c2m3_fl.flower.incoming.records import from_params
from c2m3_fl.flower.queries.answers import Traced, read_data, read_network
from c2m3_fl.flower.queries.labels import ACTION as LABELS
from c2m3_fl.flower.queries.labels import answer_head
from c2m3_fl.flower.queries.sums import ACTION as SUMS
from c2m3_fl.flower.queries.sums import answer_sums
from c2m3_fl.network.calibration import Batch, Calibration, load_batches
from c2m3_fl.network.calls import Outputs, choose_outputs
from c2m3_fl.network.moments import Moments
from c2m3_fl.network.operators import Operator
from c2m3_fl.network.program import Program, Walk

ACTION = "c2m3_statistics"
_CLIPPING = (fixedclipping_mod, adaptiveclipping_mod)


def answer_statistics(
    app: ClientApp,
    *,
    model: Callable[[Context], nn.Module],
    data: Callable[[Context], Calibration],
    inputs: Sequence[str] | None = None,
    outputs: Outputs | None = None,
    min_examples: int = 32,
    first_layer: bool = False,
) -> None:
    """Let a client app answer the server's queries: for channel moments, for sums, and for sums by label.

    What each answer reveals about the client's data:

    - Channel moments (`ClientStatistics`): per operator and channel the count, the mean and the spread.
    - Sums (`ClientRefit`, `RegMean`): per linear operator the mean and the second moments of its inputs, and for
      `ClientRefit` their products with the residuals (the own network's outputs minus those of the merged weights)
      and the residuals' sums and squares. Second moments of fewer rows than columns fix the rows up to a
      rotation, those of one row the row itself. Behind the first layer the rows are activations, from which inputs
      may be reconstructed by whoever holds the network, as the server does. Where sums would be too large
      (`ClientRefit(sketch=...)`): Gaussian mixtures of all rows and of their residuals, drawn from a seed that the
      server does not know. They reveal at most the second moments of rows and residuals taken together.
    - Sums by label (`Head`): the number of examples per class, the mean of the last layer's inputs over each class,
      and their second moments. The mean over a class with one example is that example's features.

    All of these are exact, and of one client each. Neither noise nor secure aggregation protects them.

    Parameters
    ----------
    app : ClientApp
        Gets three more query handlers.
    model : callable
        From the context to the architecture, as the server has it: of the full width, where clients differ in width and
        this one trains a narrower network.
    data : callable
        From the context to batches of the client's own data, with labels if it has any; the same ones in every
        call, without random augmentation, in any order.
    inputs : sequence of str, optional
        Which keys of dict batches are the network's inputs, as for `C2M3`.
    outputs : str, int or sequence of them, optional
        Which of the network's outputs are read, by key, field or place, as for `C2M3`: the same ones there and here.
    min_examples : int
        With fewer examples the client does not answer. One example in five, as a rule, is held out, and its sums
        are apart.
    first_layer : bool
        Whether to answer with second moments of the network's input itself.

    Raises
    ------
    ConfigError
        For an app with Flower's mods of differential privacy. Those of a single function, as in
        ``@app.train(mods=[...])``, cannot be seen from here.

    Examples
    --------
    >>> app = ClientApp()
    >>> answer_statistics(app, model=lambda context: Net(), data=lambda context: load_data(context))
    """
    mods = [each for each in getattr(app, "_mods", ()) if isinstance(each, LocalDpMod) or each in _CLIPPING]
    private = [getattr(each, "__name__", type(each).__name__) for each in mods]
    if private:
        raise ConfigError(
            f"the client app has {', '.join(private)}, which bounds what its updates reveal, and answers are exact, "
            "outside that bound: leave answer_statistics out, or the mods"
        )
    traced = Traced()

    def handler(answer: Callable[..., Message], **options: bool) -> Callable[[Message, Context], Message]:
        def reply(message: Message, context: Context) -> Message:
            network, own = choose_outputs(model(context), outputs), data(context)
            if inputs is not None:
                own = list(load_batches(own, model=network, inputs=inputs))
            state = (context.state,) if answer is answer_sums else ()
            return answer(message, network, own, *state, min_examples=min_examples, programs=traced, **options)

        return reply

    app.query(ACTION)(handler(answer_moments))
    app.query(SUMS)(handler(answer_sums, first_layer=first_layer))
    app.query(LABELS)(handler(answer_head, first_layer=first_layer))


def answer_moments(
    message: Message,
    network: nn.Module,
    data: Calibration,
    *,
    min_examples: int = 32,
    programs: Callable[[nn.Module, Params, Sequence[Batch]], Sequence[Program]],
) -> Message:
    """A client's answer to a query for channel moments.

    Parameters
    ----------
    message : Message
        The query: a network, and the operator's number or -1 for all.
    network : nn.Module
        The architecture, as the server has it.
    data : iterable of batches
        The client's own; labels are ignored.
    min_examples : int
        With fewer examples the client does not answer.
    programs : callable
        From network, parameters and batches to one traced program per batch.
    """
    (arrays,), (config,) = message.content.array_records.values(), message.content.config_records.values()
    params = read_network(network, arrays)
    batches = read_data(network, data, min_examples)
    place, before = int(str(config["place"])), bool(config["before"])
    found: dict[str, Moments] = {}
    with torch.no_grad():
        for batch, program in zip(batches, programs(network, params, batches), strict=True):
            walk = Walk(program, params, batch)
            for operator in program.operators if place < 0 else [program.operators[place]]:
                moments = _measured(walk, operator, params, before)
                found[operator.name] = found[operator.name].combine(moments) if operator.name in found else moments
    return Message(RecordDict({"moments": _to_record(found)}), reply_to=message)


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
