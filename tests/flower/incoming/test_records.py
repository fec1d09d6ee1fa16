"""Records and state dicts: exact both ways, and nothing taken on trust."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord

from c2m3_fl.errors import ParamsError
from c2m3_fl.flower.incoming.records import (
    Entry,
    from_params,
    schema_of,
    schema_of_params,
    to_params,
)
from tests.flower.incoming.tensors import PARAMS


def test_state_dicts_survive_the_round_trip_bit_for_bit():
    back = to_params(from_params(PARAMS))
    assert list(back) == list(PARAMS)
    for name, value in PARAMS.items():
        assert back[name].dtype == value.dtype
        assert torch.equal(back[name], value)


def test_arrays_are_those_that_flower_itself_makes():
    assert {name: array.data for name, array in from_params(PARAMS).items()} == {
        name: array.data for name, array in ArrayRecord(dict(PARAMS)).items()
    }


def test_column_major_arrays_are_read_as_what_they_say():
    value = np.asfortranarray(np.arange(6, dtype=np.float32).reshape(2, 3))
    back = to_params(ArrayRecord({"a": Array(value)}))["a"]
    assert torch.equal(back, torch.arange(6.0).reshape(2, 3))
    assert back.is_contiguous()


def test_reading_does_not_share_memory_with_the_record():
    record = from_params({"a": torch.zeros(2)})
    to_params(record)["a"].fill_(1)
    assert torch.equal(to_params(record)["a"], torch.zeros(2))


def test_tensors_come_in_the_order_of_the_schema():
    record = from_params({"b": torch.ones(1), "a": torch.zeros(1)})
    assert list(to_params(record, {"a": Entry("float32", (1,)), "b": Entry("float32", (1,))})) == ["a", "b"]


def test_schema_of_a_state_dict_is_that_of_its_record():
    assert schema_of_params(PARAMS) == schema_of(from_params(PARAMS))


def npy(value: np.ndarray) -> bytes:
    return Array(value).data


ZEROS = np.zeros((2, 2), dtype=np.float32)
BAD = {
    "shape": (Array(np.zeros((3, 2), dtype=np.float32)), "has shape (3, 2), expected (2, 2)"),
    "broadcastable shape": (Array(np.zeros((1, 2), dtype=np.float32)), "has shape (1, 2)"),
    "dtype": (Array(ZEROS.astype(np.float64)), "has dtype float64, expected float32"),
    "serialisation": (Array("float32", (2, 2), "pickle", b""), "serialised as 'pickle'"),
    "no npy": (Array("float32", (2, 2), "numpy.ndarray", b"garbage"), "no readable .npy"),
    "empty": (Array("float32", (2, 2), "numpy.ndarray", b""), "no readable .npy"),
    "truncated": (Array("float32", (2, 2), "numpy.ndarray", npy(ZEROS)[:-1]), "holds 15 bytes"),
    "padded": (Array("float32", (2, 2), "numpy.ndarray", npy(ZEROS) + b"!"), "holds 17 bytes"),
    "header lies": (Array("float32", (2, 2), "numpy.ndarray", npy(np.zeros((9, 9)))), "holds float64 of shape (9, 9)"),
    "pickled objects": (
        Array("float32", (2, 2), "numpy.ndarray", npy(ZEROS).replace(b"'<f4'", b"'|O' ")),
        "holds object of shape (2, 2), and says that it is float32",
    ),
    "other byte order": (
        Array("float32", (2, 2), "numpy.ndarray", npy(ZEROS).replace(b"<f4", b">f4")),
        "holds >f4 of shape (2, 2)",
    ),
}


@pytest.mark.parametrize(("array", "message"), BAD.values(), ids=BAD.keys())
def test_arrays_that_are_not_what_was_asked_for_are_refused(array, message):
    with pytest.raises(ParamsError) as caught:
        to_params(ArrayRecord({"w": array}), {"w": Entry("float32", (2, 2))}, "reply")
    assert "'w'" in str(caught.value)
    assert message in str(caught.value)


def test_a_header_that_promises_terabytes_takes_no_memory():
    huge = npy(ZEROS).replace(b"(2, 2), }" + b" " * 12, b"(1000000000000, 2), }")
    assert b"1000000000000" in huge
    record = ArrayRecord({"w": Array("float32", (10**12, 2), "numpy.ndarray", huge)})
    with pytest.raises(ParamsError, match="holds 16 bytes of elements, expected 8000000000000"):
        to_params(record)


@pytest.mark.parametrize(
    ("given", "message"),
    [({"a": 1}, r"missing \['b'\]"), ({"a": 1, "b": 1, "c": 1}, r"unexpected \['c'\]"), ({}, "missing")],
)
def test_missing_and_extra_keys_are_named(given, message):
    schema = {name: Entry("float32", (1,)) for name in ("a", "b")}
    with pytest.raises(ParamsError, match=message):
        to_params(from_params({name: torch.zeros(1) for name in given}), schema)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.complex64])
def test_element_types_that_cannot_be_carried_are_refused_with_advice(dtype):
    with pytest.raises(ParamsError, match=r"'w' has dtype .*expected one of .*\.float\(\)"):
        from_params({"w": torch.zeros(2, dtype=dtype)})


def test_text_arrays_are_refused():
    with pytest.raises(ParamsError, match="has dtype <U1"):
        schema_of(ArrayRecord({"w": Array(np.array(["a"]))}))
