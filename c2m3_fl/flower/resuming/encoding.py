"""Values as JSON and arrays, and back: what checkpoints hold of strategies and random generators. Nothing is pickled.

Plain values are themselves. Anything else is a dict with its ``kind``. Generators, loaders, objects with a state dict
and objects of the user's own classes are not made anew: what is loaded is put into the one that is there already.
"""

from __future__ import annotations

import random
from collections import OrderedDict, deque
from collections.abc import Callable, Mapping
from enum import Enum
from typing import Any, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord
from torch import Tensor
from torch.utils.data import DataLoader

from c2m3_fl.errors import ConfigError
from c2m3_fl.flower.generators import Generator, set_state, state_of
from c2m3_fl.flower.rewind import CONSTANT, attributes_of, left_alone

Arrays = dict[str, npt.NDArray[Any]]
Node = Any  # of a JSON document

_TYPES = frozenset(
    ["bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64", "float16", "float32", "float64"]
)
_SEQUENCES: dict[str, Callable[..., Any]] = {
    "list": list, "tuple": tuple, "set": set, "frozenset": frozenset, "deque": deque
}  # fmt: skip
_MAPPINGS: dict[str, Callable[..., Any]] = {
    "dict": dict, "OrderedDict": OrderedDict, "MetricRecord": MetricRecord, "ConfigRecord": ConfigRecord
}  # fmt: skip
_GENERATORS: dict[str, Callable[[], Generator]] = {
    "Random": random.Random,
    "torch.Generator": torch.Generator,
    "RandomState": np.random.RandomState,
    "PCG64": lambda: np.random.Generator(np.random.PCG64()),
    "PCG64DXSM": lambda: np.random.Generator(np.random.PCG64DXSM()),
    "MT19937": lambda: np.random.Generator(np.random.MT19937()),
    "Philox": lambda: np.random.Generator(np.random.Philox()),
    "SFC64": lambda: np.random.Generator(np.random.SFC64()),
}
_DEPTH = 50  # of nested values; deeper ones are most likely cycles


@runtime_checkable
class Stateful(Protocol):
    """Strategies, modules, optimisers, accountants: whatever says itself what it must remember."""

    def state_dict(self) -> Mapping[str, Any]:
        """Everything it remembers."""

    def load_state_dict(self, state: Any) -> object:  # noqa: ANN401  # modules and optimisers take different things
        """Remember that instead."""


class UnsavableError(TypeError):
    """A value is of a type that checkpoints cannot hold."""


def encode(value: object, arrays: Arrays, depth: int = _DEPTH) -> Node:
    """A value as JSON; its arrays are added to `arrays`, under the names by which the JSON calls them.

    Raises
    ------
    UnsavableError
        For a type that is not known how to restore: functions, open files, data sets, cycles.
    """
    if value is None or type(value) in (bool, int, float, str):
        return value
    if depth == 0:
        raise UnsavableError("values nested too deep")
    if isinstance(value, Generator):
        return {"kind": _kind(value), "items": encode(state_of(value), arrays, depth - 1)}
    if isinstance(value, Enum):
        return {"kind": "enum", "class": type(value).__name__, "items": value.name}
    if isinstance(value, np.ndarray | np.generic | Tensor | bytes):
        return _array(value, arrays)
    if isinstance(value, ArrayRecord):
        return {"kind": "ArrayRecord", "items": {key: _array(each.numpy(), arrays) for key, each in value.items()}}
    name = type(value).__name__
    if name in _MAPPINGS and isinstance(value, Mapping):
        items = [[encode(part, arrays, depth - 1) for part in item] for item in value.items()]
        return {"kind": name, "items": items}
    if isinstance(value, dict):
        return {"kind": "filled", "class": name, "items": encode(dict(value), arrays, depth - 1)}
    if type(value) in _SEQUENCES.values() and isinstance(value, list | tuple | set | frozenset | deque):
        limit = {"maxlen": value.maxlen} if isinstance(value, deque) and value.maxlen is not None else {}
        return {"kind": name, "items": [encode(each, arrays, depth - 1) for each in value], **limit}
    if isinstance(value, DataLoader):
        return {"kind": "object", "class": name, "items": encode(_generators(value), arrays, depth - 1)}
    if isinstance(value, Stateful):
        return {"kind": "stateful", "class": name, "items": encode(value.state_dict(), arrays, depth - 1)}
    if left_alone(value) or not attributes_of(value):
        raise UnsavableError(f"type {name}")
    own = {key: each for key, each in attributes_of(value).items() if not isinstance(each, CONSTANT)}
    return {"kind": "object", "class": name, "items": encode(own, arrays, depth - 1)}


