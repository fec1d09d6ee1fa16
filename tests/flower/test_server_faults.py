"""What fails on the server itself costs what it must and no more: calibration data, memory, the model itself."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from c2m3_fl.errors import CalibrationError, ParamsError
from c2m3_fl.flower import aligner
from c2m3_fl.flower.aligner import with_cpu_fallback
from c2m3_fl.flower.records import to_params
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
)


class Breaking:
    """A loader that works while the strategy is built, and then no more."""

    def __init__(self) -> None:
        self.broken = False

    def __iter__(self):
        if self.broken:
            raise OSError("disk gone")
        return iter([digits()[0][:50]])


def test_a_calibration_loader_that_raises_costs_the_repair_not_the_round(caplog):
    loader = Breaking()
    strategy = C2M3(model=mlp(), calibration=loader)
    loader.broken = True
    arrays, metrics = aggregate(good(), strategy)
    expected, _ = aggregate(good())
    assert same(arrays, expected)
    assert metrics["c2m3-repaired"] == 0
    assert any("recalibration failed" in text and "disk gone" in text for text in caplog.messages)


class RunningDry(Breaking):
    """A loader that yields batches while the strategy is built, and then none."""

    def __iter__(self):
        return iter([] if self.broken else [digits()[0][:50]])


def test_a_loader_that_runs_dry_costs_the_repair_not_the_round(caplog):
    loader = RunningDry()
    strategy = C2M3(model=mlp(), example_inputs=EXAMPLE, calibration=loader)
    loader.broken = True
    _, metrics = aggregate(good(), strategy)
    assert metrics["c2m3-repaired"] == 0
    assert any("empty" in text for text in caplog.messages)


def test_labels_in_the_calibration_data_make_no_difference():
    data, labels = digits()
    bare = aggregate(good(), C2M3(model=mlp(), calibration=[data[:50]]))[0]
    labelled = aggregate(good(), C2M3(model=mlp(), calibration=[(data[:50], labels[:50])]))[0]
    assert same(bare, labelled)


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
    "generator": ((batch for batch in [torch.zeros(4, 64)]), "a list or a DataLoader"),
    "iterator": (iter([torch.zeros(4, 64)]), "a list or a DataLoader"),
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
    strategy.rounds.aligner.device = torch.device("cuda")
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
