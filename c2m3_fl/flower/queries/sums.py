"""What a client answers to a query for sums: second moments of inputs, and their products with outputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from flwr.app import ConfigRecord, Message, RecordDict
from torch import nn

from c2m3_fl.core.spec import Params
from c2m3_fl.errors import CalibrationError
from c2m3_fl.flower.incoming.records import from_params
from c2m3_fl.flower.queries.answers import read_data
from c2m3_fl.flower.queries.networks import receive_networks, stale
from c2m3_fl.merging.recalibrate.from_clients.packing import pack
from c2m3_fl.merging.recalibrate.from_clients.plan import Role
from c2m3_fl.merging.recalibrate.from_clients.sums import Drawing, measure
from c2m3_fl.merging.recalibrate.head.last_layer import reads_input
from c2m3_fl.network.calibration import Batch, Calibration
from c2m3_fl.network.program import Program

ACTION = "c2m3_sums"
SPARSEST = 10  # a client holds out no fewer than one example in ten: second moments of few rows say much about them
LARGEST_SKETCH = 4096  # rows
_SUMS = (Role.FIT, Role.GRAM)


def answer_sums(
    message: Message,
    network: nn.Module,
    data: Calibration,
    state: RecordDict,
    *,
    min_examples: int = 32,
    first_layer: bool = False,
    programs: Callable[[nn.Module, Params, Sequence[Batch]], Sequence[Program]],
) -> Message:
    """A client's answer to a query for sums.

    Parameters
    ----------
    message : Message
        The query: the client's own aligned network, the merged one, and which operators. Of networks that the client
        was sent before, only what has changed.
    network : nn.Module
        The architecture, as the server has it.
    data : iterable of batches
        The client's own; labels are ignored.
    state : RecordDict
        The client's context, where the networks stay between queries.
    min_examples : int
        With fewer examples, or from fewer positions, the client does not answer.
    first_layer : bool
        Whether to answer about operators that read the network's input; by default they are left out.
    programs : callable
        From network, parameters and batches to one traced program per batch.

    Raises
    ------
    CalibrationError
        When the client does not answer; the server receives the reason in an error reply.
    """
    config = message.content.config_records["config"]
    drawing = _drawing(config, min_examples)
    networks = receive_networks(network, message.content, state)
    if networks is None:
        return stale(message)
    own = networks["own"]
    merged = networks.get("merged", own)
    batches = read_data(network, data, min_examples)
    traced = programs(network, own, batches)
    roles = {
        place: role
        for place, role in _roles(config, traced[0]).items()
        if first_layer or role not in _SUMS or not reads_input(traced[0], traced[0].operators[place])
    }
    dtype = torch.float64 if int(str(config["double"])) else torch.float32
    answers = measure(traced, batches, merged, own, roles, drawing, _sketches(config, roles))
    tensors = {f"{name}/{key}": value for name, each in answers.items() for key, value in pack(each, dtype).items()}
    return Message(RecordDict({"sums": from_params(tensors)}), reply_to=message)


def _drawing(config: ConfigRecord, min_examples: int) -> Drawing:
    positions, holdout, seed = (int(str(config[name])) for name in ("positions", "holdout", "seed"))
    if not 2 <= holdout <= SPARSEST:
        raise CalibrationError(f"the query holds one example in {holdout} out, expected from 2 to {SPARSEST}")
    if positions < min_examples:
        raise CalibrationError(f"the query draws {positions} rows, and the client answers with at least {min_examples}")
    return Drawing(positions, holdout, seed)


def _sketches(config: ConfigRecord, roles: Mapping[int, Role]) -> dict[int, int]:
    """Number of rows of the sketches that are to be answered in place of sums, by the operator's number."""
    places, rows = config["places"], config["sketches"]
    if not isinstance(places, list) or not isinstance(rows, list) or len(places) != len(rows):
        raise CalibrationError(f"the query asks for sketches {rows!r} of operators {places!r}, expected as many")
    found = {int(str(place)): int(str(count)) for place, count in zip(places, rows, strict=True)}
    if any(not 0 <= count <= LARGEST_SKETCH for count in found.values()):
        raise CalibrationError(f"the query asks for sketches of {rows} rows, expected from 0 to {LARGEST_SKETCH}")
    return {place: count for place, count in found.items() if count and roles.get(place) is Role.FIT}


def _roles(config: ConfigRecord, program: Program) -> dict[int, Role]:
    places, roles = config["places"], config["roles"]
    if not isinstance(places, list) or not isinstance(roles, list) or len(places) != len(roles):
        raise CalibrationError(
            f"the query asks for roles {roles!r} of operators {places!r}, expected lists of one length"
        )
    found = {int(str(place)): Role(role) for place, role in zip(places, roles, strict=True)}
    if any(not 0 <= place < len(program.operators) for place in found):
        raise CalibrationError(
            f"the query asks for operators {sorted(found)}, but the client's network has {len(program.operators)}"
        )
    return found
