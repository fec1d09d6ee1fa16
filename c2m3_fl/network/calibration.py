"""Calibration batches and example inputs: the forms that they may have, reading and checking.

Calibration data are any iterable of batches, or one tensor that is a single batch. A batch is a tensor, a tuple or
list that starts with the network's inputs, or a dict that names them. Class labels may follow the inputs.
Example inputs are the arguments of one call: a tensor, a tuple of arguments, or a dict of keyword arguments.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, IterableDataset

from c2m3_fl.errors import CalibrationError
from c2m3_fl.network.batch_content import check_input, is_labels, split_labels
from c2m3_fl.network.copying import dense, innermost

Calibration = Iterable[Any]
ExampleInputs = Tensor | Sequence[Any] | Mapping[str, Any]
Inputs = tuple[tuple[Any, ...], dict[str, Any]]

_LABELS = ("label", "labels")  # keys of class labels in a batch that is a dict


def as_inputs(example_inputs: ExampleInputs) -> Inputs:
    """Positional and keyword arguments of one call: a tensor, a tuple or list of arguments, or a dict of keywords."""
    if isinstance(example_inputs, Mapping):
        return (), {name: dense(value) for name, value in example_inputs.items()}
    if isinstance(example_inputs, tuple | list):
        return tuple(map(dense, example_inputs)), {}
    return (dense(example_inputs),), {}


def inputs_beside(model: nn.Module | type[nn.Module], example_inputs: ExampleInputs) -> Inputs:
    """The arguments of one call, those that are tensors on the device of the network's first tensor."""
    args, kwargs = as_inputs(example_inputs)
    held = model.state_dict().values() if isinstance(model, nn.Module) else ()  # a class is refused later
    device = next((value.device for value in held if isinstance(value, Tensor)), None)
    moved = [value.to(device=device) if isinstance(value, Tensor) else value for value in (*args, *kwargs.values())]
    return tuple(moved[: len(args)]), dict(zip(kwargs, moved[len(args) :], strict=True))


@dataclass(frozen=True)
class Batch:
    """The inputs of one call of the network, and their labels if the calibration data have any.

    Attributes
    ----------
    inputs : tuple of Tensor
        Arguments of the network.
    labels : Tensor, optional
        Class indices, shape (batch,).
    index : int
        The batch's place in the calibration data, for messages.
    unread : str
        Type and shape of the element after the inputs, if it does not hold class indices.
    names : tuple of str
        The keyword of every input; empty if inputs are positional.
    """

    inputs: tuple[Tensor, ...]
    labels: Tensor | None = None
    index: int = 0
    unread: str = ""
    names: tuple[str, ...] = ()

    @property
    def call(self) -> Inputs:
        """Positional and keyword arguments: ``args, kwargs = batch.call; model(*args, **kwargs)``."""
        return as_inputs(self.example)

    @property
    def example(self) -> tuple[Tensor, ...] | dict[str, Tensor]:
        """The inputs as example inputs: a tuple, or a dict if they have names."""
        return dict(zip(self.names, self.inputs, strict=True)) if self.names else self.inputs

    @property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """Shapes of all inputs."""
        return tuple(tuple(value.shape) for value in self.inputs)

    @property
    def types(self) -> tuple[torch.dtype, ...]:
        """Types of all inputs."""
        return tuple(value.dtype for value in self.inputs)

    @property
    def kind(self) -> tuple[Any, ...]:
        """Names, shapes and types: batches of one kind share a program."""
        return self.names, self.shapes, self.types

    def to(self, device: torch.device | str | None) -> Batch:
        """Return the same batch on another device."""
        if device is None:
            return self
        labels = None if self.labels is None else self.labels.to(device)
        return replace(self, inputs=tuple(value.to(device) for value in self.inputs), labels=labels)


def as_batch(example: ExampleInputs | Batch) -> Batch:
    """Example inputs as a batch.

    Raises
    ------
    CalibrationError
        When an input is not a tensor.
    """
    if isinstance(example, Batch):
        return example
    args, kwargs = as_inputs(example)
    values = (*args, *kwargs.values())
    for value in values:
        if not isinstance(value, Tensor):
            raise CalibrationError(f"the example inputs hold a {type(value).__name__}, expected only tensors")
    return Batch(values, names=tuple(kwargs))


