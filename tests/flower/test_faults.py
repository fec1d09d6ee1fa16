"""Whatever comes back, the round goes on: every fault is injected, dropped or survived, counted and logged."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import chain, repeat

import numpy as np
import pytest
import torch
from flwr.app import Array, ConfigRecord, Error, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.common.constant import ErrorCode
from flwr.serverapp.strategy import FedAvg

from c2m3_fl.flower.incoming.records import from_params, to_params
from c2m3_fl.flower.serial_grid import SerialGrid
from c2m3_fl.flower.strategy import C2M3
from tests.flower.federation import (
    EXAMPLE,
    aggregate,
    answer,
    clients,
    digits,
    digits_app,
    good,
    mlp,
    reply,
    same,
    with_array,
)

WEIGHT = "2.weight"  # 32 x 32
BIAS = "2.bias"
BAD_NODE = 9


def model_params() -> dict[str, torch.Tensor]:
    return clients(4)[3]


def poisoned(name: str, value: float) -> Message:
    params = model_params()
    params[name] = params[name].clone()
    params[name].view(-1)[5] = value
    return reply(BAD_NODE, params)


def without(name: str) -> Message:
    params = model_params()
    del params[name]
    return reply(BAD_NODE, params)


def renamed() -> Message:
    params = {("hidden.weight" if name == WEIGHT else name): value for name, value in model_params().items()}
    return reply(BAD_NODE, params)


def replaced(name: str, array: Array) -> Message:
    return with_array(reply(BAD_NODE, model_params()), name, array)


def of(shape: tuple[int, ...], dtype: str = "float32") -> Array:
    return Array(np.zeros(shape, dtype=dtype))


def weighted(value: float | list[float] | None) -> Message:
    return reply(BAD_NODE, model_params(), examples=value)


def with_records(**records: MetricRecord | ConfigRecord) -> Message:
    content = {"arrays": from_params(model_params()), "metrics": MetricRecord({"num-examples": 10}), **records}
    return answer(BAD_NODE, RecordDict({key: value for key, value in content.items() if value is not None}))


def two_arrays() -> Message:
    message = reply(BAD_NODE, model_params())
    message.content["more"] = from_params({"x": torch.zeros(1)})
    return message


FAULTS: dict[str, tuple[Callable[[], Message], str]] = {
    "NaN in one tensor": (lambda: poisoned(WEIGHT, math.nan), "'2.weight' has 1 values that are NaN or infinite"),
    "infinity in one tensor": (lambda: poisoned(BIAS, -math.inf), "'2.bias' has 1 values that are NaN or infinite"),
    "missing array": (lambda: without(WEIGHT), "missing ['2.weight']"),
    "extra array": (lambda: replaced("extra", of((1,))), "unexpected ['extra']"),
    "renamed array": (renamed, "missing ['2.weight'], unexpected ['hidden.weight']"),
    "transposed shape": (lambda: replaced("0.weight", of((64, 32))), "has shape (64, 32), expected (32, 64)"),
    "broadcastable shape": (lambda: replaced(BIAS, of((1,))), "has shape (1,), expected (32,)"),
    "empty array": (lambda: replaced(BIAS, of((0,))), "has shape (0,), expected (32,)"),
    "ten times too many elements": (lambda: replaced(BIAS, of((320,))), "has shape (320,), expected (32,)"),
    "integers for floats": (lambda: replaced(BIAS, of((32,), "int64")), "has dtype int64, expected float32"),
    "the other byte order": (lambda: replaced(BIAS, Array(np.zeros(32, dtype=">f4"))), "has dtype >f4"),
    "complex numbers": (lambda: replaced(BIAS, of((32,), "complex64")), "has dtype complex64"),
    "text": (lambda: replaced(BIAS, Array(np.array(["w"] * 32))), "has dtype <U1"),
    "an element type that nobody knows": (
        lambda: replaced(BIAS, Array("float8_e4m3fn", (32,), "numpy.ndarray", b"")),
        "has dtype float8_e4m3fn",
    ),
    "another serialisation": (lambda: replaced(BIAS, Array("float32", (32,), "pickle", b"cos\nsystem\n")), "'pickle'"),
    "bytes that are no array": (
        lambda: replaced(BIAS, Array("float32", (32,), "numpy.ndarray", b"zeros")),
        "holds no readable .npy bytes",
    ),
    "a truncated array": (
        lambda: replaced(BIAS, Array("float32", (32,), "numpy.ndarray", of((32,)).data[:-3])),
        "holds 125 bytes of elements, expected 128",
    ),
    "a header that lies": (
        lambda: replaced(BIAS, Array("float32", (32,), "numpy.ndarray", of((10**6,)).data)),
        "holds float32 of shape (1000000,)",
    ),
    "no arrays": (
        lambda: answer(BAD_NODE, RecordDict({"metrics": MetricRecord({"num-examples": 1})})),
        "0 ArrayRecords",
    ),
    "two array records": (two_arrays, "2 ArrayRecords"),
    "no metrics": (lambda: with_records(metrics=None), "0 MetricRecords"),
    "two metric records": (lambda: with_records(more=MetricRecord({"num-examples": 1})), "2 MetricRecords"),
    "empty reply": (lambda: answer(BAD_NODE, RecordDict()), "0 ArrayRecords"),
    "weight missing": (lambda: weighted(None), "weight 'num-examples' is missing"),
    "weight zero": (lambda: weighted(0), "weight 'num-examples' is 0, expected a positive finite number"),
    "weight negative": (lambda: weighted(-5), "weight 'num-examples' is -5"),
    "weight NaN": (lambda: weighted(math.nan), "weight 'num-examples' is nan"),
    "weight infinite": (lambda: weighted(math.inf), "weight 'num-examples' is inf"),
    "weight beyond all floats": (lambda: weighted(10**400), "expected a positive finite number"),
    "weight a list": (lambda: weighted([1.0, 2.0]), "weight 'num-examples' is [1.0, 2.0], expected one"),
    "metrics unlike the others'": (
        lambda: reply(BAD_NODE, model_params(), metrics={"surprise": 1.0}),
        "its record names or metric types differ from the majority's",
    ),
    "a client that raised": (
        lambda: answer(BAD_NODE, Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, "Traceback …\nValueError: no data")),
        "the client failed: ValueError: no data",
    ),
    "a node that was killed": (
        lambda: answer(BAD_NODE, Error(ErrorCode.NODE_UNAVAILABLE, "Node Unavailable")),
        "the client failed: Node Unavailable",
    ),
    "an error without a reason": (
        lambda: answer(BAD_NODE, Error(ErrorCode.UNKNOWN)),
        "the client failed: no reason given",
    ),
}


@pytest.mark.parametrize(("make", "reason"), FAULTS.values(), ids=FAULTS.keys())
def test_a_bad_reply_is_dropped_counted_and_logged_and_changes_nothing(make, reason, caplog):
    expected, _ = aggregate(good())
    arrays, metrics = aggregate([*good(), make()])
    assert same(arrays, expected)
    assert (metrics["c2m3-replies"], metrics["c2m3-dropped"]) == (3, 1)
    (line,) = [text for text in caplog.messages if "dropped the reply" in text]
    assert f"node {BAD_NODE}" in line
    assert reason in line


ALONE = {name: fault for name, fault in FAULTS.items() if name != "metrics unlike the others'"}  # alone, it is usual


@pytest.mark.parametrize(("make", "reason"), ALONE.values(), ids=ALONE.keys())
def test_when_every_reply_is_bad_the_previous_model_stays(make, reason, caplog):
    sent = mlp(3).state_dict()
    arrays, metrics = aggregate([make()], sent=sent)
    assert same(arrays, from_params(sent))
    assert metrics["c2m3-kept-previous"] == 1
    assert any(reason in text for text in caplog.messages)
    assert any("the previous global model stays" in text for text in caplog.messages)


def test_no_replies_leave_the_previous_model():
    sent = mlp(3).state_dict()
    arrays, metrics = aggregate([], sent=sent)
    assert same(arrays, from_params(sent))
    assert (metrics["c2m3-replies"], metrics["c2m3-kept-previous"]) == (0, 1)


def test_below_the_stated_minimum_the_previous_model_stays():
    strategy = C2M3(model=mlp(), example_inputs=EXAMPLE, min_replies=3)
    arrays, metrics = aggregate(good(2), strategy)
    assert same(arrays, from_params(mlp().state_dict()))
    assert metrics["c2m3-kept-previous"] == 1


def test_a_single_reply_is_aggregated():
    (params,) = clients(1)
    arrays, metrics = aggregate([reply(0, params)], sent=params)
    assert same(arrays, from_params(params))
    assert metrics["c2m3-kept-previous"] == 0


def test_replies_too_large_to_compute_with_leave_the_previous_model(caplog):
    """Every number is finite, no product is: in the next round they may be smaller."""
    huge = [{name: 1e37 * value for name, value in params.items()} for params in clients(3)]
    arrays, metrics = aggregate([reply(node, params) for node, params in enumerate(huge)])
    assert same(arrays, from_params(mlp().state_dict()))
    assert metrics["c2m3-kept-previous"] == 1
    assert any("too large to compute with" in text for text in caplog.messages)


@pytest.mark.parametrize("outliers", ["report", "drop"])
@pytest.mark.parametrize("factor", [1e20, 1e37])
def test_one_reply_too_large_to_compute_with_is_left_out_and_moves_nobody(factor, outliers):
    expected, _ = aggregate(good())
    huge = reply(BAD_NODE, {name: factor * value for name, value in model_params().items()})
    strategy = C2M3(model=mlp(), example_inputs=EXAMPLE, outliers=outliers)
    arrays, metrics = aggregate([*good(), huge], strategy)
    assert same(arrays, expected)
    assert metrics["c2m3-dropped"] == 1


def test_a_second_reply_to_the_same_message_is_dropped(caplog):
    expected, _ = aggregate(good())
    arrays, metrics = aggregate([*good(), good()[1]])
    assert same(arrays, expected)
    assert metrics["c2m3-dropped"] == 1
    assert any("a second reply to the same message" in text for text in caplog.messages)


@pytest.mark.parametrize("factor", [10.0, 1e6], ids=["tenfold", "enormous"])
def test_a_reply_that_fits_nobody_is_named_and_left_out_if_asked(factor, caplog):
    odd = reply(BAD_NODE, {name: factor * value for name, value in clients(6)[5].items()})
    honest = [reply(node, params) for node, params in enumerate(clients(6)[:5])]
    _, metrics = aggregate([*honest, odd])
    flags = dict(zip(metrics["c2m3-nodes"], metrics["c2m3-node-outlier"], strict=True))
    assert flags == {BAD_NODE: 1, **dict.fromkeys(range(5), 0)}
    assert any(f"node {BAD_NODE} does not fit the others" in text for text in caplog.messages)
    dropping = C2M3(model=mlp(), example_inputs=EXAMPLE, outliers="drop")
    arrays, metrics = aggregate([*honest, odd], dropping)
    assert metrics["c2m3-dropped"] == 1
    norm = torch.cat([value.flatten() for value in to_params(arrays).values()]).norm()
    assert norm < 1.5 * torch.cat([value.flatten() for value in clients(1)[0].values()]).norm()


def test_the_minimum_of_replies_holds_after_outliers_are_dropped():
    *honest, odd = clients(6)
    replies = [reply(node, params) for node, params in enumerate(honest)]
    replies.append(reply(BAD_NODE, {name: 10 * value for name, value in odd.items()}))
    for least, kept in ((5, 0), (6, 1)):
        strategy = C2M3(model=mlp(), example_inputs=EXAMPLE, outliers="drop", min_replies=least)
        arrays, metrics = aggregate(replies, strategy)
        assert (metrics["c2m3-kept-previous"], metrics["c2m3-dropped"]) == (kept, 1)
        assert same(arrays, from_params(mlp().state_dict())) == bool(kept)


@pytest.mark.parametrize("value", [0.0, 0.1], ids=["dead", "constant"])
@pytest.mark.parametrize("everybody", [False, True], ids=["one of four", "everybody"])
def test_dead_and_constant_networks_do_no_harm(value, everybody):
    params = {name: torch.full_like(tensor, value) for name, tensor in mlp().state_dict().items()}
    flat = [reply(BAD_NODE + k, params) for k in range(4 if everybody else 1)]
    strategy = C2M3(model=mlp(), calibration=[digits()[0][:50]])
    arrays, metrics = aggregate(flat if everybody else [*good(), *flat], strategy)
    assert metrics["c2m3-kept-previous"] == 0
    assert all(torch.isfinite(tensor).all() for tensor in to_params(arrays).values())


def run_with(transit, rounds=2):
    strategy = C2M3(FedAvg(fraction_evaluate=0.0), model=mlp(), example_inputs=EXAMPLE)
    grid = SerialGrid(digits_app(independent=True, epochs=1), 4, transit=transit)
    return strategy.start(grid, from_params(mlp().state_dict()), num_rounds=rounds)


def test_a_node_that_times_out_is_missing_and_the_others_go_on():
    result = run_with(lambda replies: replies[1:])
    assert [metrics["c2m3-replies"] for metrics in result.train_metrics_clientapp.values()] == [3, 3]


def test_a_round_without_any_reply_keeps_the_last_model_and_the_run_goes_on():
    arriving = chain([9], repeat(0))
    result = run_with(lambda replies: replies[: next(arriving)])
    assert [metrics["c2m3-kept-previous"] for metrics in result.train_metrics_clientapp.values()] == [0, 1]


def test_a_run_in_which_nothing_was_aggregated_ends_with_the_initial_model():
    result = run_with(lambda replies: [])
    assert same(result.arrays, from_params(mlp().state_dict()))


def test_clients_that_raise_are_dropped_with_their_own_words(caplog):
    app = ClientApp()

    @app.train()
    def fit(message, context):
        if context.node_config["partition-id"] == 0:
            raise RuntimeError("my disk is full")
        return digits_app(epochs=1)(message, context)

    strategy = C2M3(FedAvg(fraction_evaluate=0.0), model=mlp(), example_inputs=EXAMPLE)
    result = strategy.start(SerialGrid(app, 3), from_params(mlp().state_dict()), num_rounds=1)
    assert result.train_metrics_clientapp[1]["c2m3-dropped"] == 1
    assert any("RuntimeError: my disk is full" in text for text in caplog.messages)
