"""What is computed while clients train changes nothing but when it is computed."""

from __future__ import annotations

from logging import DEBUG
from sys import getrefcount

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, Error, MetricRecord, RecordDict
from flwr.serverapp.strategy import FedAdam, FedAvg, FedMedian, Krum

from c2m3_fl.core import drift
from c2m3_fl.flower import rounds
from c2m3_fl.flower.aligning import aligner
from c2m3_fl.flower.arriving import ahead, listening
from c2m3_fl.flower.incoming import replies as reading
from c2m3_fl.flower.strategy import C2M3
from tests.flower.arriving.test_listening import Trickling
from tests.flower.federation import (
    EXAMPLE,
    answer,
    clients,
    digits_app,
    mlp,
    normed,
    patient,
    reply,
    same,
    send,
    shuffled,
    with_array,
)


def c2m3(inside=None, make=mlp, **options):
    return C2M3(inside or FedAvg(), model=make(), example_inputs=EXAMPLE, diagnostics=True, memory=10, **options)


def deaf(monkeypatch):
    """Nothing is heard of before all has arrived, and nothing is known of the model that was sent."""
    monkeypatch.setattr(listening.Listening, "_tell", lambda self, message: None)
    monkeypatch.setattr(ahead.Ahead, "seen", lambda self, replies, weights: None)


def run(inside, make=mlp, **options):
    grid = Trickling(digits_app(make, epochs=1, rate=0.02), 4)
    strategy = c2m3(inside, make, **options)
    return strategy.start(grid, ArrayRecord(make().state_dict()), num_rounds=2)


def numbers(metrics: MetricRecord) -> dict[str, object]:
    return {name: value for name, value in metrics.items() if "seconds" not in name}


def alike(ours: MetricRecord, theirs: MetricRecord) -> None:
    """Equal numbers up to the rounding of sums that are taken in another way."""
    assert numbers(ours).keys() == numbers(theirs).keys()
    for name, value in numbers(ours).items():
        if isinstance(value, str):
            assert theirs[name] == value
        else:
            assert theirs[name] == pytest.approx(value, rel=1e-5, abs=1e-6), name


@pytest.mark.parametrize(
    ("inside", "make", "options"),
    [
        (FedAvg, mlp, {}),
        (FedAvg, normed, {}),
        (FedAvg, mlp, {"alignment": "separate"}),
        (FedAvg, mlp, {"basis": "largest"}),
        (FedAvg, mlp, {"outliers": "drop", "min_replies": 2}),
        (lambda: FedAdam(eta=0.01), mlp, {}),
        (FedMedian, normed, {}),
        (lambda: Krum(num_malicious_nodes=1), mlp, {}),
    ],
    ids=["mean", "mean-normed", "separate", "largest", "drop", "adam", "median-normed", "krum"],
)
def test_a_run_ends_with_the_same_model_bit_for_bit(inside, make, options, monkeypatch):
    ours = run(inside(), make, **options)
    with monkeypatch.context() as patch:
        deaf(patch)
        theirs = run(inside(), make, **options)
    assert same(ours.arrays, theirs.arrays)
    for current, metrics in theirs.train_metrics_clientapp.items():
        alike(ours.train_metrics_clientapp[current], metrics)


def near(count=3, scale=0.002, seed=0):
    """The model that was sent, and replies that drifted from it a little."""
    sent = {name: value.detach() for name, value in mlp().state_dict().items()}
    generator = torch.Generator().manual_seed(seed)
    return sent, [
        {name: value + scale * torch.randn(value.shape, generator=generator) for name, value in sent.items()}
        for _ in range(count)
    ]


def arrive(strategy, sent, messages):
    """One round in which the messages arrive one by one."""
    send(strategy, sent, nodes=max(2, len(messages)))
    for message in messages:
        strategy.server.ahead.hear(message, strategy._expected, "num-examples")
    return strategy.aggregate_train(1, messages)


def refuse(*args: object, **kwargs: object) -> None:
    raise AssertionError("this is not needed")


def test_replies_are_decoded_once_and_nothing_is_searched_where_all_are_near(monkeypatch):
    sent, drifted = near()
    messages = [reply(node, params) for node, params in enumerate(drifted)]
    strategy, read = patient(), []
    monkeypatch.setattr(ahead, "decoded", lambda *args: read.append(1) or reading.decoded(*args))
    for name in ("match", "consensus", "weighted_mean", "into_basis", "bounded_weights"):
        monkeypatch.setattr(aligner, name, refuse)
    monkeypatch.setattr(rounds, "find_outliers", refuse)
    _, metrics = arrive(strategy, sent, messages)
    assert metrics["c2m3-kept-previous"] == 0
    assert metrics["c2m3-share-moved"] == 0
    assert metrics["c2m3-replies"] == 3
    assert len(read) == 3


