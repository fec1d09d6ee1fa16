"""Flower's array records and torch's state dicts: an exact, suspicious conversion.

Nothing that a record carries is trusted: name, shape, element type and length are compared with what was
expected before any memory is taken, and no pickle is ever read. Flower's arrays are ``.npy`` bytes, which NumPy
alone cannot make of bfloat16: such a model must be sent as float32.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from flwr.app import Array, ArrayRecord
from torch import Tensor

from c2m3_fl.core.spec import Params
from c2m3_fl.errors import ParamsError
from c2m3_fl.flower.incoming.npy import Header, read_header

_WRAPPERS = ("_orig_mod", "module")  # what torch.compile and DataParallel put before the names of a state dict
NUMPY_STYPE = "numpy.ndarray"  # the one serialisation that Flower's own strategies read

with warnings.catch_warnings():  # once per process torch warns of tensors in bytes, which nobody may write into
    warnings.simplefilter("ignore")
    torch.frombuffer(b"0", dtype=torch.uint8)

_SUPPORTED = frozenset({"float16", "float32", "float64", "int8", "int16", "int32", "int64", "uint8", "bool"})
_FLOATS = frozenset({"float16", "bfloat16", "float32", "float64"})


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
    casts : bool
        Whether any other floating element type is taken for a floating one, too.
    """

    dtype: str
    shape: tuple[int, ...]
    also: str | None = None
    casts: bool = False

    @property
    def floating(self) -> bool:
        """Whether the elements are floating."""
        return self.dtype in _FLOATS

    def takes(self, dtype: str) -> bool:
        """Whether an array of this element type is taken."""
        return self.as_sent(dtype) or (self.casts and {self.dtype, dtype} <= _FLOATS)

    def as_sent(self, dtype: str) -> bool:
        """Whether this is one of the two element types that are expected."""
        return dtype in (self.dtype, self.also)


Schema = Mapping[str, Entry]


def schema_of(record: ArrayRecord, who: str = "arrays") -> dict[str, Entry]:
    """What every reply to `record` must look like: its keys, shapes and element types, in its order.

    Raises
    ------
    ParamsError
        When `record` is no ArrayRecord, or an element type cannot be averaged or held by a torch tensor.
    """
    check_record(record, who)
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


def check_record(record: object, who: str) -> None:
    """Raise `ParamsError` unless `record` is an ArrayRecord: a state dict, say."""
    if not isinstance(record, ArrayRecord):
        tensors = isinstance(record, Mapping) and all(isinstance(value, Tensor) for value in record.values())
        what = "a state dict" if tensors else f"a {type(record).__name__}"
        raise ParamsError(f"{who}: {what}, expected an ArrayRecord; pass ArrayRecord(model.state_dict())")


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
    that computes with NumPy sends back what it was sent. Floating ones of any other precision are cast.
    """
    return {name: Entry(model[name].dtype, model[name].shape, entry.dtype, casts=True) for name, entry in sent.items()}


def bare_name(name: str) -> str:
    """The name of a tensor without what wrappers of a network put before it."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def to_params(
    record: ArrayRecord, schema: Schema | None = None, who: str = "arrays", *, share: bool = False
) -> dict[str, Tensor]:
    """State dict of a record, in the order of the schema.

    Parameters
    ----------
    record : ArrayRecord
        The arrays as Flower carries them; not mutated.
    schema : mapping of str to Entry, optional
        What the record must look like; by default what it says of itself.
    who : str
        Whose arrays these are, for the error message.
    share : bool
        Whether tensors lie in the record's own bytes where that is possible; then nobody may write into them.

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
    return {name: _decode(f"{who}: {name!r}", record[name], entry, share=share) for name, entry in schema.items()}


def from_params(params: Params) -> ArrayRecord:
    """Record of a state dict, keeping key order and element types.

    Raises
    ------
    ParamsError
        For element types that Flower's arrays cannot hold, bfloat16 above all.
    """
    schema_of_params(params, "arrays")
    return ArrayRecord({name: Array(np.asarray(value.detach().cpu().numpy())) for name, value in params.items()})


def _decode(who: str, array: Array, entry: Entry, *, share: bool) -> Tensor:
    """The tensor of one array, after everything that it claims has been compared with `entry`."""
    if array.stype != NUMPY_STYPE:
        raise ParamsError(f"{who} is serialised as {array.stype!r}, expected {NUMPY_STYPE!r}")
    if tuple(array.shape) != entry.shape:
        raise ParamsError(f"{who} has shape {tuple(array.shape)}, expected {entry.shape}")
    if not entry.takes(array.dtype):
        raise ParamsError(f"{who} has dtype {array.dtype}, expected {entry.dtype}")
    header = _header(who, array.data)
    if header.dtype != array.dtype:
        raise ParamsError(f"{who} holds {header.dtype} of shape {header.shape}, and says that it is {array.dtype}")
    return read_npy(who, array.data, entry, share=share)


def read_npy(who: str, data: bytes, entry: Entry | None = None, *, share: bool = False) -> Tensor:
    """Tensor of the elements of a ``.npy`` file.

    Parameters
    ----------
    who : str
        Whose bytes these are, for the error message.
    data : bytes
        The file; its elements are copied.
    entry : Entry, optional
        What the array must look like; by default what its header says, of any element type that a model may have.
    share : bool
        Whether the tensor may lie in the bytes; then nobody may write into it.

    Raises
    ------
    ParamsError
        When the bytes are no such file, of another kind or length; before memory is taken for more than they are.
    """
    header = _header(who, data)
    if entry is None:
        entry = _supported({"": Entry(header.dtype, header.shape)}, who)[""]
    if header.shape != entry.shape or not entry.takes(header.dtype):
        raise ParamsError(
            f"{who} holds {header.dtype} of shape {header.shape}, expected {entry.dtype} of shape {entry.shape}"
        )
    found, own = getattr(torch, header.dtype), getattr(torch, entry.dtype)
    body, expected = memoryview(data)[header.start :], math.prod(entry.shape) * found.itemsize
    if len(body) != expected:
        raise ParamsError(f"{who} holds {len(body)} bytes of elements, expected {expected}")
    if not expected:
        return torch.empty(entry.shape, dtype=own)
    kind = torch.uint8 if found is torch.bool else found
    if share and header.start % kind.itemsize == 0:
        elements = torch.frombuffer(data, dtype=kind, offset=header.start)
    else:
        elements = torch.frombuffer(bytearray(body), dtype=kind)
    if found is torch.bool:
        elements = elements != 0
    if header.fortran:
        return elements.view(entry.shape[::-1]).permute(*reversed(range(len(entry.shape)))).contiguous().to(own)
    return elements.resize_(entry.shape).to(own)  # in place: torch keeps what a view was taken of, too


def received_type(data: bytes) -> str:
    """The element type of ``.npy`` bytes that were read before."""
    return read_header(data).dtype


def _header(who: str, data: bytes) -> Header:
    try:
        return read_header(data)
    except ValueError as error:
        raise ParamsError(f"{who} holds no readable .npy bytes: {error}") from error
