"""Calibration data are tried out before the first round: what cannot be fed to the network is refused at once."""

from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

from c2m3_fl.errors import CalibrationError
from c2m3_fl.network.calibration import Batch, Calibration, ExampleInputs, load_batches


def check_calibration(model: nn.Module, calibration: Calibration, example_inputs: ExampleInputs | None) -> None:
    """Run a copy of the model, in evaluation mode, on the calibration data that are in memory.

    These are all batches of a list, a tuple or a tensor, and the first one of anything else. Floating batches of
    one shape and type stand for each other; integers may be tokens out of range, so that each batch is run.

    Parameters
    ----------
    model : nn.Module
        The architecture; not mutated.
    calibration : iterable of batches, or Tensor
        See `load_batches`.
    example_inputs : Tensor or tuple of Tensor, optional
        A tuple says how many of a batch's elements are inputs.

    Raises
    ------
    CalibrationError
        When there is no batch, when a batch is malformed or the network cannot take it, and for an iterator, which
        is exhausted after one round.
    """
    if isinstance(calibration, Iterator) and iter(calibration) is calibration:
        raise CalibrationError(
            f"calibration is a {type(calibration).__name__}, which is exhausted after its first use, but every round "
            "needs the data again; pass a list or a DataLoader"
        )
    held = calibration if isinstance(calibration, list | tuple | Tensor) else _first(calibration)
    batches = load_batches(held, example_inputs=example_inputs)
    network = deepcopy(model).eval()
    tensors = [*network.parameters(), *network.buffers()]
    seen = set()
    for index, batch in enumerate(batches):
        kind = tuple((value.dtype, value.shape) for value in batch.inputs)
        if kind in seen and all(value.is_floating_point() for value in batch.inputs):
            continue
        seen.add(kind)
        _run(network, batch.to(tensors[0].device if tensors else None), index)


def _first(calibration: Calibration) -> list[Any]:
    try:
        for raw in calibration:
            return [raw]
    except Exception as error:
        raise CalibrationError(f"the calibration data failed at their first batch: {error}") from error
    return []


def _run(network: nn.Module, batch: Batch, index: int) -> None:
    try:
        with torch.no_grad():
            network(*batch.inputs)
    except Exception as error:
        inputs = ", ".join(f"{value.dtype} of shape {tuple(value.shape)}" for value in batch.inputs)
        own = sorted({str(value.dtype) for value in network.parameters()})
        raise CalibrationError(
            f"calibration batch {index} cannot be fed to {type(network).__name__}: its inputs are {inputs}, the "
            f"model's parameters are {', '.join(own)}; pass inputs of the shape and type that the model was trained "
            f"on, and say with a tuple as example_inputs when it takes several: {error}"
        ) from error
