"""The replies of a round, read on a thread of their own while other clients train."""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from logging import DEBUG
from typing import Any

import torch
from flwr.app import ArrayRecord, Message
from flwr.supercore import log

from c2m3_fl.core.basis import bounded
from c2m3_fl.core.drift import Drifts, Products
from c2m3_fl.core.spec import Params, PermutationSpec
from c2m3_fl.core.state_dicts import to_device
from c2m3_fl.flower.incoming.admitted import Decoded, Reply
from c2m3_fl.flower.incoming.records import Schema
from c2m3_fl.flower.incoming.replies import check_weight, decoded, only_arrays, only_metrics, renamed

_UNUSED = "replies are not compared with the model that was sent: %s"

Kind = tuple[tuple[str, str, tuple[int, ...], str], ...]  # name, element type, shape and serialisation of every array
Key = tuple[Kind, bytes]


@dataclass(frozen=True, eq=False)
class Seen:
    """The replies of a round next to the model that was sent.

    Attributes
    ----------
    drifts : Drifts
        What is known of them.
    numbers : tuple of int
        Their numbers there, in the order of the replies.
    """

    drifts: Drifts
    numbers: tuple[int, ...]

    def agreement_of_still(self, weights: Sequence[float], *, apart: bool) -> float | None:
        """The agreement of the replies as they are, where it is proven that none has to move; None elsewhere.

        Parameters
        ----------
        weights : sequence of float
            Their averaging weights; large replies are bounded as in a match.
        apart : bool
            Whether each reply is matched with nothing but the model that was sent.
        """
        try:
            pulls = bounded(self.drifts.norms(self.numbers).tolist(), weights)
            if not self.drifts.still(self.numbers, pulls, apart=apart):
                return None
            found = self.drifts.agreement(self.numbers, pulls, apart=apart)
        except Exception as error:  # a match finds the same
            log(DEBUG, _UNUSED, error)
            return None
        return found if math.isfinite(found) else None

    def products(self) -> Products | None:
        """The products of the replies; None where they are many."""
        try:
            return self.drifts.products(self.numbers) if self.drifts.complete else None
        except Exception as error:  # the replies themselves give the same
            log(DEBUG, _UNUSED, error)
            return None


class Ahead:
    """What can be computed of a round before its last reply has come.

    Whatever depends on the model that was sent alone is computed at once, on a thread. A reply that arrives is decoded,
    checked and digested there, and compared with that model and with the replies before it. Nothing of this decides
    anything: the replies that Flower delivers in the end are read as ever, and what was computed of the very same bytes
    is taken instead of being computed again.

    Parameters
    ----------
    spec : PermutationSpec
        The symmetries of the network.
    sent : callable
        The model that was sent, in its own element types; called on the thread.
    """

    def __init__(self, spec: PermutationSpec, sent: Callable[[], Params]) -> None:
        self._pool = ThreadPoolExecutor(1, "c2m3-replies")
        self._decoded: dict[Key, tuple[Decoded, list[bytes]]] = {}  # the bytes, so that no others come to lie there
        self._kinds: dict[Kind, Kind] = {}  # of all replies but odd ones it is the same object
        self._schema: Schema = {}
        self._heard = self._done = 0
        self._drifts: Future[Drifts | None] = self._pool.submit(_drifts, spec, sent)

    def hear(self, message: Message, schema: Schema, weighted_by: str | None) -> None:
        """Read a reply on the thread.

        Parameters
        ----------
        message : Message
            As it arrived.
        schema : mapping of str to Entry
            What replies look like.
        weighted_by : str, optional
            Key of the averaging weight; None where all count the same.
        """
        if schema != self._schema:  # all replies keep the same object
            self._schema = schema
        self._heard += 1
        self._pool.submit(self._read, message, self._schema, weighted_by)

    def _read(self, message: Message, schema: Schema, weighted_by: str | None) -> None:
        try:
            arrays = ArrayRecord(dict(renamed(only_arrays(message), schema)))  # copies: others may change theirs
            key = self._key(arrays)
            if key in self._decoded:
                return  # heard twice: of a grid, and of the grid that it holds
            found = decoded(arrays, schema)
            self._decoded[key] = found, [array.data for array in arrays.values()]
            weight = 1.0 if weighted_by is None else check_weight(only_metrics(message)[weighted_by], weighted_by)
            drifts = self._drifts.result()
            if drifts is not None:
                _add(drifts, found.params, weight)
        except Exception as error:  # the reply is read again when all have arrived, and its fault is named then
            log(DEBUG, "a reply was not read as it arrived: %s", error)
        finally:
            self._done += 1
            self._multiply()

    def _multiply(self) -> None:
        """Use the time until the next reply."""
        try:
            drifts = self._drifts.result() if self._done == self._heard else None
            if drifts is not None:
                with torch.no_grad():
                    drifts.multiply()
        except Exception as error:  # it is done when the products are needed
            log(DEBUG, _UNUSED, error)

    def finished(self) -> Ahead:
        """Itself, once everything that has arrived is read."""
        self._pool.shutdown(wait=True)
        return self

    def drop(self) -> None:
        """Read nothing any more, and keep nothing: this round is not aggregated."""
        self._pool.shutdown(wait=False, cancel_futures=True)
        self._decoded = {}

    def decoded(self, record: ArrayRecord, schema: Schema) -> Decoded:
        """What `replies.decoded` gives, remembered where these very bytes have been read."""
        if schema is not self._schema and schema == self._schema:
            self._schema = schema  # so that the next reply's need not be compared
        found = self._decoded.get(self._key(record)) if schema is self._schema else None
        return decoded(record, schema) if found is None else found[0]

    def _key(self, record: ArrayRecord) -> Key:
        """What tells records apart: bytes are the same where they are the same object."""
        kind = tuple((name, each.dtype, tuple(each.shape), each.stype) for name, each in record.items())
        return self._kinds.setdefault(kind, kind), struct.pack(
            f"{len(kind)}q", *(id(each.data) for each in record.values())
        )

    def seen(self, replies: Sequence[Reply[Any]], weights: Sequence[float]) -> Seen | None:
        """The replies next to the model that was sent; those that were not heard of are compared now.

        Parameters
        ----------
        replies : sequence of Reply
            The replies.
        weights : sequence of float
            Their averaging weights.

        Returns
        -------
        Seen, optional
            None where one of them has moved too far for anything to follow.
        """
        self.finished()
        try:
            drifts = self._drifts.result()
            if drifts is None:
                return None
            numbers = [_add(drifts, reply.params, weight) for reply, weight in zip(replies, weights, strict=True)]
        except Exception as error:  # the alignment must not depend on it
            log(DEBUG, _UNUSED, error)
            return None
        return Seen(drifts, tuple(numbers)) if drifts.hopeful else None


def _drifts(spec: PermutationSpec, sent: Callable[[], Params]) -> Drifts | None:
    """None for symmetries that are not permutations alone."""
    with torch.no_grad():
        return None if spec.rotations else Drifts(spec, to_device(sent(), torch.device("cpu")))


def _add(drifts: Drifts, params: Params, weight: float) -> int:
    """The number of a reply, which is added where it is new; -1 where nothing follows from the drifts any more."""
    number = drifts.number_of(params)
    if number is None and not drifts.hopeful:
        return -1
    with torch.no_grad():
        return drifts.add(params, weight) if number is None else number