def load_batches(
    calibration: Calibration,
    *,
    model: nn.Module | None = None,
    example_inputs: ExampleInputs | None = None,
    inputs: Sequence[str] | None = None,
    device: torch.device | str | None = None,
) -> tuple[Batch, ...]:
    """Read and check all calibration batches.

    Parameters
    ----------
    calibration : iterable of batches, or Tensor
        A list, a ``DataLoader``, a single tensor, …
    model : nn.Module, optional
        The network. Keys of a dict batch that are names of its arguments are inputs.
    example_inputs : Tensor, tuple or dict, optional
        A tuple or dict says how many of a batch's elements are inputs; otherwise there is one.
    inputs : sequence of str, optional
        The keys of dict batches that are inputs. They are passed by keyword if all of them are arguments of the
        network, otherwise by position in this order.
    device : torch.device or str, optional
        Where to put the batches; by default they stay where they are.

    Raises
    ------
    CalibrationError
        When there is no batch, or when a batch is empty, of the wrong type or not finite, or when the keys of a dict
        are not the network's arguments.
    """
    reader = _Reader(model, example_inputs, inputs)
    if isinstance(calibration, tuple) and len(calibration) == 2 and reader.arity == 1 and _pairs(calibration):
        raise CalibrationError("the calibration data are one pair (inputs, labels), expected batches: pass [(x, y)]")
    given: object = calibration
    if isinstance(given, Dataset) and not isinstance(given, IterableDataset):
        raise CalibrationError(
            f"the calibration data are a {type(given).__name__}, which gives one example at a time; expected "
            "batches: pass DataLoader(dataset, batch_size=32)"
        )
    source = [calibration] if isinstance(calibration, Tensor | Mapping) else calibration
    batches: list[Batch] = []
    try:
        for index, raw in enumerate(source):
            batch = raw if isinstance(raw, Batch) else reader.read(raw, index)
            batches.append(batch.to(device))
    except CalibrationError:
        raise
    except Exception as error:
        where = f"after {len(batches)} batches" if batches else "at their first batch"
        raise CalibrationError(f"the calibration data failed {where}: {error}") from error
    if not batches:
        raise CalibrationError(
            "the calibration data are empty; pass at least one batch of inputs (a list or a DataLoader: "
            "a generator is exhausted after its first use)"
        )
    return tuple(batches)


def unfit(batch: Batch, params: Mapping[str, Tensor], error: Exception) -> CalibrationError:
    """The error that names the batch that the network cannot take, and the reason.

    Parameters
    ----------
    batch : Batch
        The batch.
    params : mapping of str to Tensor
        The network's state dict; the error quotes its types.
    error : Exception
        What the network raised.
    """
    given = ", ".join(f"{kind} of shape {shape}" for kind, shape in zip(batch.types, batch.shapes, strict=True))
    own = sorted({str(value.dtype) for value in params.values() if value.is_floating_point()})
    return CalibrationError(
        f"calibration batch {batch.index} cannot be fed to the network: its inputs are {given}, the network's tensors "
        f"are {', '.join(own) or 'none'}: {error}; pass inputs of the shape and type that the network was trained on; "
        "if it takes several, pass a tuple or a dict as example_inputs"
    )


