"""Which examples are held out: chosen by their content, so that the order of a shuffling loader has no effect."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from c2m3_fl.errors import CalibrationError
from c2m3_fl.network.calibration import Batch
from c2m3_fl.ranges import check_whole


def held_out(batches: Sequence[Batch], every: int) -> list[Tensor]:
    """Mask of the examples that are held out, one bool tensor of shape (batch,) per batch.

    Examples are ordered by a digest of their inputs and label, and every `every`-th one in that order is held out.
    The choice depends neither on the order of the examples nor on their batches. Of an example, all positions are
    held out or none.

    Parameters
    ----------
    batches : sequence of Batch
        Axis 0 of the first input is that of the examples.
    every : int
        At least 2.

    Raises
    ------
    ConfigError
        When `every` is not a whole number of at least 2.
    """
    check_whole("holdout", every, 2)
    names = [(name, place, row) for place, batch in enumerate(batches) for row, name in enumerate(_digests(batch))]
    masks = [torch.zeros(_size(batch), dtype=torch.bool) for batch in batches]
    for _, place, row in sorted(names)[every - 1 :: every]:
        masks[place][row] = True
    return [mask.to(batch.inputs[0].device) for mask, batch in zip(masks, batches, strict=True)]


def digest_examples(batches: Sequence[Batch]) -> bytes:
    """A digest of all examples, whatever their order."""
    names = sorted(name for batch in batches for name in _digests(batch))
    return hashlib.blake2b(b"".join(names), digest_size=16).digest()


def split_batches(batches: Sequence[Batch], every: int) -> tuple[list[Batch], list[Batch]]:
    """Split batches into those of the kept examples and those of the examples that are held out.

    Parameters
    ----------
    batches : sequence of Batch
        Axis 0 of all inputs is that of the examples.
    every : int
        One example in so many is held out.

    Raises
    ------
    CalibrationError
        When axis 0 of an input is not that of the examples.
    """
    kept, held = [], []
    for batch, mask in zip(batches, held_out(batches, every), strict=True):
        if any(len(value) != len(mask) for value in batch.inputs):
            raise CalibrationError(f"calibration batch {batch.index}: inputs of shapes {batch.shapes} cannot be split")
        kept.append(_rows(batch, ~mask))
        held.append(_rows(batch, mask))
    return [batch for batch in kept if _size(batch)], [batch for batch in held if _size(batch)]


def _rows(batch: Batch, mask: Tensor) -> Batch:
    labels = None if batch.labels is None else batch.labels[mask.to(batch.labels.device)]
    return replace(batch, inputs=tuple(value[mask] for value in batch.inputs), labels=labels)


def _size(batch: Batch) -> int:
    return len(batch.inputs[0])


def _digests(batch: Batch) -> list[bytes]:
    """One digest per example, of its inputs and its label."""
    count = _size(batch)
    parts = (*batch.inputs, *(() if batch.labels is None else (batch.labels,)))
    columns = [_octets(value) for value in parts if value.ndim and len(value) == count]
    found = []
    for row in range(count):
        state = hashlib.blake2b(digest_size=16)
        for column in columns:
            state.update(column[row])
        found.append(state.digest())
    return found


def _octets(value: Tensor) -> NDArray[np.uint8]:
    """The bytes of every row, shape (batch, bytes of a row)."""
    rows = value.detach().cpu().contiguous()
    return (rows.flatten(1) if rows.ndim > 1 else rows[:, None]).view(torch.uint8).numpy()
