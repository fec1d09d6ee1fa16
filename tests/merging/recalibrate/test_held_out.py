"""Held-out examples are named by their content."""

from __future__ import annotations

import pytest
import torch

from c2m3_fl.errors import ConfigError
from c2m3_fl.merging.recalibrate.held_out import held_out, split_batches
from c2m3_fl.network.calibration import Batch


def data(count=53, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 3, 2, generator=generator), torch.randint(0, 4, (count,), generator=generator)


def batches(inputs, labels, size=16):
    return [Batch((x,), y) for x, y in zip(inputs.split(size), labels.split(size), strict=True)]


def held(found):
    """The held-out examples, as a set."""
    masks = held_out(found, 5)
    return {
        tuple(row.flatten().tolist()) for batch, mask in zip(found, masks, strict=True) for row in batch.inputs[0][mask]
    }


def test_every_fifth_example_is_held_out():
    masks = held_out(batches(*data()), 5)
    assert [len(mask) for mask in masks] == [16, 16, 16, 5]
    assert sum(int(mask.sum()) for mask in masks) == 53 // 5


def test_neither_the_order_of_the_examples_nor_their_batches_matter():
    inputs, labels = data()
    order = torch.randperm(len(inputs), generator=torch.Generator().manual_seed(1))
    assert held(batches(inputs[order], labels[order], 7)) == held(batches(inputs, labels))


def test_a_split_has_every_example_once_with_its_label():
    inputs, labels = data()
    parts = split_batches(batches(inputs, labels), 5)
    assert [sum(len(batch.inputs[0]) for batch in part) for part in parts] == [43, 10]
    known = {tuple(row.flatten().tolist()): int(label) for row, label in zip(inputs, labels, strict=True)}
    found = {
        tuple(row.flatten().tolist()): int(label)
        for part in parts
        for batch in part
        for row, label in zip(batch.inputs[0], batch.labels, strict=True)
    }
    assert found == known


@pytest.mark.parametrize("every", [0, 1, -3, 2.5, True])
def test_a_share_that_is_not_one_example_in_so_many_is_refused(every):
    with pytest.raises(ConfigError, match="holdout"):
        held_out(batches(*data()), every)