@pytest.mark.parametrize("most", [100, 4])
def test_the_order_in_which_replies_arrive_changes_no_number(most, monkeypatch):
    monkeypatch.setattr(drift, "MOST", most)
    sent, drifted = near(6)
    messages = [reply(node, params, examples=node + 1) for node, params in enumerate(drifted)]
    arrays, metrics = arrive(patient(), sent, messages)
    for order in ([5, 4, 3, 2, 1, 0], [2, 0, 5, 1, 4, 3]):
        again, others = arrive(patient(), sent, [messages[place] for place in order])
        assert same(arrays, again)
        assert numbers(metrics) == numbers(others)


def test_a_reply_that_is_changed_after_it_arrived_counts_as_it_is_then():
    """As wrappers that clip updates do, in place, before they hand replies on."""
    sent, drifted = near()
    strategy, messages = patient(), [reply(node, params) for node, params in enumerate(drifted)]
    send(strategy, sent)
    for message in messages:
        strategy.server.ahead.hear(message, strategy._expected, "num-examples")
    strategy.server.ahead.finished()
    zeros = Array(np.zeros(10, dtype=np.float32))
    for message in messages:
        with_array(message, "4.bias", zeros)
    messages[1].content["metrics"]["num-examples"] = 1000
    arrays, _ = strategy.aggregate_train(1, messages)
    send(strategy, sent)
    strategy.server.ahead = None
    expected, _ = strategy.aggregate_train(1, messages)
    assert not arrays["4.bias"].numpy().any()
    assert same(arrays, expected)


def test_the_bytes_of_what_was_read_are_kept_or_others_could_come_to_lie_there():
    """Records are told apart by where their bytes are; in half precision no tensor lies in the bytes that came."""
    sent, drifted = near(1)
    strategy, message = patient(), reply(1, {name: value.half() for name, value in drifted[0].items()})
    send(strategy, sent)
    arrays = [array.data for array in message.content["arrays"].values()]
    before = list(map(getrefcount, arrays))
    strategy.server.ahead.hear(message, strategy._expected, "num-examples")
    assert strategy.server.ahead.finished()._decoded
    assert all(now > count for now, count in zip(map(getrefcount, arrays), before, strict=True))


def test_what_was_read_of_a_reply_is_not_of_arrays_that_were_put_there_meanwhile(monkeypatch):
    sent, (before, after, _) = near()
    strategy, message = patient(), reply(1, before)
    send(strategy, sent)
    arrays = message.content["arrays"]
    kept = [array.data for array in arrays.values()]

    def late(record, schema):
        for array, other in zip(arrays.values(), reply(1, after).content["arrays"].values(), strict=True):
            array.data = other.data
        return reading.decoded(record, schema)

    with monkeypatch.context() as patch:
        patch.setattr(ahead, "decoded", late)
        strategy.server.ahead.hear(message, strategy._expected, "num-examples")
        strategy.server.ahead.finished()
    for array, data in zip(arrays.values(), kept, strict=True):
        array.data = data
    found = strategy.server.ahead.decoded(arrays, strategy._expected)
    assert all(torch.equal(found.params[name], value) for name, value in before.items())


def faulty(kind, sent, drifted):
    """A bad reply of node 9."""
    bad = {name: value.clone() for name, value in drifted[0].items()}
    if kind == "failed":
        return answer(9, Error(0, "no memory"))
    if kind == "empty":
        return answer(9, RecordDict())
    if kind == "no metrics":
        return answer(9, RecordDict({"arrays": reply(9, bad).content["arrays"]}))
    if kind == "no weight":
        return reply(9, bad, examples=None)
    if kind == "negative weight":
        return reply(9, bad, examples=-3)
    if kind == "NaN":
        bad["0.weight"].view(-1)[7] = torch.nan
        return reply(9, bad)
    if kind == "huge":
        bad["0.weight"] *= 1e25
        return reply(9, bad)
    if kind == "shape":
        bad["0.weight"] = bad["0.weight"].T.contiguous()
        return reply(9, bad)
    if kind == "garbage":
        return with_array(reply(9, bad), "0.weight", Array("float32", (32, 64), "numpy.ndarray", b"\x93NUMPY garbage"))
    if kind == "other start":
        return reply(9, clients(1)[0])
    if kind == "other order":
        return reply(9, shuffled(patient().setup.spec, bad, 3))
    if kind == "twin":
        return reply(0, drifted[0])
    return reply(9, sent)  # idle


KINDS = (
    "failed",
    "empty",
    "no metrics",
    "no weight",
    "negative weight",
    "NaN",
    "huge",
    "shape",
    "garbage",
    "other start",
    "other order",
    "twin",
    "idle",
)


