"""What a faulty client answers to the server's queries, whatever the query is about."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, Message
from torch import Tensor

from c2m3_fl.flower.incoming.records import from_params, to_params

LIAR = 3
_SEVENTY = (1,) * 70


def floats(change: Callable[[Tensor], Tensor]) -> Callable[[Message], None]:
    """Change every array of floats."""
    return arrays(lambda name, value: change(value) if value.is_floating_point() else value)


def counts(change: Callable[[Tensor], Tensor]) -> Callable[[Message], None]:
    """Change every number of examples, rows or values."""
    return arrays(lambda name, value: value if value.is_floating_point() else change(value))


def arrays(change: Callable[[str, Tensor], Tensor]) -> Callable[[Message], None]:
    def spoil(message: Message) -> None:
        for key, record in message.content.array_records.items():
            message.content[key] = from_params({name: change(name, each) for name, each in to_params(record).items()})

    return spoil


def raw(change: Callable[[Array], Array]) -> Callable[[Message], None]:
    """Change what arrays say of themselves, and their bytes."""

    def spoil(message: Message) -> None:
        for key, record in message.content.array_records.items():
            message.content[key] = ArrayRecord({name: change(each) for name, each in record.items()})

    return spoil


def seventy_dimensions(array: Array) -> Array:
    """One element in 70 dimensions, more than NumPy's arrays have."""
    header = {"descr": np.dtype(array.dtype).str, "fortran_order": False, "shape": _SEVENTY}
    text = repr(header).encode()
    text += b" " * (-(len(text) + 11) % 64) + b"\n"
    data = b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + bytes(np.dtype(array.dtype).itemsize)
    return Array(array.dtype, _SEVENTY, array.stype, data)


def no_npy(array: Array) -> Array:
    return Array(array.dtype, array.shape, array.stype, np.random.default_rng(0).bytes(len(array.data)))


def halved(message: Message) -> None:
    """Every second array is missing."""
    for key, record in message.content.array_records.items():
        message.content[key] = ArrayRecord({name: record[name] for name in list(record)[::2]})


FAULTS = {
    "random bytes": raw(no_npy),
    "random numbers": floats(lambda value: torch.randn(value.shape, dtype=value.dtype)),
    "nothing": lambda message: message.content.clear(),
    "half of the arrays": halved,
    "two records": lambda message: message.content.update({"more": ArrayRecord()}),
    "negative counts": counts(lambda value: -value),
    "no examples": counts(torch.zeros_like),
    "2**53 examples": counts(lambda value: torch.full_like(value, 2**53)),
    "counts that are floats": arrays(lambda name, value: value if value.is_floating_point() else value.double()),
    "70 dimensions": raw(seventy_dimensions),
    "NaN": floats(lambda value: value * math.nan),
    "infinite": floats(lambda value: value + math.inf),
    "1e37": floats(lambda value: torch.full_like(value, 1e37)),
    "1e37 times as large": floats(lambda value: value * 1e37),
    "1e5 times as large": floats(lambda value: value * 1e5),
    "1e-37 times as large": floats(lambda value: value * 1e-37),
    "negative": floats(lambda value: -value.abs() - 1),
}


class Faulty:
    """Transit in which one node's answers to queries are changed; to be passed to a grid.

    Parameters
    ----------
    fault : callable or None
        What is done to an answer; None: it is lost.
    since : int
        The first exchange in which it is done, counting from 1.
    """

    def __init__(self, fault: Callable[[Message], None] | None, since: int = 1) -> None:
        self.fault, self.since, self.exchanges = fault, since, 0

    def __call__(self, replies: list[Message]) -> Iterable[Message]:
        if not any(each.metadata.message_type.startswith("query") for each in replies):
            return replies
        self.exchanges += 1
        if self.exchanges < self.since:
            return replies
        kept = []
        for each in replies:
            if each.metadata.src_node_id != LIAR:
                kept.append(each)
            elif self.fault is not None:
                if not each.has_error():
                    self.fault(each)
                kept.append(each)
        return kept