class _Reader:
    """Converts what users' loaders yield into batches."""

    def __init__(
        self, model: nn.Module | None, example_inputs: ExampleInputs | None, inputs: Sequence[str] | None
    ) -> None:
        if isinstance(inputs, str):
            raise CalibrationError(f"inputs is {inputs!r}, expected a tuple of keys: inputs=({inputs!r},)")
        self._chosen = None if inputs is None else tuple(inputs)
        self._network = "the network" if model is None else f"{type(model).__name__}.forward"
        self._arguments = None if model is None else inspect.signature(innermost(model).forward).parameters
        named = isinstance(example_inputs, Mapping)
        self._names = tuple(example_inputs) if isinstance(example_inputs, Mapping) else ()
        several = named or isinstance(example_inputs, tuple | list)
        self.arity = len(example_inputs) if several and example_inputs is not None else 1

    def read(self, raw: Any, index: int) -> Batch:  # noqa: ANN401  # users' loaders yield anything
        """One batch, checked."""
        who = f"calibration batch {index}"
        if isinstance(raw, Mapping):
            return self._named(raw, who, index)
        if self._chosen is not None:
            raise CalibrationError(
                f"{who} is a {type(raw).__name__}, expected a dict: inputs={self._chosen} names keys of dicts; "
                "omit it, or let the loader yield dicts"
            )
        if isinstance(raw, Tensor):
            elements: tuple[Any, ...] = (dense(raw),)
        elif isinstance(raw, tuple | list):
            elements = tuple(map(dense, raw))
        else:
            raise CalibrationError(
                f"{who} is a {type(raw).__name__}, expected a tensor, a tuple that starts with the network's inputs, "
                "or a dict that names them"
            )
        if len(elements) < self.arity:
            raise CalibrationError(f"{who} has {len(elements)} elements, the network takes {self.arity} inputs")
        for position, value in enumerate(elements[: self.arity]):
            check_input(value, f"{who}, input {position}", first=position == 0)
        rest = elements[self.arity :]
        labels, unread = split_labels(rest[0], elements[0]) if rest else (None, "")
        return Batch(elements[: self.arity], labels, index, unread, self._names)

    def _named(self, raw: Mapping[str, Any], who: str, index: int) -> Batch:
        raw = {key: dense(value) for key, value in raw.items()}
        keys = self._choose(raw, who)
        for key in keys:
            check_input(raw[key], f"{who}, input {key!r}", first=key == keys[0])
        given = tuple(raw[key] for key in keys)
        follows = [raw[key] for key in _LABELS if key in raw and key not in keys]
        labels, unread = split_labels(follows[0], given[0]) if follows else (None, "")
        return Batch(given, labels, index, unread, keys if self._takes(keys) else ())

    def _choose(self, raw: Mapping[str, Any], who: str) -> tuple[str, ...]:
        """The keys that are inputs, in the order of the network's arguments."""
        if self._chosen is not None:
            missing = [key for key in self._chosen if key not in raw]
            if missing:
                raise CalibrationError(f"{who} lacks the inputs {missing}; its keys are {list(raw)}")
            return self._chosen
        if self._arguments is None:
            raise CalibrationError(
                f"{who} is a dict with the keys {list(raw)}, expected a tensor or a tuple; a dict needs "
                "inputs=(…,), which names the keys that are inputs"
            )
        foreign = [key for key in raw if not self._takes((key,)) and key not in _LABELS]
        order = list(self._arguments)
        rank = {name: place for place, name in enumerate(order)}
        found = sorted((key for key in raw if self._takes((key,))), key=lambda key: rank.get(key, len(order)))
        found = [key for key in found if not self._labels_apart(key, raw[key], raw[found[0]])]
        if foreign or not found:
            expected = ", ".join(order)
            names = foreign or list(raw)
            raise CalibrationError(
                f"{who} has the keys {list(raw)}, of which {names} are not arguments of {self._network}({expected}); "
                f"choose the inputs by their keys: inputs=({names[0]!r},)"
            )
        return tuple(found)

    def _labels_apart(self, key: str, value: Any, first: Any) -> bool:  # noqa: ANN401  # as above
        """Whether a key holds class labels that the network takes but does not need, in order to compute a loss."""
        argument = None if self._arguments is None else self._arguments.get(key)
        optional = argument is None or argument.default is not argument.empty
        return key in _LABELS and optional and isinstance(first, Tensor) and is_labels(value, first)

    def _takes(self, keys: Sequence[str]) -> bool:
        """Whether all keys are keyword arguments of the network."""
        found = self._arguments
        if found is None:
            return False
        kinds = inspect.Parameter
        named = {name for name, each in found.items() if each.kind in (kinds.POSITIONAL_OR_KEYWORD, kinds.KEYWORD_ONLY)}
        return set(keys) <= named or any(each.kind is kinds.VAR_KEYWORD for each in found.values())


def _pairs(given: tuple[Any, ...]) -> bool:
    return isinstance(given[0], Tensor) and is_labels(given[1], given[0])
