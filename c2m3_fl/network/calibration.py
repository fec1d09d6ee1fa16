"""Calibration batches: the one place that decides what a batch is.

Calibration data are any iterable of batches, or one tensor that is a single batch. A batch is a tensor, or a
tuple or list that starts with the network's inputs; what follows them (labels) is kept apart. An iterator can be
read once: whoever needs the data again loads the batches first, or refuses it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from c2m3_fl.errors import CalibrationError

Calibration = Iterable[Any]
ExampleInputs = Tensor | tuple[Tensor, ...]

_TOKENS = (torch.int32, torch.int64)  # integer inputs that an embedding takes; uint8 is an image that nobody scaled


@dataclass(frozen=True)
class Batch:
    """The inputs of one call of the network, and its labels where the calibration data carry them.

    Attributes
    ----------
    inputs : tuple of Tensor
        Positional arguments of the network.
    labels : Tensor, optional
        Class indices, shape (batch,).
    index : int
        The batch's place in the calibration data, for messages.
    unread : str
        What followed the inputs, where it is no labels.
    """

    inputs: tuple[Tensor, ...]
    labels: Tensor | None = None
    index: int = 0
    unread: str = ""

    @property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """Shapes of all inputs."""
        return tuple(tuple(value.shape) for value in self.inputs)

    @property
    def types(self) -> tuple[torch.dtype, ...]:
        """Types of all inputs."""
        return tuple(value.dtype for value in self.inputs)

    def to(self, device: torch.device | str | None) -> Batch:
        """Return the same batch on another device."""
        if device is None:
            return self
        labels = None if self.labels is None else self.labels.to(device)
        return Batch(tuple(value.to(device) for value in self.inputs), labels, self.index, self.unread)


def load_batches(
    calibration: Calibration,
    *,
    example_inputs: ExampleInputs | None = None,
    device: torch.device | str | None = None,
) -> tuple[Batch, ...]:
    """Read and check all calibration batches, once.

    Parameters
    ----------
    calibration : iterable of batches, or Tensor
        A list, a ``DataLoader``, a single tensor, …
    example_inputs : Tensor or tuple of Tensor, optional
        A tuple says how many of a batch's elements are inputs; otherwise there is one.
    device : torch.device or str, optional
        Where to put the batches; by default they stay where they are.

    Raises
    ------
    CalibrationError
        When there is no batch, or when a batch is empty, of the wrong type or not finite.
    """
    arity = len(example_inputs) if isinstance(example_inputs, tuple) else 1
    if isinstance(calibration, tuple) and len(calibration) == 2 and arity == 1 and _is_labels(*calibration[::-1]):
        raise CalibrationError("the calibration data are one pair (inputs, labels), expected batches: pass [(x, y)]")
    source = [calibration] if isinstance(calibration, Tensor) else calibration
    batches = []
    try:
        for index, raw in enumerate(source):
            batch = raw if isinstance(raw, Batch) else _read(raw, arity, index)
            batches.append(batch.to(device))
    except CalibrationError:
        raise
    except Exception as error:
        raise CalibrationError(f"the calibration data failed after {len(batches)} batches: {error}") from error
    if not batches:
        raise CalibrationError(
            "the calibration data are empty; pass at least one batch of inputs (a list or a DataLoader: "
            "a generator is exhausted after its first use)"
        )
    return tuple(batches)


def first_inputs(calibration: Calibration | None, example_inputs: ExampleInputs | None) -> tuple[Tensor, ...]:
    """Example inputs for tracing: `example_inputs`, or by default the first calibration batch.

    Raises
    ------
    CalibrationError
        When there are neither, or when the data are an iterator, which would have lost its first batch.
    """
    if isinstance(calibration, Iterator):
        raise CalibrationError(
            f"the calibration data are a {type(calibration).__name__}, which is exhausted after its first use; "
            "pass a list or a DataLoader"
        )
    if isinstance(example_inputs, Tensor):
        return (example_inputs,)
    if example_inputs is not None:
        return tuple(example_inputs)
    if calibration is None:
        raise CalibrationError("neither example_inputs nor calibration were given; one of them must show an input")
    return load_batches(calibration if isinstance(calibration, Tensor) else _first(calibration))[0].inputs


def _first(calibration: Calibration) -> list[Any]:
    for raw in calibration:
        return [raw]
    return []


def _read(raw: Any, arity: int, index: int) -> Batch:  # noqa: ANN401  # users' loaders yield anything
    who = f"calibration batch {index}"
    if isinstance(raw, Tensor):
        elements: tuple[Any, ...] = (raw,)
    elif isinstance(raw, (tuple, list)):
        elements = tuple(raw)
    else:
        raise CalibrationError(
            f"{who} is a {type(raw).__name__}, expected a tensor, or a tuple that starts with the network's inputs"
        )
    if len(elements) < arity:
        raise CalibrationError(f"{who} has {len(elements)} elements, the network takes {arity} inputs")
    for position, value in enumerate(elements[:arity]):
        _check(value, f"{who}, input {position}")
    rest = elements[arity:]
    if not rest:
        return Batch(elements[:arity], None, index)
    if _is_labels(rest[0], elements[0]):
        return Batch(elements[:arity], rest[0], index)
    what = f"{rest[0].dtype} of shape {tuple(rest[0].shape)}" if isinstance(rest[0], Tensor) else type(rest[0]).__name__
    return Batch(elements[:arity], None, index, what)


def _is_labels(value: Any, inputs: Tensor) -> bool:  # noqa: ANN401  # as above
    integral = isinstance(value, Tensor) and not value.is_floating_point()
    return integral and tuple(value.shape) == tuple(inputs.shape[:1])


def _check(value: Any, who: str) -> None:  # noqa: ANN401  # as above
    if not isinstance(value, Tensor):
        raise CalibrationError(f"{who} is a {type(value).__name__}, expected a tensor")
    if value.numel() == 0:
        raise CalibrationError(f"{who} is empty: shape {tuple(value.shape)}")
    if not value.is_floating_point() and value.dtype not in _TOKENS:
        raise CalibrationError(f"{who} is of type {value.dtype}, expected floats scaled as in training, or token ids")
    if value.is_floating_point() and not bool(torch.isfinite(value).all()):
        raise CalibrationError(f"{who} holds NaN or infinite values")
