"""What fails on the server itself costs what it must and no more: calibration data, memory, the model itself."""

from __future__ import annotations

import math
import re

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from c2m3_fl.errors import CalibrationError, ParamsError
from c2m3_fl.flower.aligning import aligner
from c2m3_fl.flower.aligning.out_of_memory import with_cpu_fallback
from c2m3_fl.flower.incoming.records import to_params
from c2m3_fl.flower.strategy import C2M3
from tests.flower.federation import (
    EXAMPLE,
    aggregate,
    digits,
    good,
    mlp,
    normed,
    reply,
    same,
    send,
    train,
)


class Breaking:
    """A loader that works while the strategy is built, and then no more."""

    def __init__(self) -> None:
        self.broken = False

    def __iter__(self):
        if self.broken:
            raise OSError("disk gone")
        return iter([digits()[0][:50]])


def test_a_calibration_loader_that_raises_is_refused_at_once():
    loader = Breaking()
    loader.broken = True
    with pytest.raises(CalibrationError, match="disk gone"):
        C2M3(model=mlp(), calibration=loader)


def test_a_loader_is_read_in_the_constructor_alone():
    loader = Breaking()
    strategy = C2M3(model=mlp(), calibration=loader)
    loader.broken = True
    arrays, metrics = aggregate(good(), strategy)
    assert metrics["c2m3-repaired"] == 1
    assert not same(arrays, aggregate(good())[0])


def test_an_iterator_serves_all_rounds_because_it_is_read_once():
    data = digits()[0][:50]
    found = [aggregate(good(), C2M3(model=mlp(), calibration=given))[0] for given in ([data], iter([data]))]
    assert same(*found)


def test_repair_does_not_look_at_labels():
    data, labels = digits()
    bare = aggregate(good(), C2M3(model=mlp(), calibration=[data[:50]], recalibrate="repair"))[0]
    labelled = aggregate(good(), C2M3(model=mlp(), calibration=[(data[:50], labels[:50])], recalibrate="repair"))[0]
    assert same(bare, labelled)


ONE, SAME = torch.rand(1, 64), torch.rand(64).expand(20, 64)


@pytest.mark.parametrize(("batches", "reason"), [([ONE], "are 1 input"), ([SAME, SAME], "all 40 .* are the same")])
def test_inputs_without_a_spread_are_refused_for_a_recalibration_and_else_left_out(batches, reason, caplog):
    with pytest.raises(CalibrationError, match=reason):
        C2M3(model=mlp(), calibration=batches, recalibrate="repair")
    arrays, metrics = aggregate(good(), C2M3(model=mlp(), calibration=batches))
    assert same(arrays, aggregate(good())[0])
    assert "c2m3-repaired" not in metrics
    assert any(re.search(reason, text) for text in caplog.messages)


def _normed_replies():
    replies = []
    for node in range(3):
        model = normed(node)
        train(model, *(each[node:1200:3] for each in digits()), epochs=2, seed=node)
        replies.append({name: value.clone() for name, value in model.state_dict().items()})
    return [reply(node, params) for node, params in enumerate(replies)]


def test_inputs_of_another_range_than_the_clients_are_found_by_their_batch_norm(caplog):
    data = digits()[0][:300]
    plain, _ = aggregate(_normed_replies(), C2M3(model=normed(), example_inputs=EXAMPLE), normed().state_dict())
    for factor, repaired in ((1.0, 1), (255.0, 0)):
        strategy = C2M3(model=normed(), calibration=[factor * data])
        arrays, metrics = aggregate(_normed_replies(), strategy, normed().state_dict())
        assert metrics["c2m3-repaired"] == repaired
        assert same(arrays, plain) == (not repaired)
    assert sum("are not of the clients' kind" in text for text in caplog.messages) == 1, "of three candidates"


@pytest.mark.parametrize("batch", [torch.zeros(0, 64), "text", torch.full((3, 64), math.nan)])
def test_unusable_calibration_data_are_refused_at_once(batch):
    with pytest.raises(CalibrationError):
        C2M3(model=mlp(), calibration=[batch])


