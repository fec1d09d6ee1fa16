"""How a network is called: with which constant arguments, and which of its outputs the caller reads."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from functools import wraps
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from c2m3_fl.errors import ConfigError
from c2m3_fl.network.copying import without_wrapper

Outputs = str | int | Sequence[str | int]


def as_called(
    model: nn.Module, *, outputs: Outputs | None = None, constants: Mapping[str, Any] | None = None
) -> nn.Module:
    """The network with a forward pass that returns tensors alone: one, or a tuple of several.

    Caches, numbers and other objects among the outputs are left out.

    Parameters
    ----------
    model : nn.Module
        The network; not mutated. The result shares its modules and tensors, and has the same state-dict names.
    outputs : str, int or sequence of them, optional
        Keys of a dict, fields of a dataclass, or places in a tuple, of the outputs that the caller reads; by default
        all of them.
    constants : mapping, optional
        Keyword arguments that every call passes, unless it is called with others.

    Raises
    ------
    ConfigError
        When `outputs` is of another type, or cannot be chosen; in a call of the result, when there is no such output.
    """
    chosen = None if outputs is None else _chosen(outputs)
    always = dict(constants or {})
    if isinstance(model, torch.jit.ScriptModule):
        return model  # torch.export refuses it
    model = without_wrapper(model)
    twin = copy.copy(model)
    base = type(twin)
    if (chosen is not None or always) and hasattr(base, "__deepcopy__"):  # a copy would lose its class
        raise ConfigError(
            f"outputs and constant inputs cannot be chosen for a {base.__name__}: wrap it in a module whose forward "
            "pass takes tensors and returns the outputs that are read"
        )
    own = vars(twin).pop("forward", None)  # a forward pass that was assigned to the instance
    if isinstance(own, MethodType) and own.__self__ is model:
        own = own.__func__.__get__(twin)

    kept = f"_forward_{len(base.__mro__)}"

    @wraps(base.forward if own is None else own)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Tensor | tuple[Tensor, ...]:  # noqa: ANN401  # as above
        kwargs = {**always, **kwargs}
        found = base.forward(self, *args, **kwargs) if own is None else vars(self)[kept](*args, **kwargs)
        tensors = tuple(tensors_in(found if chosen is None else [_pick(found, each) for each in chosen]))
        return tensors[0] if len(tensors) == 1 else tensors

    vars(twin)[kept] = own  # an attribute, so that a copy of the network has a copy of it
    twin.__class__ = type(base.__name__, (base,), {"forward": forward, "__module__": base.__module__})
    return twin


def choose_outputs(model: nn.Module, outputs: Outputs | None) -> nn.Module:
    """The network itself if `outputs` is None, otherwise the network with only these outputs: see `as_called`."""
    return model if outputs is None else as_called(model, outputs=outputs)


def tensors_in(found: object) -> Iterator[Tensor]:
    """The tensors in nested dicts, dataclasses, lists and tuples, in order."""
    if isinstance(found, Tensor):
        yield found
    elif isinstance(found, Mapping):
        for each in found.values():
            yield from tensors_in(each)
    elif isinstance(found, list | tuple):
        for each in found:
            yield from tensors_in(each)
    elif dataclasses.is_dataclass(found) and not isinstance(found, type):
        for field in dataclasses.fields(found):
            yield from tensors_in(getattr(found, field.name))


def _chosen(outputs: Outputs) -> tuple[str | int, ...]:
    names = tuple(outputs) if isinstance(outputs, list | tuple) else (outputs,)
    if not names or not all(type(each) in (str, int) for each in names):
        raise ConfigError(f"outputs is {outputs!r}, expected the name or the place of an output, or several of them")
    return names


def _pick(found: Any, name: str | int) -> Any:  # noqa: ANN401  # a network may return anything
    """One output of a network."""
    place = int(name) if isinstance(name, int) or name.isdecimal() else None
    names: Sequence[str]
    if isinstance(found, Tensor):
        names, values = [], [found]
    elif isinstance(found, Mapping):
        names, values = list(map(str, found)), list(found.values())
    elif dataclasses.is_dataclass(found):
        names = [field.name for field in dataclasses.fields(found)]
        values = [getattr(found, each) for each in names]
    else:
        names, values = getattr(found, "_fields", ()), list(found) if isinstance(found, list | tuple) else []
    if name in names:
        picked = values[names.index(str(name))]
    elif place is not None and -len(values) <= place < len(values):
        picked = values[place]
    else:
        count = "one output" if len(values) == 1 else f"{len(values)} outputs"
        raise ConfigError(f"the network has no output {name!r}; it returns {list(names) or count}")
    if next(tensors_in(picked), None) is None:
        raise ConfigError(f"the network's output {name!r} is a {type(picked).__name__}, which holds no tensor")
    return picked
