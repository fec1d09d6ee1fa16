"""Calibration data that are checked and exported once."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from c2m3_fl.errors import CalibrationError
from c2m3_fl.network import calibration_set, program
from c2m3_fl.network.calibration import load_batches
from c2m3_fl.network.calibration_set import CalibrationSet
from c2m3_fl.network.program import Walk

INPUTS = torch.randn(10, 3, generator=torch.Generator().manual_seed(0))
MODEL = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))


class TwoInputs(nn.Module):
    """Takes a tensor by position or keyword, and another by keyword alone."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 4), nn.Linear(5, 4)

    def forward(self, x: Tensor, *, y: Tensor) -> Tensor:
        return self.first(x) + self.second(y)


@pytest.fixture
def exports(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """Filled with the inputs of every export."""
    seen: list[object] = []
    plain = program.export

    def counting(model: nn.Module, inputs: tuple[tuple[object, ...], dict[str, object]]) -> object:
        seen.append(inputs)
        return plain(model, inputs)

    monkeypatch.setattr(program, "export", counting)
    return seen


def test_batches_of_one_kind_are_exported_once(exports: list[object]) -> None:
    held = CalibrationSet.of(MODEL, [INPUTS[:4], INPUTS[4:8], INPUTS[8:]])
    assert not exports
    assert held.programs[0] is held.programs[1] is held.program
    assert held.programs[0] is not held.programs[2]
    assert held.to("cpu") is held
    assert held.programs is held.to("cpu").programs
    assert len(exports) == 2


def test_an_iterator_is_read_once() -> None:
    held = CalibrationSet.of(MODEL, iter(INPUTS.split(5)))
    assert [len(batch.inputs[0]) for batch in held.batches] == [5, 5]
    assert held.inputs == 10
    assert not held.labelled
    assert CalibrationSet.of(MODEL, [(INPUTS, torch.arange(10))]).labelled


def test_example_inputs_alone_give_a_program_and_no_batches() -> None:
    held = CalibrationSet.of(MODEL, example_inputs=INPUTS)
    assert not held.batches
    assert not held.programs
    assert not held.labelled
    assert [operator.weight for operator in held.program.operators] == ["0.weight", "2.weight"]
    with pytest.raises(CalibrationError, match="neither example_inputs nor calibration"):
        CalibrationSet.of(MODEL)


def test_example_inputs_default_to_the_first_batch() -> None:
    held = CalibrationSet.of(MODEL, [INPUTS[:2], INPUTS[2:]])
    assert isinstance(held.example_inputs, tuple)
    assert torch.equal(held.example_inputs[0], INPUTS[:2])


def test_another_device_gets_a_set_of_its_own_once() -> None:
    held = CalibrationSet.of(MODEL, [(INPUTS, torch.arange(10))])
    moved = held.to("meta")
    assert moved is held.to("meta")
    assert moved.device.type == moved.example.inputs[0].device.type == "meta"
    assert held.device.type == "cpu"
    assert CalibrationSet.of(MODEL, held) is held


@pytest.mark.parametrize("order", [("x", "y"), ("y", "x")])
def test_named_inputs_reach_the_arguments_of_their_names(order: tuple[str, ...]) -> None:
    model, given = TwoInputs(), {"x": torch.randn(2, 3), "y": torch.randn(2, 5)}
    batch = {name: given[name] for name in order}
    held = CalibrationSet.of(model, [batch, {**batch, "label": torch.zeros(2, dtype=torch.long)}])
    assert held.batches[0].names == ("x", "y")
    assert held.batches[1].labels is not None
    for exported, each in zip(held.programs, held.batches, strict=True):
        (found,) = Walk(exported, model.state_dict(), each).finish()
        assert torch.equal(found, model(**given))
    alone = CalibrationSet.of(model, example_inputs=batch)
    (found,) = Walk(alone.program, model.state_dict(), alone.example).finish()
    assert torch.equal(found, model(**given))


def test_elements_of_a_tuple_take_the_names_of_the_example_inputs() -> None:
    model, given = TwoInputs(), {"x": torch.randn(2, 3), "y": torch.randn(2, 5)}
    (batch,) = load_batches([(*given.values(), torch.arange(2))], example_inputs=given)
    assert batch.names == ("x", "y")
    assert batch.labels is not None
    assert torch.equal(model(**batch.call[1]), model(**given))


def test_the_network_is_tried_on_every_kind_of_batch() -> None:
    with pytest.raises(CalibrationError, match=r"batch 1 cannot be fed .* of shape \(10, 2\).*tuple or a dict"):
        CalibrationSet.of(MODEL, [INPUTS, INPUTS[:, :2]])
    embedding = nn.Sequential(nn.Embedding(10, 4), nn.Flatten(), nn.Linear(12, 2))
    with pytest.raises(CalibrationError, match="batch 1 cannot be fed"):
        CalibrationSet.of(embedding, [torch.zeros(2, 3, dtype=torch.long), torch.full((2, 3), 10)])
    with pytest.raises(CalibrationError, match="the example inputs hold a bool"):
        _ = CalibrationSet.of(MODEL, example_inputs=(INPUTS, True)).example


def test_trying_out_leaves_the_model_alone() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert len(CalibrationSet.of(model, [INPUTS]).programs) == 1
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert calibration_set.CalibrationSet.of(model, [INPUTS]).model is model
