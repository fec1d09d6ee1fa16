"""The header of ``.npy`` bytes, read by a grammar of our own: hostile bytes never reach NumPy's parser.

NumPy evaluates the header as a Python literal, which raises what Python's tokenizer and parser raise. This grammar
takes less: a dict of the three keys, each once, the name of a plain element type, spaces, and a newline.
Source: the format's description in `numpy.lib.format`, versions 1.0, 2.0 and 3.0.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache

_MAGIC = b"\x93NUMPY"
_LENGTHS = {b"\x01\x00": 2, b"\x02\x00": 4, b"\x03\x00": 4}  # by version: bytes that hold the header's length
_LONGEST = 10_000  # what NumPy reads of a header, unless told otherwise
_DIMENSIONS = 64  # of an array of NumPy 2
_NUMBER = rb"(?:0|[1-9]\d{0,18})"
_ENTRY = re.compile(
    rb" *(?P<quote>['\"])(?:"
    rb"descr(?P=quote) *: *(?P<mark>['\"])(?P<descr>[<>|=]?[A-Za-z]\d{0,9}(?:\[[a-z]{1,3}\])?)(?P=mark)"
    rb"|fortran_order(?P=quote) *: *(?P<fortran>True|False)"
    rb"|shape(?P=quote) *: *\((?P<shape>|" + _NUMBER + rb",|" + _NUMBER + rb"(?:, ?" + _NUMBER + rb")+,?)\)"
    rb") *"
)
_NAMES = {
    "<f2": "float16",
    "<f4": "float32",
    "<f8": "float64",
    "|i1": "int8",
    "<i2": "int16",
    "<i4": "int32",
    "<i8": "int64",
    "|u1": "uint8",
    "|b1": "bool",
    "<V2": "bfloat16",  # as ml_dtypes' arrays are saved
    "|V2": "bfloat16",
    "|O": "object",
}


@dataclass(frozen=True)
class Header:
    """What a header says.

    Attributes
    ----------
    dtype : str
        NumPy's name of the element type; for types that no tensor of a model has, as the header spells it.
    fortran : bool
        Whether the elements are in column-major order.
    shape : tuple of int
        The shape.
    start : int
        Where the elements begin.
    """

    dtype: str
    fortran: bool
    shape: tuple[int, ...]
    start: int


def read_header(data: bytes) -> Header:
    """The header of ``.npy`` bytes.

    Raises
    ------
    ValueError
        When the bytes do not begin with a header of this grammar.
    """
    version, width = data[6:8], _LENGTHS.get(data[6:8])
    if data[:6] != _MAGIC or width is None:
        raise ValueError(f"they begin with {data[:6]!r} and version {version!r}")
    length = int.from_bytes(data[8 : 8 + width], "little")
    start = 8 + width + length
    if length > _LONGEST or start > len(data):
        raise ValueError(f"a header of {length} bytes in {len(data)}, expected at most {_LONGEST}")
    return _parsed(data[8 + width : start], start)


@lru_cache(maxsize=1024)  # the replies of a round have the same headers
def _parsed(text: bytes, start: int) -> Header:
    dictionary, brace, padding = text.partition(b"}")
    if dictionary[:1] != b"{" or not brace or padding.strip(b" ") != b"\n" or padding[-1:] != b"\n":
        raise ValueError("their header is not a dict, spaces and a newline")
    found: dict[str, str] = {}
    place = 1
    while place < len(dictionary) and dictionary[place:].strip(b" "):
        entry = _ENTRY.match(dictionary, place)
        if entry is None or (entry.end() < len(dictionary) and dictionary[entry.end()] != ord(",")):
            raise ValueError(f"the entry {dictionary[place : place + 40]!r} of their header")
        name = next(each for each in ("descr", "fortran", "shape") if entry[each] is not None)
        if name in found:
            raise ValueError(f"their header says {name!r} twice")
        found[name] = entry[name].decode("ascii")
        place = entry.end() + 1
    if len(found) != 3:
        raise ValueError(f"their header says {sorted(found)} alone")
    shape = tuple(int(size) for size in found["shape"].replace(" ", "").split(",") if size)
    if len(shape) > _DIMENSIONS:
        raise ValueError(f"an array of {len(shape)} dimensions, expected at most {_DIMENSIONS}")
    return Header(_NAMES.get(found["descr"], found["descr"]), found["fortran"] == "True", shape, start)
