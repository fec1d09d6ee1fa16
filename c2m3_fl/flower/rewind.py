"""The state of wrapped strategies before a round, to take them back to it where the round fails."""

from __future__ import annotations

from collections import UserDict, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import Enum
from functools import partial
from io import IOBase
from logging import DEBUG
from pathlib import PurePath
from threading import Lock, RLock
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.supercore import log
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from c2m3_fl.errors import ParamsError
from c2m3_fl.flower.generators import Generator, set_state, state_of
from c2m3_fl.flower.wrapped import LARGEST, chain

_LOCKS = (type(Lock()), type(RLock()))
_CODE = (ModuleType, type, FunctionType, BuiltinFunctionType, MethodType, partial)
_RESOURCES = (Grid, Dataset, IOBase, PurePath)  # data and connections, which are no state
CONSTANT = (*_CODE, *_RESOURCES)
_LEFT_ALONE = (*CONSTANT, DataLoader, Enum, str, bytes, int, complex, type(None))
_MAPPINGS = (dict, UserDict, ArrayRecord, MetricRecord, ConfigRecord, RecordDict)
_SEQUENCES = (list, tuple, deque, set, frozenset)
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_LEAVES = np.ndarray | Tensor | Array


class Before:
    """What a strategy, current or legacy, and those that it wraps held before a round.

    Arrays, tensors, records, containers, random generators and the attributes of objects, however deep, are restored
    in place: whoever shares them sees the restored content, too. Data sets, loaders, grids, files and objects that
    hold a lock are left alone.

    Parameters
    ----------
    strategy : Strategy
        The outermost wrapped strategy.
    """

    def __init__(self, strategy: object) -> None:
        self._strategies = tuple(chain(strategy))
        self._finite: dict[str, bool] = {}
        self._restore: list[Callable[[], object]] = []
        for path, value in _walk(self._strategies):
            found = _finite(value)
            if found is not None:
                self._finite[path] = found
            try:
                restore = _restoring(value)
            except Exception as error:  # objects of any kind, which must not end the run
                log(DEBUG, "%s is not taken back after a failed round: %s", path, error)
                continue
            if restore is not None:
                self._restore.append(restore)

    def rewind(self) -> None:
        """Take the strategies back."""
        for restore in self._restore:
            restore()

    def check(self) -> None:
        """Raise `ParamsError` where an array, or a number that was none before, is NaN or beyond `LARGEST` now.

        The square of a huge reply in a second moment, say: the result is finite, and freezes every round that follows.
        What was such a value before the round is the strategy's own choice.
        """
        for path, value in _walk(self._strategies):
            number = isinstance(value, float | np.floating)
            if _finite(value) is False and self._finite.get(path, not number):
                raise ParamsError(f"the wrapped strategy's state {path} holds NaN, or values whose squares overflow")


@contextmanager
def taken_back_on_failure(strategy: object) -> Iterator[None]:
    """Where the block raises, or leaves a state that cannot be used, take a strategy back and raise.

    Parameters
    ----------
    strategy : Strategy
        The outermost wrapped strategy.
    """
    before = Before(strategy)
    try:
        yield
        before.check()
    except Exception:
        before.rewind()
        raise


def _walk(strategies: tuple[object, ...]) -> Iterator[tuple[str, Any]]:
    """Numbers, arrays, containers and objects, every object once, with the expressions that reach them."""
    stack: list[tuple[str, Any]] = [(type(each).__name__, each) for each in reversed(strategies)]
    seen: set[int] = set()
    while stack:
        path, value = stack.pop()
        if isinstance(value, float | np.floating):
            yield path, value
        elif not left_alone(value) and id(value) not in seen:
            seen.add(id(value))
            yield path, value
            stack += _children(path, value)


def left_alone(value: object) -> bool:
    """Whether a value is code, plain, data, a connection, or shared with threads: it holds a lock."""
    return isinstance(value, _LEFT_ALONE) or any(isinstance(each, _LOCKS) for each in attributes_of(value).values())


def _children(path: str, value: object) -> list[tuple[str, Any]]:
    if isinstance(value, _LEAVES | Generator):
        return []
    if isinstance(value, _MAPPINGS):
        return [(f"{path}[{key!r}]", each) for key, each in value.items()]
    if isinstance(value, _SEQUENCES):
        return [(f"{path}[{index}]", each) for index, each in enumerate(value)]
    return [(f"{path}.{name}", each) for name, each in attributes_of(value).items()]


def attributes_of(value: object) -> dict[str, Any]:
    """The attributes of an object, in its ``__dict__`` and in its slots."""
    found = dict(getattr(value, "__dict__", {}))
    for kind in type(value).__mro__:
        slots = kind.__dict__.get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            if name not in ("__dict__", "__weakref__") and hasattr(value, name):
                found[name] = getattr(value, name)
    return found


def _finite(value: object) -> bool | None:
    """Whether no element is NaN or beyond `LARGEST`; None for what holds no floats, or cannot be compared."""
    try:
        return _in_range(value)
    except Exception:  # a tensor or an array of a class of its own, which must not end the run
        return None


def _in_range(value: object) -> bool | None:
    if isinstance(value, Array):
        value = value.numpy()
    if isinstance(value, Tensor):
        if value.layout != torch.strided or value.is_meta or value.dtype not in _FLOATS:
            return None
        low, high = torch.aminmax(value.detach()) if value.numel() else (0.0, 0.0)
    elif isinstance(value, float | np.floating | np.ndarray):
        array = np.asarray(value)
        if array.dtype.kind != "f":
            return None
        low, high = (array.min(), array.max()) if array.size else (0.0, 0.0)
    else:
        return None
    return float(low) >= -LARGEST and float(high) <= LARGEST  # which NaN is not


def _restoring(value: object) -> Callable[[], object] | None:
    """A function that gives an object the content of now, as often as it is called; None for what cannot change."""
    if isinstance(value, np.ndarray):
        return partial(np.copyto, value, value.copy()) if value.flags.writeable else None
    if isinstance(value, Tensor):
        return partial(value.data.copy_, value.detach().clone())
    if isinstance(value, Generator):
        return partial(set_state, value, state_of(value))
    if isinstance(value, _MAPPINGS):
        return partial(_refill, value.clear, value.update, dict(value))
    if isinstance(value, list | deque):
        return partial(_refill, value.clear, value.extend, list(value))
    if isinstance(value, set):
        return partial(_refill, value.clear, value.update, set(value))
    if isinstance(value, float | np.floating | tuple | frozenset):
        return None
    return partial(_reset, value, attributes_of(value))


def _refill(clear: Callable[[], None], fill: Callable[..., None], content: object) -> None:
    clear()
    fill(content)


def _reset(value: object, attributes: dict[str, Any]) -> None:
    for name in attributes_of(value).keys() - attributes.keys():
        object.__delattr__(value, name)
    for name, each in attributes.items():
        object.__setattr__(value, name, each)
