"""Rules of recurrent layers: the gates of a unit move together, and the unit with its place in the hidden state."""

from __future__ import annotations

from collections.abc import Sequence

from c2m3_fl.symmetry.labels import Labels
from c2m3_fl.symmetry.reshape_labels import concatenate, reshape, stack
from c2m3_fl.symmetry.rules.contraction import produces
from c2m3_fl.symmetry.rules.registry import Argument, Call, rule
from c2m3_fl.symmetry.unit_labels import combine, einsum, permute, select

_GATES = {"lstm": 4, "gru": 3, "rnn_tanh": 1, "rnn_relu": 1}  # of layers and of cells


@rule("aten.lstm")
def lstm(
    call: Call, x: Labels, state: Sequence[Labels], params: Sequence[Labels], *args: Argument
) -> tuple[Labels, ...]:
    """Long short-term memory: input, forget, cell and output gates; with projections the hidden state is narrower."""
    hidden, cell = state
    return _recurrent(call, x, hidden, cell, params, *args)


@rule("aten.gru", "aten.rnn_tanh", "aten.rnn_relu")
def gru(call: Call, x: Labels, hidden: Labels, params: Sequence[Labels], *args: Argument) -> tuple[Labels, ...]:
    """Gated recurrent unit, or a plain recurrent layer."""
    return _recurrent(call, x, hidden, None, params, *args)[:2]


def _recurrent(
    call: Call,
    x: Labels,
    hidden: Labels,
    cell: Labels | None,
    params: Sequence[Labels],
    has_biases: Argument,
    layers: Argument,
    dropout: Argument,
    train: Argument,
    bidirectional: Argument,
    batch_first: Argument = False,
) -> tuple[Labels, ...]:
    structure, directions = call.structure, 2 if bidirectional else 1
    single = x.ndim == 2
    steps = (
        reshape(structure, x, (x.shape[0], 1, x.shape[1])) if single else permute(x, [1, 0, 2]) if batch_first else x
    )
    count = len(params) // (int(layers) * directions)
    lasts, cells = [], []
    for layer in range(int(layers)):
        outs = []
        for direction in range(directions):
            place = layer * directions + direction
            weights = params[place * count : (place + 1) * count]
            start = _start(call, hidden, place, single)
            memory = None if cell is None else _start(call, cell, place, single)
            out, inner = _layer(call, steps, start, memory, weights, bool(has_biases))
            outs.append(out)
            lasts.append(_last(call, out, hidden))
            cells.append(_last(call, inner, cell or hidden))
        steps = concatenate(structure, outs, 2)
    output = reshape(structure, permute(steps, [1, 0, 2]) if batch_first and not single else steps, call.shape)
    return output, stack(structure, lasts, 0), stack(structure, cells, 0)


def _start(call: Call, state: Labels, place: int, single: bool) -> Labels:
    found = select(call.structure, state, 0, place)
    return reshape(call.structure, found, (1, *found.shape)) if single else found


def _last(call: Call, out: Labels, state: Labels) -> Labels:
    """Final state (batch, units) of the outputs (time, batch, units)."""
    return reshape(call.structure, select(call.structure, out, 0, 0), (*state.shape[1:-1], out.shape[-1]))


def _layer(
    call: Call, x: Labels, start: Labels, memory: Labels | None, weights: Sequence[Labels], has_biases: bool
) -> tuple[Labels, Labels]:
    """One direction of one layer: hidden states (time, batch, outputs) and units (time, batch, hidden)."""
    structure = call.structure
    inward, recurrent, *rest = weights
    biases = rest[:2] if has_biases else []
    produces(call, inward, 0)
    gates = _gates(call)
    pre = einsum(structure, ["tbi", "ghi"], "tbgh", [x, _gated(call, inward)])
    pre = combine(structure, pre, *(_gated(call, bias) for bias in biases))
    units = _together(call, pre, gates)
    if memory is not None:
        units = combine(structure, units, memory)
    out = units
    if len(rest) > len(biases):
        produces(call, rest[-1], 0)
        out = einsum(structure, ["tbh", "ph"], "tbp", [units, rest[-1]])
    out = combine(structure, out, start)
    back = einsum(structure, ["tbp", "ghp"], "tbgh", [out, _gated(call, recurrent)])
    units = combine(structure, units, _together(call, combine(structure, pre, back), gates))
    return out, units


def _gates(call: Call) -> int:
    return _GATES[call.structure.operator.split(".")[1].removesuffix("_cell")]


def _gated(call: Call, weight: Labels) -> Labels:
    """Rows of a weight or a bias as (gates, units)."""
    gates = _gates(call)
    return reshape(call.structure, weight, (gates, weight.shape[0] // gates, *weight.shape[1:]))


def _together(call: Call, pre: Labels, gates: int) -> Labels:
    """Combine the gates of each unit, as its state does."""
    return combine(call.structure, *(select(call.structure, pre, -2, gate) for gate in range(gates)))


@rule("aten.lstm_cell")
def lstm_cell(call: Call, x: Labels, state: Sequence[Labels], *params: Labels) -> tuple[Labels, Labels]:
    """One step of long short-term memory: units of the cell state; the hidden state before may have other units."""
    hidden, cell = state
    units = combine(call.structure, _step(call, x, hidden, *params), cell)
    return units, units


@rule("aten.gru_cell")
def gru_cell(call: Call, x: Labels, hidden: Labels, *params: Labels) -> Labels:
    """One step of a gated recurrent unit, whose state is partly kept."""
    return combine(call.structure, _step(call, x, hidden, *params), hidden)


@rule("aten.rnn_tanh_cell", "aten.rnn_relu_cell")
def rnn_cell(call: Call, x: Labels, hidden: Labels, *params: Labels) -> Labels:
    """One step of a plain recurrent layer."""
    return _step(call, x, hidden, *params)


def _step(call: Call, x: Labels, hidden: Labels, inward: Labels, recurrent: Labels, *biases: Labels | None) -> Labels:
    """Units of one step from an input (batch, inputs) and a hidden state (batch, units), or without a batch."""
    produces(call, inward, 0)
    batch = "b" * (x.ndim - 1)
    pairs = [(x, inward), (hidden, recurrent)]
    parts = [einsum(call.structure, [batch + "i", "ghi"], batch + "gh", [z, _gated(call, w)]) for z, w in pairs]
    pre = combine(call.structure, *parts, *(_gated(call, bias) for bias in biases if bias is not None))
    return _together(call, pre, _gates(call))
