from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from c2m3_fl.errors import CalibrationError
from c2m3_fl.network.calibration import load_batches

INPUTS = torch.randn(10, 3, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(10)


@pytest.mark.parametrize(
    "calibration",
    [
        INPUTS,
        [INPUTS[:4], INPUTS[4:]],
        [(INPUTS[:4],), (INPUTS[4:],)],
        [[INPUTS[:4], LABELS[:4]], [INPUTS[4:], LABELS[4:]]],
        DataLoader(TensorDataset(INPUTS, LABELS), batch_size=4),
        (part for part in INPUTS.split(3)),
    ],
    ids=["tensor", "tensors", "tuples", "with labels", "loader", "generator"],
)
def test_every_kind_of_batch_yields_the_same_inputs(calibration: Any) -> None:
    batches = load_batches(calibration)
    assert torch.equal(torch.cat([batch.inputs[0] for batch in batches]), INPUTS)


def test_labels_are_kept_apart() -> None:
    (batch,) = load_batches([(INPUTS, LABELS)])
    assert len(batch.inputs) == 1
    assert batch.labels is not None
    assert torch.equal(batch.labels, LABELS)


def test_targets_that_are_no_class_indices_are_no_labels() -> None:
    (batch,) = load_batches([(INPUTS, INPUTS)])
    assert batch.labels is None


def test_a_tuple_of_example_inputs_says_how_many_inputs_there_are() -> None:
    (batch,) = load_batches([(INPUTS, INPUTS + 1, LABELS)], example_inputs=(INPUTS, INPUTS))
    assert len(batch.inputs) == 2
    assert batch.labels is not None


def test_every_batch_knows_its_place() -> None:
    assert [batch.to("cpu").index for batch in load_batches(list(INPUTS.split(4)))] == [0, 1, 2]


def _raising() -> Iterator[torch.Tensor]:
    yield INPUTS
    raise OSError("disk on fire")


@pytest.mark.parametrize(
    ("calibration", "message"),
    [
        ([], "the calibration data are empty"),
        ([INPUTS[:0]], r"batch 0, input 0 is empty: shape \(0, 3\)"),
        ([INPUTS, INPUTS.to(torch.uint8)], "batch 1, input 0 is of type torch.uint8, expected floats"),
        ([INPUTS > 0], "of type torch.bool"),
        ([INPUTS.log()], "NaN or infinite"),
        ([{"image": INPUTS}], r"batch 0 is a dict with the keys \['image'\], .* inputs="),
        ([{INPUTS}], "batch 0 is a set, expected a tensor"),
        ([INPUTS.numpy()], "batch 0 is a ndarray"),
        ([("a", INPUTS)], "input 0 is a str"),
        (TensorDataset(INPUTS, LABELS), r"a TensorDataset, .* one example at a time; .* pass DataLoader\(dataset"),
        (_raising(), "failed after 1 batches: disk on fire"),
    ],
)
def test_unusable_calibration_says_what_is_wrong(calibration: Any, message: str) -> None:
    with pytest.raises(CalibrationError, match=message):
        load_batches(calibration)


def test_a_missing_input_is_named() -> None:
    with pytest.raises(CalibrationError, match="batch 0 has 1 elements, the network takes 2 inputs"):
        load_batches([INPUTS], example_inputs=(INPUTS, INPUTS))


def test_one_pair_in_place_of_batches_is_named() -> None:
    with pytest.raises(CalibrationError, match=r"one pair \(inputs, labels\), expected batches: pass \[\(x, y\)\]"):
        load_batches((torch.zeros(4, 3), torch.arange(4)))


class Named(nn.Module):
    """A network whose argument is called as in the field's loaders."""

    def forward(self, img: Tensor, mask: Tensor | None = None) -> Tensor:
        return img if mask is None else img * mask


@pytest.mark.parametrize("key", ["label", "labels"])
def test_keys_of_a_dict_that_are_arguments_are_inputs_and_labels_are_labels(key: str) -> None:
    (batch,) = load_batches([{key: LABELS, "img": INPUTS}], model=Named())
    assert batch.names == ("img",)
    assert torch.equal(batch.inputs[0], INPUTS)
    assert batch.labels is not None
    assert torch.equal(batch.labels, LABELS)
    assert batch.example.keys() == {"img"}  # type: ignore[union-attr]  # a dict here


def test_labels_that_are_not_class_indices_are_left_unread() -> None:
    (batch,) = load_batches([{"img": INPUTS, "label": INPUTS}], model=Named())
    assert batch.labels is None
    assert "float32" in batch.unread


def test_chosen_keys_that_are_not_arguments_go_in_by_position() -> None:
    given = {"pixels": INPUTS, "label": LABELS, "id": LABELS}
    (batch,) = load_batches([given], model=nn.Linear(3, 2), inputs=("pixels",))
    assert batch.names == ()
    assert torch.equal(batch.inputs[0], INPUTS)
    assert batch.labels is not None
    (batch,) = load_batches([{"img": INPUTS, "mask": INPUTS, "id": LABELS}], model=Named(), inputs=("mask", "img"))
    assert batch.names == ("mask", "img")


@pytest.mark.parametrize(
    ("batch", "inputs", "message"),
    [
        (
            {"img": INPUTS, "id": LABELS},
            None,
            r"\['id'\] are not arguments of Named.forward\(img, mask\); choose",
        ),
        ({"pixels": INPUTS, "label": LABELS}, None, r"of which \['pixels'\] .*: inputs=\('pixels',\)"),
        ({"label": LABELS}, None, r"keys \['label'\], of which"),
        ({"img": INPUTS}, ("image",), r"batch 0 lacks the inputs \['image'\]; its keys are \['img'\]"),
        ({"img": INPUTS.log()}, None, "batch 0, input 'img' holds NaN"),
        ((INPUTS, LABELS), ("img",), "batch 0 is a tuple, expected a dict"),
        ({"img": INPUTS}, "img", r"inputs is 'img', expected a tuple of keys: inputs=\('img',\)"),
    ],
)
def test_keys_that_do_not_fit_are_named_with_a_remedy(batch: Any, inputs: Any, message: str) -> None:
    with pytest.raises(CalibrationError, match=message):
        load_batches([batch], model=Named(), inputs=inputs)
