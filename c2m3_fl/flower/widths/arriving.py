"""Replies of narrower clients as they arrive: padded to the model's width, so that every other check sees one width."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Generic, TypeVar

from flwr.app import ArrayRecord, Message
from flwr.common import Parameters
from torch import Tensor

from c2m3_fl.core.spec import Params
from c2m3_fl.errors import ParamsError
from c2m3_fl.flower.admitted import Dropped, fault_of
from c2m3_fl.flower.legacy_messages import Result, node_of, to_parameters
from c2m3_fl.flower.npy import read_header
from c2m3_fl.flower.private import with_arrays
from c2m3_fl.flower.records import Schema, from_params, read_npy, to_params
from c2m3_fl.flower.replies import renamed
from c2m3_fl.flower.widths.sizes import Cuts, Sizes

Source = TypeVar("Source")


@dataclass
class Arrived(Generic[Source]):
    """Replies that are all of the model's width, and what else was found.

    Attributes
    ----------
    replies : list of Message or legacy result
        Those that fit no narrower width as they came.
    places : dict of int to int
        By node, the width that it replied with.
    dropped : list of Dropped
        Replies of a narrower width that cannot be read, or of a second width of one node.
    """

    replies: list[Source] = field(default_factory=list)
    places: dict[int, int] = field(default_factory=dict)
    dropped: list[Dropped] = field(default_factory=list)

    def add(self, node: int, place: int | None, source: Source, pad: Callable[[int], Source]) -> None:
        """Add a reply, padded where it is of a narrower width.

        Parameters
        ----------
        node : int
            Who sent it.
        place : int, optional
            Its width; None for a reply of no known width, which later checks drop and name.
        source : Message or legacy result
            The reply.
        pad : callable
            From a width to the reply, padded.
        """
        try:
            if place is not None and self.places.setdefault(node, place) != place:
                raise ParamsError("a second reply of the same node, of another width")
            self.replies.append(pad(place) if place else source)
        except Exception as error:  # whatever one client sends must not end the round
            self.dropped.append(fault_of(node, error))


def widen_messages(messages: Iterable[Message], sizes: Sizes, cuts: Cuts, expected: Schema) -> Arrived[Message]:
    """Training messages of clients of several widths.

    Parameters
    ----------
    messages : iterable of Message
        As Flower delivered them; not mutated.
    sizes : Sizes
        All widths.
    cuts : Cuts
        The model that was sent, at every width.
    expected : mapping of str to Entry
        What replies of the model's width look like.
    """
    found: Arrived[Message] = Arrived()
    missing = _own(sizes)
    for message in messages:
        records = [] if message.has_error() or not message.has_content() else [*message.content.array_records.items()]
        place = sizes.place_of(_shapes(records[0][1])) if len(records) == 1 else None

        def pad(
            place: int, message: Message = message, records: Sequence[tuple[str, ArrayRecord]] = records
        ) -> Message:
            key, record = records[0]
            schema = sizes.schema(place, expected)
            params = to_params(renamed(record, schema), schema, "reply")
            return with_arrays(message, {key: from_params(cuts.padded(place, params, missing))})

        found.add(message.metadata.src_node_id, place, message, pad)
    return found


def widen_results(results: Iterable[Result], sizes: Sizes, cuts: Cuts, expected: Schema) -> Arrived[Result]:
    """The same for legacy results.

    Parameters
    ----------
    results : iterable of ClientProxy and FitRes
        As Flower delivered them; not mutated.
    sizes, cuts, expected
        As for `widen_messages`.
    """
    found: Arrived[Result] = Arrived()
    missing = _own(sizes)
    for result in results:
        node, tensors = node_of(result[0]), result[1].parameters.tensors

        def pad(place: int, result: Result = result, tensors: Sequence[bytes] = tensors) -> Result:
            entries = zip(sizes.schema(place, expected).items(), tensors, strict=True)
            params = {name: read_npy(f"reply: {name!r}", data, entry) for (name, entry), data in entries}
            padded: Parameters = to_parameters(cuts.padded(place, params, missing))
            return result[0], replace(result[1], parameters=padded)

        found.add(node, _legacy_place(tensors, sizes, expected), result, pad)
    return found


def _legacy_place(tensors: Sequence[bytes], sizes: Sizes, expected: Schema) -> int | None:
    if len(tensors) != len(expected):
        return None
    try:
        shapes = [read_header(data).shape for data in tensors]
    except ValueError:  # the checks that every reply passes name it
        return None
    return sizes.place_of(dict(zip(expected, shapes, strict=True)))


def _shapes(record: ArrayRecord) -> Mapping[str, tuple[int, ...]]:
    return {name: tuple(array.shape) for name, array in record.items()}


def _own(sizes: Sizes) -> Params:
    state: dict[str, Tensor] = sizes.networks[0].held.model.state_dict()
    return state