def decode(node: Node, arrays: Mapping[str, npt.NDArray[Any]], there: object = None, where: str = "") -> Any:  # noqa: ANN401  # any
    """The value that `encode` got.

    Parameters
    ----------
    node : JSON
        What `encode` returned.
    arrays : mapping of str to ndarray
        What it filled.
    there : object
        The value that stands in its place now: an object that is not made anew takes the state.
    where : str
        What is restored, for messages.

    Raises
    ------
    ConfigError
        When an object that should take a state is not there.
    """
    if not isinstance(node, dict):
        return node
    kind: str = node["kind"]
    items: Any = node.get("items")
    if kind in _GENERATORS:
        own = there if isinstance(there, Generator) and _kind(there) == kind else _GENERATORS[kind]()
        set_state(own, decode(items, arrays))
        return own
    if kind in ("array", "scalar", "tensor", "bytes"):
        return _unpacked(kind, node, arrays, there)
    if kind == "ArrayRecord":
        return ArrayRecord({key: Array(arrays[each["key"]].copy()) for key, each in items.items()})
    if kind in _MAPPINGS:
        pairs = [(decode(key, arrays), value) for key, value in items]
        known: Mapping[Any, Any] = there if isinstance(there, Mapping) else {}
        return _MAPPINGS[kind](
            {key: decode(value, arrays, known.get(key), f"{where}[{key!r}]") for key, value in pairs}
        )
    if kind in _SEQUENCES:
        olds = list(there) if isinstance(there, list | tuple | deque) else []
        olds += [None] * (len(items) - len(olds))
        parts = [decode(each, arrays, old, f"{where}[]") for each, old in zip(items, olds, strict=False)]
        return deque(parts, node.get("maxlen")) if kind == "deque" else _SEQUENCES[kind](parts)
    if type(there).__name__ != node["class"]:
        raise ConfigError(
            f"the checkpoint holds the state of {where}, a {node['class']}, but there is {there!r}: create it in the "
            "constructor of the strategy, so that it can take its state back"
        )
    return _filled(kind, node, arrays, there, where)


def _kind(generator: Generator) -> str:
    if isinstance(generator, torch.Generator):
        return "torch.Generator"
    owner = generator.bit_generator if isinstance(generator, np.random.Generator) else generator
    return type(owner).__name__


def _filled(kind: str, node: Node, arrays: Mapping[str, npt.NDArray[Any]], there: Any, where: str) -> object:  # noqa: ANN401  # any
    """The object that is there, with the state that was saved."""
    if kind == "enum":
        return type(there)[node["items"]]
    if kind == "stateful":
        there.load_state_dict(decode(node["items"], arrays))
    elif kind == "filled":  # a dict of a class of its own, such as a defaultdict
        content = decode(node["items"], arrays, there, where)
        there.clear()
        there.update(content)
    elif isinstance(there, DataLoader):
        decode(node["items"], arrays, _generators(there), where)
    else:
        for name, value in decode(node["items"], arrays, attributes_of(there), where).items():
            object.__setattr__(there, name, value)
    return there


def _array(value: npt.NDArray[Any] | np.generic | Tensor | bytes, arrays: Arrays) -> Node:
    kind, extra = ("array" if isinstance(value, np.ndarray) else "scalar"), {}
    if isinstance(value, bytes):
        kind, found = "bytes", np.frombuffer(value, dtype=np.uint8)
    elif isinstance(value, Tensor):
        kind = "tensor"
        if value.layout != torch.strided or value.is_quantized:
            raise UnsavableError(f"a tensor of layout {value.layout}")
        held = value.detach().cpu()
        if held.dtype == torch.bfloat16:  # which NumPy does not have
            held, extra = held.view(torch.int16), {"dtype": "bfloat16"}
        found = held.numpy() if not held.is_complex() else np.empty(0, dtype=complex)
    else:
        found = np.asarray(value)
    if found.dtype.name not in _TYPES or not found.dtype.isnative:
        raise UnsavableError(f"an array of type {found.dtype}")
    key = str(len(arrays))
    arrays[key] = found
    return {"kind": kind, "key": key, **extra}


def _unpacked(kind: str, node: Node, arrays: Mapping[str, npt.NDArray[Any]], there: object) -> object:
    found = arrays[node["key"]].copy()
    if kind == "array":
        return found
    if kind == "scalar":
        return found[()]
    if kind == "bytes":
        return found.tobytes()
    tensor = torch.from_numpy(found)
    if node.get("dtype") == "bfloat16":
        tensor = tensor.view(torch.bfloat16)
    if isinstance(there, Tensor) and (there.shape, there.dtype) == (tensor.shape, tensor.dtype):
        there.data.copy_(tensor)  # it may be a parameter, shared, or on another device
        return there
    return tensor


def _generators(loader: DataLoader[Any]) -> list[Any]:
    """The generators that a loader draws from, where they are its own."""
    batches = getattr(loader, "batch_sampler", None)
    owners = (loader, getattr(loader, "sampler", None), getattr(batches, "sampler", None))
    return [getattr(owner, "generator", None) for owner in owners]