@pytest.mark.parametrize("kind", KINDS)
def test_a_faulty_reply_has_the_same_consequences_whenever_it_is_read(kind, monkeypatch, caplog):
    sent, drifted = near(4)
    for place in (0, 4):
        messages = [reply(node, params, examples=5 + node) for node, params in enumerate(drifted)]
        messages.insert(place, faulty(kind, sent, drifted))
        caplog.clear()
        arrays, metrics = arrive(patient(), sent, messages)
        said = [text for text in caplog.messages if "dropped" in text]
        with monkeypatch.context() as patch:
            deaf(patch)
            caplog.clear()
            expected, others = arrive(patient(), sent, messages)
            assert said == [text for text in caplog.messages if "dropped" in text]
        assert same(arrays, expected)
        alike(metrics, others)


@pytest.mark.parametrize("method", ["add", "multiply", "still", "products", "agreement", "__init__"])
def test_a_failure_of_what_is_computed_ahead_changes_nothing(method, monkeypatch, caplog):
    sent, drifted = near()
    messages = [reply(node, params) for node, params in enumerate(drifted)]
    expected, _ = arrive(patient(), sent, messages)

    def broken(*args: object, **kwargs: object) -> None:
        raise MemoryError("no room")

    monkeypatch.setattr(drift.Drifts, method, broken)
    caplog.set_level(DEBUG, logger="flwr")
    arrays, metrics = arrive(patient(), sent, messages)
    assert metrics["c2m3-kept-previous"] == 0
    assert same(arrays, expected)
    assert any("no room" in text for text in caplog.messages)


def test_nodes_that_were_found_elsewhere_are_located_as_ever():
    """A client in another order replies near to what it was sent, which is not near to the model."""
    strategy = c2m3(basis="client")
    sent, drifted = near()
    spec = strategy.setup.spec
    moved = [shuffled(spec, params, seed) for seed, params in enumerate(drifted)]
    _, first = arrive(strategy, sent, [reply(node, params) for node, params in enumerate(moved)])
    assert first["c2m3-share-moved"] > 0.5
    _, second = arrive(strategy, sent, [reply(node, params) for node, params in enumerate(moved)])
    assert second["c2m3-node-moved"] == first["c2m3-node-moved"]
    _, third = arrive(strategy, sent, [reply(node, params) for node, params in enumerate(drifted)])
    assert third["c2m3-share-moved"] == 0
    assert not any(map(strategy.setup.aligner.memory.recall, range(3)))


def test_nothing_of_a_round_is_kept_after_it():
    sent, drifted = near()
    strategy = c2m3()
    arrive(strategy, sent, [reply(node, params) for node, params in enumerate(drifted)])
    assert strategy.server.ahead is None
    assert strategy._listening is None


def test_nothing_is_kept_of_a_run_that_was_interrupted_and_its_grid_is_left_as_it_was():
    class Interrupted(Trickling):
        def send_and_receive(self, messages, *, timeout=None):
            raise KeyboardInterrupt

    grid, strategy = Interrupted(digits_app(mlp, epochs=1, rate=0.02), 3), c2m3()
    attributes = vars(grid).keys()
    with pytest.raises(KeyboardInterrupt):
        strategy.start(grid, ArrayRecord(mlp().state_dict()), num_rounds=2)
    assert vars(grid).keys() == attributes
    assert strategy.server.ahead is strategy._listening is None


def test_a_reply_that_is_heard_twice_is_read_once():
    sent, drifted = near()
    strategy = c2m3()
    send(strategy, sent)
    for message in [reply(node, params) for node, params in enumerate(drifted)]:
        strategy.server.ahead.hear(message, strategy._expected, "num-examples")
        strategy.server.ahead.hear(message, strategy._expected, "num-examples")
    assert len(strategy.server.ahead.finished()._drifts.result()._nodes) == len(drifted)


def test_the_tensors_of_replies_lie_in_their_bytes_and_nothing_writes_there():
    sent, drifted = near()
    messages = [reply(node, params) for node, params in enumerate(drifted)]
    before = [[bytes(bytearray(array.data)) for array in message.content["arrays"].values()] for message in messages]
    for strategy in (c2m3(), c2m3(alignment="separate"), c2m3(FedMedian())):
        arrive(strategy, sent, [reply(5, shuffled(strategy.setup.spec, drifted[0], 1)), *messages])
    after = [[array.data for array in message.content["arrays"].values()] for message in messages]
    assert before == after
    found = reading.decoded(messages[0].content["arrays"], strategy._expected)
    address = found.params["0.weight"].data_ptr()
    start = np.frombuffer(messages[0].content["arrays"]["0.weight"].data, dtype=np.uint8).ctypes.data
    assert start < address < start + len(messages[0].content["arrays"]["0.weight"].data)
