"""Replies of narrower clients as they arrive: padded to the model's width, so that every other check sees one width."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Generic, TypeVar

from flwr.app import ArrayRecord, Message

from c2m3_fl.core.spec import Params
from c2m3_fl.flower.incoming.admitted import Dropped, fault_of
from c2m3_fl.flower.incoming.npy import read_header
from c2m3_fl.flower.incoming.records import Schema, from_params, read_npy, to_params
from c2m3_fl.flower.incoming.replies import check_values, renamed
from c2m3_fl.flower.legacy_messages import Result, node_of, to_parameters
from c2m3_fl.flower.private import with_arrays
from c2m3_fl.flower.widths.sizes import Cuts, Sizes

Source = TypeVar("Source")
_SECOND = "a second reply of the same node, of another width"


@dataclass(frozen=True)
class Arrived(Generic[Source]):
    """Replies that are all of the model's width, and what else was found.

    Attributes
    ----------
    replies : tuple of Message or legacy result
        Those that fit no narrower width as they came.
    places : mapping of int to int
        By node, the width that it replied with.
    dropped : tuple of Dropped
        Replies of a narrower width that cannot be read, or of a second width of one node.
    """

    replies: tuple[Source, ...]
    places: Mapping[int, int]
    dropped: tuple[Dropped, ...]


@dataclass(frozen=True)
class _Candidate(Generic[Source]):
    """A reply before it is read.

    Attributes
    ----------
    node : int
        Who sent it.
    place : int, optional
        Its width; None for a reply of no known width, which later checks drop and name.
    source : Message or legacy result
        The reply.
    read : callable
        From a width to its tensors, checked.
    rewritten : callable
        From other tensors to the reply that holds them.
    """

    node: int
    place: int | None
    source: Source
    read: Callable[[int], Params]
    rewritten: Callable[[Params], Source]


def widen_messages(
    messages: Iterable[Message], sizes: Sizes, cuts: Cuts, expected: Schema, known: Mapping[int, int]
) -> Arrived[Message]:
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
    known : mapping of int to int
        By node, the width that it was sent; the model's if it is not there.
    """
    schemas = cache(lambda place: sizes.schema(place, expected))

    def candidate(message: Message) -> _Candidate[Message]:
        records = [] if message.has_error() or not message.has_content() else [*message.content.array_records.items()]
        place = sizes.place_of(_shapes(records[0][1])) if len(records) == 1 else None

        def read(place: int) -> Params:
            schema = schemas(place)
            return to_params(renamed(records[0][1], schema), schema, "reply")

        def rewritten(params: Params) -> Message:
            return with_arrays(message, {records[0][0]: from_params(params)})

        return _Candidate(message.metadata.src_node_id, place, message, read, rewritten)

    return _arrived([candidate(message) for message in messages], sizes, cuts, known)


def widen_results(
    results: Iterable[Result], sizes: Sizes, cuts: Cuts, expected: Schema, known: Mapping[int, int]
) -> Arrived[Result]:
    """The same for legacy results.

    Parameters
    ----------
    results : iterable of ClientProxy and FitRes
        As Flower delivered them; not mutated.
    sizes, cuts, expected, known
        As for `widen_messages`.
    """
    schemas = cache(lambda place: sizes.schema(place, expected))

    def candidate(result: Result) -> _Candidate[Result]:
        tensors = result[1].parameters.tensors

        def read(place: int) -> Params:
            entries = zip(schemas(place).items(), tensors, strict=True)
            return {name: read_npy(f"reply: {name!r}", data, entry) for (name, entry), data in entries}

        def rewritten(params: Params) -> Result:
            return result[0], replace(result[1], parameters=to_parameters(params))

        return _Candidate(node_of(result[0]), _legacy_place(tensors, sizes, expected), result, read, rewritten)

    return _arrived([candidate(result) for result in results], sizes, cuts, known)


def _arrived(
    candidates: Sequence[_Candidate[Source]], sizes: Sizes, cuts: Cuts, known: Mapping[int, int]
) -> Arrived[Source]:
    """Read the replies and pad them.

    Of a node that replied with several widths, the usable replies of the width that it was sent are kept, else those of
    the widest: the order in which they arrived has no effect.
    """
    missing: Params = sizes.networks[0].held.model.state_dict()
    widths: dict[int, set[int]] = {}
    for each in candidates:
        if each.place is not None:
            widths.setdefault(each.node, set()).add(each.place)
    replies: list[Source] = [each.source for each in candidates if each.place is None]
    padded: dict[int, dict[int, list[Source]]] = {}
    dropped: list[Dropped] = []
    for each in candidates:
        if each.place is None:
            continue
        try:
            source = each.source
            if each.place or len(widths[each.node]) > 1:
                params = each.read(each.place)
                check_values(params)
                source = each.rewritten(cuts.padded(each.place, params, missing)) if each.place else source
            padded.setdefault(each.node, {}).setdefault(each.place, []).append(source)
        except Exception as error:  # whatever one client sends must not end the round
            dropped.append(fault_of(each.node, error))
    places: dict[int, int] = {}
    for node, found in padded.items():
        sent = known.get(node, 0)
        places[node] = sent if sent in found else min(found)
        replies += found.pop(places[node])
        dropped += [Dropped(node, _SECOND) for others in found.values() for _ in others]
    return Arrived(tuple(replies), places, tuple(dropped))


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
