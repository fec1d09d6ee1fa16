"""Flower's array records and torch's state dicts: an exact, suspicious conversion.

Nothing that a record carries is trusted: name, shape, element type and length are compared with what was
expected before any memory is taken, and no pickle is ever read. Flower's arrays are ``.npy`` bytes, which
cannot hold bfloat16: such a model must be sent as float32.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from io import BytesIO
from typing import Literal

import numpy as np
import torch
from flwr.app import Array, ArrayRecord
from torch import Tensor

from c2m3_fl.core.spec import Params
from c2m3_fl.errors import ParamsError

_NUMPY_STYPE = "numpy.ndarray"  # the one serialisation that Flower's own strategies read
_SUPPORTED = frozenset({"float16", "float32", "float64", "int8", "int16", "int32", "int64", "uint8", "bool"})
_HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}


@dataclass(frozen=True)
class Entry:
    """What one array must look like.

    Attributes
    ----------
    dtype : str
        NumPy's name of the element type.
    shape : tuple of int
        The shape.
    also : str, optional
        A second element type that is taken, and converted to the first.
    """

    dtype: str
    shape: tuple[int, ...]
    also: str | None = None


Schema = Mapping[str, Entry]


def schema_of(record: ArrayRecord, who: str = "arrays") -> dict[str, Entry]:
    """What every reply to `record` must look like: its keys, shapes and element types, in its order.

    Raises
    ------
    ParamsError
        When an element type cannot be averaged or held by a torch tensor.
    """
    return _supported({name: Entry(array.dtype, tuple(array.shape)) for name, array in record.items()}, who)


def schema_of_params(params: Params, who: str = "model") -> dict[str, Entry]:
    """The schema of the record that `params` would be sent as.

    Raises
    ------
    ParamsError
        For element types that Flower's arrays cannot hold, bfloat16 above all.
    """
    entries = {
        name: Entry(str(value.dtype).removeprefix("torch."), tuple(value.shape)) for name, value in params.items()
    }
    return _supported(entries, who)


def _supported(schema: dict[str, Entry], who: str) -> dict[str, Entry]:
    for name, entry in schema.items():
        if entry.dtype not in _SUPPORTED:
            raise ParamsError(
                f"{who}: {name!r} has dtype {entry.dtype}, expected one of {sorted(_SUPPORTED)}; "
                "convert the model with .float()"
            )
    return schema


def reply_schema(model: Schema, sent: Schema) -> dict[str, Entry]:
    """What replies must look like, in the order of what was sent.

    They are of the model's element types, or of those that were sent: some strategies return float64, and a client
    that computes with NumPy sends back what it was sent.
    """
    return {
        name: replace(model[name], also=entry.dtype if entry.dtype != model[name].dtype else None)
        for name, entry in sent.items()
    }


def to_params(record: ArrayRecord, schema: Schema | None = None, who: str = "arrays") -> dict[str, Tensor]:
    """State dict of a record, in the order of the schema.

    Parameters
    ----------
    record : ArrayRecord
        The arrays as Flower carries them; not mutated.
    schema : mapping of str to Entry, optional
        What the record must look like; by default what it says of itself.
    who : str
        Whose arrays these are, for the error message.

    Raises
    ------
    ParamsError
        When keys, shapes, element types or lengths differ from the schema, or the bytes are no ``.npy`` file.
    """
    schema = schema_of(record, who) if schema is None else schema
    missing = [name for name in schema if name not in record]
    extra = [name for name in record if name not in schema]
    if missing or extra:
        raise ParamsError(f"{who}: keys differ from the model's: missing {missing[:5]}, unexpected {extra[:5]}")
    return {name: _decode(f"{who}: {name!r}", record[name], entry) for name, entry in schema.items()}


def from_params(params: Params) -> ArrayRecord:
    """Record of a state dict, keeping key order and element types.

    Raises
    ------
    ParamsError
        For element types that Flower's arrays cannot hold, bfloat16 above all.
    """
    schema_of_params(params, "arrays")
    return ArrayRecord({name: Array(np.asarray(value.detach().cpu().numpy())) for name, value in params.items()})


def _decode(who: str, array: Array, entry: Entry) -> Tensor:
    """The tensor of one array, after everything that it claims has been compared with `entry`."""
    if array.stype != _NUMPY_STYPE:
        raise ParamsError(f"{who} is serialised as {array.stype!r}, expected {_NUMPY_STYPE!r}")
    if tuple(array.shape) != entry.shape:
        raise ParamsError(f"{who} has shape {tuple(array.shape)}, expected {entry.shape}")
    if array.dtype not in (entry.dtype, entry.also):
        raise ParamsError(f"{who} has dtype {array.dtype}, expected {entry.dtype}")
    return read_npy(who, array.data, entry)


def read_npy(who: str, data: bytes, entry: Entry) -> Tensor:
    """Tensor of the elements of a ``.npy`` file, which must be of an expected kind and of exactly its length.

    Raises
    ------
    ParamsError
        When the bytes are no such file; before memory is taken for more than they are.
    """
    stream = BytesIO(data)
    try:
        header = _HEADERS[np.lib.format.read_magic(stream)]
        shape, fortran, dtype = header(stream)
    except (ValueError, KeyError, TypeError) as error:
        raise ParamsError(f"{who} holds no readable .npy bytes: {error}") from error
    if tuple(shape) != entry.shape or dtype not in [np.dtype(name) for name in (entry.dtype, entry.also) if name]:
        raise ParamsError(f"{who} holds {dtype} of shape {tuple(shape)}, expected {entry.dtype} of shape {entry.shape}")
    body, expected = memoryview(data)[stream.tell() :], math.prod(entry.shape) * dtype.itemsize
    if len(body) != expected:
        raise ParamsError(f"{who} holds {len(body)} bytes of elements, expected {expected}")
    own: torch.dtype = getattr(torch, entry.dtype)
    if not expected:
        return torch.empty(entry.shape, dtype=own)  # NumPy's strides of empty arrays are none that torch can view
    order: Literal["F", "C"] = "F" if fortran else "C"
    elements = np.ndarray(entry.shape, dtype, buffer=body, order=order)
    return torch.from_numpy(elements.copy(order="C")).to(own)
