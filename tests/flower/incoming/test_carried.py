"""State dicts in the bytes of arrays: the same tensors, made when they are asked for, and nothing kept of them."""

from __future__ import annotations

import gc

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord

from c2m3_fl.flower.incoming import carried as module
from c2m3_fl.flower.incoming.carried import Carried, carried, to_average
from c2m3_fl.flower.incoming.records import Entry, from_params, schema_of, to_params
from tests.flower.incoming.tensors import PARAMS


def replied(params=PARAMS):
    record = from_params(params)
    return Carried(schema_of(record), to_params(record), dict(record)), record


def lies_in(value, array):
    start = np.frombuffer(array.data, dtype=np.uint8).ctypes.data
    return start < value.data_ptr() < start + len(array.data)


def test_the_tensors_are_those_that_were_read():
    reply, _ = replied()
    assert list(reply) == list(PARAMS)
    assert len(reply) == len(PARAMS)
    for name, value in PARAMS.items():
        assert reply[name].dtype == value.dtype
        assert reply[name].is_contiguous()
        assert torch.equal(reply[name], value)
    with pytest.raises(KeyError):
        reply["absent"]


def test_a_tensor_lies_in_the_bytes_and_is_the_very_same_while_it_is_in_use():
    reply, record = replied()
    for name in ("half", "single", "double", "counter", "bytes", "scalar"):
        value = reply[name]
        assert lies_in(value, record[name])
        assert value._base is None  # or torch would keep both
        assert reply[name] is value
    assert reply["mask"] is reply["mask"]


def test_tensors_that_nobody_uses_are_not_kept():
    reply, record = replied()
    place = id(record["single"].data)
    value = reply["single"]
    assert module._TENSORS[place] is value
    del value
    gc.collect()
    assert place not in module._TENSORS


def test_the_tensors_stay_what_they_are_when_an_array_is_changed():
    reply, record = replied()
    record["single"].data = record["double"].data
    record["double"] = record["half"]
    assert torch.equal(reply["single"], PARAMS["single"])
    assert torch.equal(reply["double"], PARAMS["double"])


def test_the_arrays_to_average_are_those_that_came_and_integers_as_floats():
    reply, record = replied()
    average, expected = reply.record, to_average(to_params(record), dict(record))
    assert list(average) == list(expected)
    for name, array in average.items():
        assert (array.dtype, array.shape, array.stype) == (
            expected[name].dtype,
            expected[name].shape,
            expected[name].stype,
        )
        assert array.data == expected[name].data == Array(np.asarray(average[name].numpy())).data
        assert array.dtype == (record[name].dtype if PARAMS[name].is_floating_point() else "float64")
    assert average["single"].data is record["single"].data
    average.clear()
    assert list(reply.record) == list(PARAMS)


def test_a_strategy_that_changes_its_arrays_changes_no_others():
    """A round with a guard aggregates twice, and one that failed once more."""
    reply, record = replied()
    kept = {name: array.data for name, array in record.items()}
    for give in (lambda: reply.record, lambda: to_average(reply, dict(record))):
        for array in give().values():
            array.data = Array(np.asarray(array.numpy() / 2)).data
        assert {name: array.data for name, array in record.items()} == kept
        again = to_params(give())
        assert all(torch.equal(again[name].to(value.dtype), value) for name, value in PARAMS.items())


def test_an_array_of_another_precision_is_averaged_as_it_came():
    record = ArrayRecord({"a": Array(np.array([1.0, 1 / 3]))})
    schema = {"a": Entry("float32", (2,), also="float64")}
    reply = Carried(schema, to_params(record, schema), dict(record))
    assert reply["a"].dtype == torch.float32
    assert reply.record["a"].data is record["a"].data
    assert Carried(schema, to_params(record, schema), {}).record["a"].dtype == "float32"


def test_a_column_major_array_is_averaged_as_it_came():
    record = ArrayRecord({"a": Array(np.asfortranarray(np.arange(6, dtype=np.float32).reshape(2, 3)))})
    reply = Carried(schema_of(record), to_params(record), dict(record))
    assert torch.equal(reply["a"], torch.arange(6.0).reshape(2, 3))
    assert reply.record["a"].data is record["a"].data


def test_moved_tensors_lie_in_the_arrays_that_are_averaged():
    reply, record = replied()
    moved = carried({**reply, "single": reply["single"].flip(0)}, reply)
    assert torch.equal(moved["single"], PARAMS["single"].flip(0))
    assert lies_in(moved["single"], moved.record["single"])
    for name, value in to_params(moved.record).items():
        assert torch.equal(value.to(moved[name].dtype), moved[name])
    double = moved["double"]
    assert double is reply["double"]
    assert moved.record["double"].data is record["double"].data
    assert carried(reply, reply) is reply
    assert carried(PARAMS, PARAMS) is PARAMS
