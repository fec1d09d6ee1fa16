"""What a client adds to answer the server's queries for sums of labels, from which the server fits a head."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from flwr.app import Message, RecordDict
from torch import nn

from c2m3_fl.core.spec import Params
from c2m3_fl.errors import CalibrationError
from c2m3_fl.flower.incoming.records import from_params, to_params
from c2m3_fl.flower.queries.answers import read_data, read_network
from c2m3_fl.merging.recalibrate.head.fit import measure_labels, reliability
from c2m3_fl.merging.recalibrate.head.label_sums import write_sums
from c2m3_fl.merging.recalibrate.head.last_layer import last_layer, reads_input
from c2m3_fl.merging.recalibrate.softmax_fit import Layer
from c2m3_fl.network.calibration import Batch, Calibration
from c2m3_fl.network.program import Program, export_batches

ACTION = "c2m3_labels"
SIDES = ("train", "held-out")  # of the examples
LAYERS = ("before", "after")  # last layers that are scored
SPARSEST = 10  # a client holds out no fewer than one example in ten: a Gram of few rows says much about them
Programs = Callable[[nn.Module, Params, Sequence[Batch]], Sequence[Program]]


def answer_head(
    message: Message,
    network: nn.Module,
    data: Calibration,
    *,
    min_examples: int = 32,
    first_layer: bool = False,
    programs: Programs | None = None,
) -> Message:
    """A client's answer to a query for label sums, or for the scores of a fitted last layer.

    What it reveals: the number of the client's examples per class; the mean over each class of the last layer's
    inputs; and their second moments, which fix the inputs up to a rotation where there are fewer examples than
    inputs. Of a class with one example the class mean is that example's features. The second answer reveals sums of
    losses and of confidences over the held-out examples.

    Parameters
    ----------
    message : Message
        The query.
    network : nn.Module
        The architecture, as the server has it.
    data : iterable of batches
        The client's own, with labels.
    min_examples : int
        With fewer examples the client does not answer.
    first_layer : bool
        Whether to answer where the last layer is also the first, so that its inputs are the client's data.
    programs : callable, optional
        From network, parameters and batches to one traced program per batch.

    Raises
    ------
    CalibrationError
        When the client does not answer; the server receives the reason in an error reply.
    """
    content = message.content
    config = content.config_records["config"]
    every = int(str(config["every"]))
    if not 2 <= every <= SPARSEST:
        raise CalibrationError(f"the query holds one example in {every} out, expected from 2 to {SPARSEST}")
    params = read_network(network, content.array_records["arrays"])
    batches = read_data(network, data, min_examples)
    traced = export_batches(network, batches) if programs is None else programs(network, params, batches)
    if reads_input(traced[0], last_layer(traced[0])) and not first_layer:
        raise CalibrationError("the last layer reads the network's input: its sums need first_layer=True")
    if config["stage"] == "sums":
        sums = measure_labels(traced, params, batches, every)
        found = write_sums(sums.train, SIDES[0]) | write_sums(sums.held_out, SIDES[1])
    else:
        sent = to_params(content.array_records["layer"], who="query")
        layer, grid = Layer(sent["weight"], sent["bias"]), sent["temperatures"].tolist()
        pair = zip(LAYERS, reliability(traced, params, layer, batches, every, grid), strict=True)
        found = {f"{name}/{key}": value for name, each in pair for key, value in vars(each).items()}
    return Message(RecordDict({"labels": from_params(found)}), reply_to=message)
