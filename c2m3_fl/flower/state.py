"""What strategies remember from round to round, as arrays and JSON: nothing is pickled.

A strategy may say so itself, with ``state_dict`` and ``load_state_dict`` as C2M3 does. Of any other, the
attributes that changed since it was made are kept: records, arrays, lists and dicts of arrays, and plain values.
"""

from __future__ import annotations

from collections.abc import Mapping
from logging import WARNING
from typing import Any, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt
import torch
from flwr.app import Array, ArrayRecord
from flwr.serverapp.strategy import Strategy
from flwr.supercore import log
from torch import Tensor

from c2m3_fl.errors import ConfigError
from c2m3_fl.flower.checkpoint import Arrays
from c2m3_fl.flower.wrapped import chain

Snapshot = list[dict[str, Any]]


@runtime_checkable
class Remembering(Protocol):
    """A strategy that knows what it must remember."""

    def state_dict(self) -> dict[str, Tensor]:
        """Everything it remembers."""

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Remember that instead."""


def snapshot(strategy: Strategy) -> Snapshot:
    """The attributes of a strategy and of those that it wraps, to tell later which ones have changed."""
    return [dict(vars(each)) for each in chain(strategy)]


def capture(strategy: Strategy, made: Snapshot) -> tuple[Arrays, dict[str, Any]]:
    """What changed since `made`: the arrays, and notes in JSON that say how to put them back."""
    arrays: Arrays = {}
    notes = []
    for place, (each, before) in enumerate(zip(chain(strategy), made, strict=True)):
        attributes: dict[str, Any] = {}
        if isinstance(each, Remembering):
            arrays |= {f"{place}/{key}": value.cpu().numpy() for key, value in each.state_dict().items()}
        else:
            for name, value in vars(each).items():
                if value is not before.get(name):
                    _capture(f"{place}/{name}", name, value, arrays, attributes)
        notes.append({"class": type(each).__qualname__, "attributes": attributes})
    return arrays, {"strategies": notes}


def restore(strategy: Strategy, arrays: Arrays, notes: Mapping[str, Any]) -> None:
    """Put back what `capture` found.

    Raises
    ------
    ConfigError
        When the strategies are not those that were captured.
    """
    classes = [type(each).__qualname__ for each in chain(strategy)]
    expected = [each["class"] for each in notes["strategies"]]
    if classes != expected:
        raise ConfigError(f"the checkpoint is of strategies {expected}, these are {classes}; use another folder")
    for place, (each, note) in enumerate(zip(chain(strategy), notes["strategies"], strict=True)):
        if isinstance(each, Remembering):
            prefix = f"{place}/"
            own = {key.removeprefix(prefix): value for key, value in arrays.items() if key.startswith(prefix)}
            each.load_state_dict({key: torch.from_numpy(value.copy()) for key, value in own.items()})
        for name, how in note["attributes"].items():
            setattr(each, name, _restored(f"{place}/{name}", how, arrays))


def _capture(path: str, name: str, value: object, arrays: Arrays, attributes: dict[str, Any]) -> None:
    if value is None or isinstance(value, bool | int | float | str):
        attributes[name] = {"kind": "value", "value": value}
        return
    found = _parts(value)
    if found is None:
        log(WARNING, "checkpoint: attribute %r of type %s is not saved", name, type(value).__name__)
        return
    kind, parts = found
    attributes[name] = {"kind": kind, "keys": list(parts)}
    arrays |= {f"{path}/{key}": part for key, part in parts.items()}


def _parts(value: object) -> tuple[str, Arrays] | None:
    """The kind of a value, and the arrays that it is made of; None for anything else."""
    if isinstance(value, ArrayRecord):
        return "record", {key: array.numpy() for key, array in value.items()}
    if isinstance(value, np.ndarray | np.generic):
        return "array", {"": np.asarray(value)}
    if isinstance(value, list) and all(isinstance(part, np.ndarray | np.generic) for part in value):
        return "list", {str(index): np.asarray(part) for index, part in enumerate(value)}
    if isinstance(value, dict) and all(isinstance(part, np.ndarray | np.generic) for part in value.values()):
        return "dict", {str(key): np.asarray(part) for key, part in value.items()}
    return None


def _restored(path: str, how: Mapping[str, Any], arrays: Arrays) -> object:
    if how["kind"] == "value":
        return how["value"]
    parts: dict[str, npt.NDArray[Any]] = {key: arrays[f"{path}/{key}"].copy() for key in how["keys"]}
    if how["kind"] == "record":
        return ArrayRecord({key: Array(part) for key, part in parts.items()})
    if how["kind"] == "array":
        return parts[""]
    return list(parts.values()) if how["kind"] == "list" else parts
