"""Headers of arrays: NumPy's own are read as NumPy reads them, and no bytes raise anything but the reply's fault."""

from __future__ import annotations

from io import BytesIO

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, MetricRecord, RecordDict
from flwr.common import FitRes, Parameters

from c2m3_fl.errors import ParamsError
from c2m3_fl.flower.incoming import records
from c2m3_fl.flower.incoming.npy import read_header
from c2m3_fl.flower.incoming.records import Entry, read_npy
from c2m3_fl.flower.incoming.replies import sort_messages
from c2m3_fl.flower.legacy_messages import sort_results
from tests.flower.federation import aggregate, answer, clients, good, reply, same, with_array
from tests.flower.legacy_federation import OK, Local, fit_result, legacy

VALUES = np.arange(6, dtype=np.float32).reshape(2, 3)
SCHEMA = {"w": Entry("float32", (2, 3), casts=True)}


def npy(value: np.ndarray, version: tuple[int, int] | None = None) -> bytes:
    stream = BytesIO()
    np.lib.format.write_array(stream, value, version=version)
    return stream.getvalue()


def headed(text: bytes, body: bytes = VALUES.tobytes()) -> bytes:
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + body


@pytest.mark.parametrize("version", [(1, 0), (2, 0), (3, 0)])
@pytest.mark.parametrize("dtype", ["f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "?"])
@pytest.mark.parametrize("shape", [(), (3,), (2, 3), (0, 3), (1, 2, 3, 4)])
def test_headers_that_numpy_writes_are_read_as_numpy_reads_them(version, dtype, shape):
    for order in ("C", "F"):
        value = np.asarray(np.random.default_rng(0).normal(size=shape), order=order).astype(dtype)
        data = npy(value, version)
        header = read_header(data)
        assert (header.dtype, header.shape) == (value.dtype.name, shape)
        assert torch.equal(read_npy("it", data), torch.from_numpy(np.load(BytesIO(data)).copy()))


def message(data: bytes):
    arrays = ArrayRecord({"w": Array("float32", (2, 3), "numpy.ndarray", data)})
    return answer(9, RecordDict({"arrays": arrays, "metrics": MetricRecord({"num-examples": 1})}))


def current(data: bytes):
    return sort_messages([message(data)], SCHEMA, weighted_by="num-examples")


def old(data: bytes):
    return sort_results([(Local(9, 1), FitRes(OK, Parameters([data], "numpy.ndarray"), 1, {}))], SCHEMA)


@pytest.mark.parametrize("sort", [current, old], ids=["current", "legacy"])
def test_any_flipped_bit_of_a_header_is_read_as_numpy_reads_it_or_is_the_reply_s_fault(sort):
    """All 1,024 of them; NumPy's parser raises TokenError for 106, and SyntaxError for one."""
    whole, usable = npy(VALUES), 0
    for place in range(8 * 128):
        data = bytearray(whole)
        data[place // 8] ^= 1 << place % 8
        found = sort(bytes(data))
        assert len(found.replies) + len(found.dropped) == 1
        for each in found.replies:
            usable += 1
            assert np.array_equal(np.load(BytesIO(bytes(data))), each.params["w"].numpy())
    assert usable < 10


HOSTILE = {
    "unfinished": b"{'descr': '<f4', 'shape': (2, 3), 'fortran_order': (\n",
    "nested": b"{'descr': " + b"(" * 9000 + b"\n",
    "indented": b"  x\n y\n",
    "a call": b"{'descr': '<f4', 'fortran_order': exit(), 'shape': (2, 3), }\n",
    "a number of many digits": b"{'descr': '<f4', 'fortran_order': False, 'shape': (" + b"9" * 9000 + b",), }\n",
    "negative": b"{'descr': '<f4', 'fortran_order': False, 'shape': (-2, -3), }\n",
    "no tuple": b"{'descr': '<f4', 'fortran_order': False, 'shape': (6), }\n",
    "leading zeros": b"{'descr': '<f4', 'fortran_order': False, 'shape': (02, 3), }\n",
    "many axes": b"{'descr': '<f4', 'fortran_order': False, 'shape': (" + b"1, " * 70 + b"), }\n",
    "a key twice": b"{'descr': '<f4', 'descr': '<f4', 'fortran_order': False, 'shape': (2, 3), }\n",
    "a key missing": b"{'descr': '<f4', 'shape': (2, 3), }\n",
    "another key": b"{'descr': '<f4', 'fortran_order': False, 'shape': (2, 3), 'x': 1, }\n",
    "fields": b"{'descr': [('a', '<f4')], 'fortran_order': False, 'shape': (2, 3), }\n",
    "objects": b"{'descr': '|O', 'fortran_order': False, 'shape': (2, 3), }\n",
    "empty": b"",
    "zeros": bytes(118),
    "beyond what NumPy reads": b"{'descr': '<f4', 'fortran_order': False, 'shape': (2, 3), }" + b" " * 10_000 + b"\n",
}


@pytest.mark.parametrize("sort", [current, old], ids=["current", "legacy"])
@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE.keys())
def test_hostile_headers_are_the_reply_s_fault(text, sort):
    found = sort(headed(text))
    assert not found.replies
    assert len(found.dropped) == 1


@pytest.mark.parametrize(
    "text",
    [
        b"{'shape': (2, 3), 'fortran_order': False, 'descr': '<f4'}\n",
        b'{"descr":"<f4","fortran_order":False,"shape":(2,3)}   \n',
    ],
)
def test_headers_of_other_writers_are_read(text):
    (found,) = current(headed(text)).replies
    assert np.array_equal(found.params["w"].numpy(), VALUES)


@pytest.mark.parametrize("error", [MemoryError("no more"), RecursionError("too deep"), KeyError("w"), OverflowError()])
def test_whatever_reading_a_reply_raises_is_its_fault(error, monkeypatch, caplog):
    read = records.read_npy

    def failing(who, data, entry=None, **options):
        if data == marked:
            raise error
        return read(who, data, entry, **options)

    expected, _ = aggregate(good())
    bad = {name: value + 1 for name, value in clients(4)[3].items()}
    marked = npy(bad["2.bias"].numpy())
    monkeypatch.setattr(records, "read_npy", failing)
    arrays, metrics = aggregate([*good(), reply(9, bad)])
    assert same(arrays, expected)
    assert metrics["c2m3-dropped"] == 1
    assert any(f"cannot be read: {type(error).__name__}" in text for text in caplog.messages)


def broken_header() -> bytes:
    data = bytearray(npy(clients(4)[3]["2.bias"].numpy()))
    data[data.index(b")")] ^= 1  # a bracket that is never closed: NumPy's parser raises TokenError
    return bytes(data)


def test_a_broken_header_costs_one_reply_of_a_round():
    expected, _ = aggregate(good())
    bad = with_array(reply(9, clients(4)[3]), "2.bias", Array("float32", (32,), "numpy.ndarray", broken_header()))
    arrays, metrics = aggregate([*good(), bad])
    assert same(arrays, expected)
    assert metrics["c2m3-dropped"] == 1


def test_a_broken_header_costs_one_result_of_a_legacy_round():
    fine = [fit_result(node, params) for node, params in enumerate(clients(3))]
    expected, _ = legacy().aggregate_fit(1, fine, [])
    bad = fit_result(9, clients(4)[3])
    bad[1].parameters.tensors[3] = broken_header()
    parameters, metrics = legacy().aggregate_fit(1, [*fine, bad], [])
    assert parameters.tensors == expected.tensors
    assert metrics["c2m3-dropped"] == 1


def test_a_legacy_server_names_a_broken_model_that_it_is_given():
    bad = fit_result(9, clients(4)[3])[1].parameters
    bad.tensors[3] = broken_header()
    with pytest.raises(ParamsError, match=r"the parameters to send out: '2\.bias' holds no readable \.npy"):
        legacy().configure_fit(1, bad, None)
