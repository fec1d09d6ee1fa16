"""State dicts whose tensors lie in the bytes of Flower's arrays, and are made when somebody asks for them.

A tensor weighs half a kilobyte however small it is, and a reply of a deep network has hundreds. So of a reply no more
is kept than its arrays; torch's tensors live as long as they are used.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from functools import lru_cache
from weakref import WeakValueDictionary

import numpy as np
import torch
from flwr.app import Array, ArrayRecord
from torch import Tensor

from c2m3_fl.core.spec import Params
from c2m3_fl.flower.incoming.npy import read_header
from c2m3_fl.flower.incoming.records import NUMPY_STYPE, Entry, Schema

# Those in use, by the identity of the bytes in which they lie, and which they keep alive: nobody writes into them.
_TENSORS: WeakValueDictionary[int, Tensor] = WeakValueDictionary()


class Carried(Mapping[str, Tensor]):
    """A state dict whose tensors lie in the bytes of arrays; while one is in use, asking for it gives the very same.

    Parameters
    ----------
    schema : mapping of str to Entry
        What the tensors look like, in their order; kept.
    params : mapping of str to Tensor
        The state dict. Tensors that do not lie in the bytes of an array as they are, cast ones for instance, are kept.
    arrays : mapping of str to Array
        Arrays that tensors came as, in whatever precision; of the others new ones are made.
    """

    __slots__ = ("_data", "_made", "_places", "schema")

    def __init__(self, schema: Schema, params: Params, arrays: Mapping[str, Array]) -> None:
        self.schema = schema
        self._places = _places(tuple(schema))
        made, found = {}, []
        for name, entry in schema.items():
            array = arrays.get(name)
            if array is None or not _lies_in(array.data, entry):
                made[name] = params[name]
                array = array if array is not None and entry.floating else average_of(params[name])
            found.append(array.data)  # whatever becomes of the array
        self._made, self._data = made, tuple(found)

    def __getitem__(self, name: str) -> Tensor:
        if name in self._made:
            return self._made[name]
        data = self._data[self._places[name]]
        found = _TENSORS.get(id(data))
        if found is None:
            found = _TENSORS[id(data)] = _tensor_in(data)
        return found

    def __iter__(self) -> Iterator[str]:
        return iter(self.schema)

    def __len__(self) -> int:
        return len(self.schema)

    def array(self, name: str) -> Array:
        """An array of one tensor: as it came, or of a tensor that is kept as a strategy averages it."""
        return _array_of(self._data[self._places[name]])

    @property
    def record(self) -> ArrayRecord:
        """Arrays as a strategy averages them, see `to_average`; it may change them, other records have their own."""
        record = ArrayRecord()
        for name in self.schema:
            as_it_is = name in self._made or self.schema[name].floating
            record[name] = self.array(name) if as_it_is else average_of(self[name])
        return record


def carried(params: Params, like: Params) -> Params:
    """The same values in the bytes of arrays of their own, where those of `like` lie in some: one copy serves both.

    Parameters
    ----------
    params : mapping of str to Tensor
        On the CPU; not mutated.
    like : mapping of str to Tensor
        State dict of the same schema, of which some tensors may be the very same: these share its bytes.
    """
    if params is like or not isinstance(like, Carried):
        return params
    schema = like.schema if tuple(params) == tuple(like) else {name: like.schema[name] for name in params}
    arrays = {
        name: like.array(name) if value is like[name] else Array(np.asarray(value.numpy()))
        for name, value in params.items()
    }
    return Carried(schema, params, arrays)


def to_average(params: Params, own: Mapping[str, Array]) -> ArrayRecord:
    """Arrays for a strategy that averages: integers go as float64, which every strategy's arithmetic takes.

    The results are the same in floating tensors.

    Parameters
    ----------
    params : mapping of str to Tensor
        The tensors; not mutated.
    own : mapping of str to Array
        Arrays that some of them came as, whose bytes are taken where they are floating.
    """
    record = ArrayRecord()
    for name, value in params.items():
        array = own.get(name) if value.is_floating_point() else None
        record[name] = average_of(value) if array is None else _array_of(array.data)
    return record


def average_of(value: Tensor) -> Array:
    """The array of one tensor for a strategy that averages: see `to_average`."""
    if value.is_floating_point():
        return Array(np.asarray(value.numpy()))
    data = _as_float64(float(value)) if value.ndim == 0 else Array(np.asarray(value.double().numpy())).data
    return Array("float64", tuple(value.shape), NUMPY_STYPE, data)


@lru_cache(maxsize=256)  # the counters of a round's replies are much the same
def _as_float64(number: float) -> bytes:
    """The bytes of an array of this one number."""
    return Array(np.asarray(number)).data


@lru_cache(maxsize=16)  # the replies of a round have the same names
def _places(names: tuple[str, ...]) -> dict[str, int]:
    return {name: place for place, name in enumerate(names)}


def _lies_in(data: bytes, entry: Entry) -> bool:
    """Whether bytes that were checked hold the elements of a tensor as torch keeps them."""
    header, count = read_header(data), math.prod(entry.shape)
    if header.dtype != entry.dtype or header.dtype == "bool" or header.fortran or header.shape != entry.shape:
        return False
    return count > 0 and header.start % getattr(torch, header.dtype).itemsize == 0


def _array_of(data: bytes) -> Array:
    """An array of bytes that were checked."""
    header = read_header(data)
    return Array(header.dtype, header.shape, NUMPY_STYPE, data)


def _tensor_in(data: bytes) -> Tensor:
    header = read_header(data)
    found = torch.frombuffer(data, dtype=getattr(torch, header.dtype), offset=header.start)
    return found.resize_(header.shape)  # in place: of a view torch would keep what it was taken of, too
