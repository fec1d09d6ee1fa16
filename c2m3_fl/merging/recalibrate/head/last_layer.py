"""Find, run and replace the last layer of a network that gives class scores."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, fx

from c2m3_fl.core.spec import Params
from c2m3_fl.errors import CalibrationError
from c2m3_fl.merging.recalibrate.held_out import held_out
from c2m3_fl.merging.recalibrate.softmax_fit import Layer
from c2m3_fl.network.calibration import Batch
from c2m3_fl.network.operators import RECURRENT, Kind, Operator
from c2m3_fl.network.program import Program, Walk
from c2m3_fl.network.rows import from_matrix

NO_HEAD = "no head can be fitted to labels:"
_LOGARITHM = torch.ops.aten.log_softmax.int  # changes neither predictions nor likelihoods


def last_layer(program: Program) -> Operator:
    """The linear operator whose output is the network's one output, scores of shape (batch, classes).

    A log-softmax over the classes may follow it.

    Raises
    ------
    CalibrationError
        When there is no such operator; the message names what computes the output.
    """
    outputs = program.graph.output_node().args[0]
    nodes = list(outputs) if isinstance(outputs, (tuple, list)) else [outputs]
    if len(nodes) != 1 or not isinstance(nodes[0], fx.Node):
        raise CalibrationError(f"{NO_HEAD} the network has {len(nodes)} outputs, expected one tensor of class scores")
    node = nodes[0]
    if node.target is _LOGARITHM and node.args[1] in (-1, 1) and isinstance(node.args[0], fx.Node):
        node = node.args[0]
    operator = next((each for each in program.operators if each.node is node), None)
    if operator is None or operator.kind not in (Kind.LINEAR, Kind.PRODUCT):
        raise CalibrationError(
            f"{NO_HEAD} the output is computed by {node.target}, expected a linear layer with a weight of its own"
        )
    shape = tuple(node.meta["val"].shape)
    if len(shape) != 2 or shape[1] < 2:
        raise CalibrationError(
            f"{NO_HEAD} {operator.weight!r} gives outputs of shape {shape}, expected (batch, classes), two at least"
        )
    if node.kwargs or (_has_bias(operator) and not operator.bias):
        raise CalibrationError(
            f"{NO_HEAD} the bias added to the product with {operator.weight!r} is scaled, or not a parameter"
        )
    return operator


def _has_bias(operator: Operator) -> bool:
    position = operator.layout.arguments[2]
    return 0 <= position < len(operator.node.args) and operator.node.args[position] is not None


def reads_input(program: Program, operator: Operator) -> bool:
    """Whether an operator reads the network's inputs with no layer of weights or recurrent layer in between.

    Norms do not count: what they give are the inputs, shifted and scaled.
    """
    passed = {each.node for each in program.operators if each.kind not in (Kind.BATCH_NORM, Kind.NORM)}
    passed |= {node for node in program.graph.nodes if node.target in RECURRENT}
    reached, open_nodes = set(), [operator.input]
    while open_nodes:
        node = open_nodes.pop()
        if node in reached or node in passed:
            continue
        if node.name in program.inputs:
            return True
        reached.add(node)
        open_nodes.extend(node.all_input_nodes)
    return False


def labelled_inputs(
    programs: Sequence[Program], params: Params, batches: Sequence[Batch], every: int
) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Per batch the inputs of the last layer, its outputs, the labels, and which examples are held out.

    Parameters
    ----------
    programs : sequence of Program
        One per batch.
    params : mapping of str to Tensor
        State dict of the network.
    batches : sequence of Batch
        With labels.
    every : int
        One example in so many is held out; see `held_out.held_out`.

    Raises
    ------
    CalibrationError
        When labels are missing or out of range, or the outputs are not class scores.
    """
    masks = held_out(batches, every)
    with torch.no_grad():
        for program, batch, mask in zip(programs, batches, masks, strict=True):
            operator = last_layer(program)
            walk = Walk(program, params, batch)
            walk.advance(operator.index)
            rows = walk.value(operator.input)
            scores = walk.output(operator)
            yield rows, scores, class_labels(batch, scores), mask


def class_labels(batch: Batch, scores: Tensor) -> Tensor:
    """Class indices of a batch, on the device of its scores (batch, classes).

    Raises
    ------
    CalibrationError
        When labels are missing, not one per row of scores, or out of range.
    """
    if batch.labels is None:
        unread = f": the element after the inputs, {batch.unread}, is not one class index each" if batch.unread else ""
        raise CalibrationError(f"batch {batch.index} has no labels{unread}; expected batches (inputs, labels)")
    labels = batch.labels.to(scores.device).long()
    if len(scores) != len(labels):
        raise CalibrationError(f"batch {batch.index}: {len(scores)} rows of scores for {len(labels)} labels")
    if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < scores.shape[1]:
        raise CalibrationError(
            f"batch {batch.index}: labels from {int(labels.min())} to {int(labels.max())}, expected class indices "
            f"from 0 to {scores.shape[1] - 1}: the network gives {scores.shape[1]} scores"
        )
    return labels


def with_head(program: Program, params: Params, layer: Layer, temperature: float) -> dict[str, Tensor]:
    """The same state dict with another last layer, whose scores are divided by a temperature.

    Parameters
    ----------
    program : Program
        The traced network.
    params : mapping of str to Tensor
        Not mutated.
    layer : Layer
        The last layer.
    temperature : float
        Folded into its weight and bias.
    """
    operator, result = last_layer(program), dict(params)
    weight = params[operator.weight]
    matrix = from_matrix(operator, layer.weight[None] / temperature, weight.shape)
    program.assign(result, operator.weight, matrix)
    if operator.bias:
        program.assign(result, operator.bias, layer.bias / temperature)
    return result


def with_temperature(program: Program, params: Params, temperature: float) -> dict[str, Tensor]:
    """The same state dict, with class scores divided by a temperature (Guo et al. 2017).

    Parameters
    ----------
    program : Program
        The traced network.
    params : mapping of str to Tensor
        Not mutated.
    temperature : float
        Positive; folded into the weight and the bias of the last layer.

    Raises
    ------
    CalibrationError
        As for `last_layer`.
    """
    operator, result = last_layer(program), dict(params)
    for name in filter(None, (operator.weight, operator.bias)):
        program.assign(result, name, params[name] / temperature)
    return result
