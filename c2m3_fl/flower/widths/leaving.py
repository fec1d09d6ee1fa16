"""Models as they are sent to clients of several widths."""

from __future__ import annotations

from collections.abc import Iterable

from flwr.app import ArrayRecord, Message
from flwr.serverapp import Grid

from c2m3_fl.core.state_dicts import digest
from c2m3_fl.flower.incoming.records import from_params, to_params
from c2m3_fl.flower.private import with_arrays
from c2m3_fl.flower.widths.asking import ask_grid
from c2m3_fl.flower.widths.stage import Resizing


def sized_messages(resizing: Resizing, messages: Iterable[Message], grid: Grid, *, deployed: bool) -> Iterable[Message]:
    """The same messages, every client's model at its own width; clients of unknown width are asked first.

    Parameters
    ----------
    resizing : Resizing
        The widths.
    messages : iterable of Message
        As the wrapped strategy made them; not mutated.
    grid : Grid
        Where the clients are.
    deployed : bool
        Whether the model is a deployed one, whose restrictions are recalibrated.
    """
    messages = list(messages)
    ask_grid(resizing, grid, [message.metadata.dst_node_id for message in messages])
    records: dict[tuple[str, int], ArrayRecord] = {}
    found = []
    for message in messages:
        place = resizing.places.get(message.metadata.dst_node_id, 0)
        key, record = next(iter(message.content.array_records.items()))
        if place:
            params = to_params(record)
            known = digest(params), place
            if known not in records:
                records[known] = from_params(resizing.cuts(params, deployed=deployed).params(place))
            message = with_arrays(message, {key: records[known].copy()})
        found.append(message)
    return found