UNUSABLE = {
    "empty list": ([], "empty"),
    "shape": ([torch.zeros(4, 63)], r"batch 0 .*\(4, 63\)"),
    "shape of a later batch": ([torch.zeros(4, 64), torch.zeros(4, 63)], r"batch 1 .*\(4, 63\)"),
    "one tensor": (torch.zeros(4, 63), r"batch 0 .*\(4, 63\)"),
    "double": ([torch.zeros(4, 64).double()], r"torch\.float64 of shape \(4, 64\).*torch\.float32"),
    "integers": ([torch.zeros(4, 64).long()], r"torch\.int64 of shape \(4, 64\).*torch\.float32"),
    "loader": (DataLoader(torch.zeros(8, 63), batch_size=4), r"batch 0 .*\(4, 63\)"),
    "no iterable": (5, "failed at their first batch"),
}


@pytest.mark.parametrize("example", [EXAMPLE, None], ids=["example", "no example"])
@pytest.mark.parametrize(("calibration", "message"), UNUSABLE.values(), ids=UNUSABLE.keys())
def test_calibration_data_that_the_network_cannot_take_are_refused_at_once(calibration, message, example):
    with pytest.raises(CalibrationError, match=message):
        C2M3(model=mlp(), calibration=calibration, example_inputs=example)


def test_trying_out_calibration_data_leaves_the_model_alone():
    model = normed()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    C2M3(model=model, calibration=DataLoader(digits()[0][:64], batch_size=32), example_inputs=EXAMPLE)
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_tokens_out_of_range_are_found_in_every_batch_of_a_list():
    model = nn.Sequential(nn.Embedding(10, 4), nn.Flatten(), nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 2))
    batches = [torch.zeros(2, 3, dtype=torch.long), torch.full((2, 3), 10)]
    with pytest.raises(CalibrationError, match="batch 1 "):
        C2M3(model=model, calibration=batches, example_inputs=batches[0])


def test_out_of_memory_on_the_accelerator_falls_back_to_the_cpu(monkeypatch, caplog):
    expected, _ = aggregate(good())
    strategy = C2M3(model=mlp(), example_inputs=EXAMPLE)
    strategy.setup.aligner.device = torch.device("cuda")
    moves = aligner.to_device

    def scarce(params, device):
        if device.type == "cuda":
            raise torch.OutOfMemoryError("CUDA out of memory")
        return moves(params, device)

    monkeypatch.setattr(aligner, "to_device", scarce)
    arrays, metrics = aggregate(good(), strategy)
    assert same(arrays, expected)
    assert metrics["c2m3-on-cpu"] == 1
    assert any("matching: cuda is out of memory, going on on the CPU" in text for text in caplog.messages)


def test_out_of_memory_on_the_cpu_is_not_hidden():
    def compute(device):
        raise torch.OutOfMemoryError("no more")

    with pytest.raises(torch.OutOfMemoryError):
        with_cpu_fallback(compute, torch.device("cpu"), "matching")


def test_an_initial_model_that_is_not_finite_is_not_sent_out():
    broken = {name: value * math.nan for name, value in mlp().state_dict().items()}
    with pytest.raises(ParamsError, match=r"the arrays to send out: '0\.weight' has 2048 values that are NaN"):
        send(C2M3(model=mlp(), example_inputs=EXAMPLE), broken)


def failing(setting):
    raise KeyError("accuracy")


def test_any_failure_of_a_recalibration_costs_the_repair_not_the_round(caplog):
    strategy = C2M3(model=mlp(), calibration=[digits()[0][:50]], recalibrate=failing)
    arrays, metrics = aggregate(good(), strategy)
    assert same(arrays, aggregate(good())[0])
    assert (metrics["c2m3-repaired"], metrics["c2m3-kept-previous"]) == (0, 0)
    assert any("recalibration failed: KeyError: 'accuracy': the merged model stays" in text for text in caplog.messages)


class WithEmptyBuffer(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(64, 10)
        self.register_buffer("nothing", torch.zeros(0, 3))

    def forward(self, x):
        return self.linear(x)


def test_a_network_with_nothing_to_permute_and_an_empty_buffer_is_averaged():
    model = WithEmptyBuffer()
    strategy = C2M3(model=model, example_inputs=EXAMPLE)
    replies = [reply(n, {name: value + n for name, value in model.state_dict().items()}) for n in range(3)]
    arrays, metrics = aggregate(replies, strategy, model.state_dict())
    assert metrics["c2m3-kept-previous"] == 0
    torch.testing.assert_close(to_params(arrays)["linear.bias"], model.state_dict()["linear.bias"] + 1)
