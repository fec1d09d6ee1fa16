"""Private copies of a network, which `torch.export` and `torch.func.functional_call` take."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from c2m3_fl.errors import ParamsError, TraceError

_PARALLEL = (nn.DataParallel, nn.parallel.DistributedDataParallel)


class Transparent(nn.Module):
    """A module in place of a wrapper: it calls the module that was wrapped, under the same name.

    Parameters
    ----------
    name : str
        The name under which the wrapper holds its module: "module" or "_orig_mod".
    held : nn.Module
        That module.
    """

    def __init__(self, name: str, held: nn.Module) -> None:
        super().__init__()
        self.add_module(name, held)
        self.training = held.training

    def forward(self, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401  # those of the wrapped module
        """Call the wrapped module."""
        (held,) = self.children()
        return held(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401  # as above
        try:
            return super().__getattr__(name)
        except AttributeError:
            for held in self.__dict__.get("_modules", {}).values():
                return getattr(held, name)
            raise


def private_copy(model: nn.Module, *, share: bool = False) -> nn.Module:
    """A copy of a network with the same state-dict names.

    `DataParallel`, `DistributedDataParallel` and compiled modules are replaced by the modules that they wrap. Sparse
    buffers and attributes become dense. Tensors that earlier calls left in modules (activations, the weights that
    `torch.nn.utils.weight_norm` and `torch.nn.utils.prune` compute) are detached.

    Parameters
    ----------
    model : nn.Module
        The network; not mutated.
    share : bool
        Whether the copy shares parameters and buffers with the network.

    Raises
    ------
    TraceError
        When the network holds an object that cannot be copied.
    ParamsError
        When its state dict holds sparse tensors.
    """
    for name, value in model.state_dict().items():
        if isinstance(value, Tensor) and value.layout != torch.strided:
            raise ParamsError(
                f"{name!r} is a sparse tensor ({value.layout}) of the state dict, expected a dense one: register it "
                "with persistent=False if it is a constant, or make it dense"
            )
    memo: dict[int, Any] = {}
    for module in model.modules():
        memo |= {id(left): left.detach().clone() for left in _tensors(vars(module)) if not left.is_leaf}
    if share:
        memo |= {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    try:
        for module in reversed(list(model.modules())):  # a wrapper may hold another one
            name = _held_name(module)
            if name:
                memo[id(module)] = Transparent(name, copy.deepcopy(module.get_submodule(name), memo))
        twin = copy.deepcopy(model, memo)
    except Exception as error:
        raise TraceError(
            f"{type(model).__name__} cannot be copied: {error}; a module may hold only objects that copy.deepcopy takes"
        ) from error
    for module in twin.modules():
        _densify(module)
    return twin


def without_wrapper(model: nn.Module) -> nn.Module:
    """A module that calls the module in a wrapper, with the wrapper's state-dict names.

    Wrappers are `DataParallel`, `DistributedDataParallel` and `torch.compile`.

    Parameters
    ----------
    model : nn.Module
        The network; returned unchanged if it is not a wrapper.
    """
    name = _held_name(model)
    return Transparent(name, model.get_submodule(name)) if name else model


def innermost(model: nn.Module) -> nn.Module:
    """The module that calls of a network reach: what `DataParallel` and `torch.compile` wrap, or the network itself."""
    if isinstance(model, Transparent):
        return innermost(next(model.children()))
    name = _held_name(model)
    return innermost(model.get_submodule(name)) if name else model


def in_precision(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Cast floating parameters and buffers to `dtype`, and complex ones to the complex type of that precision.

    Parameters
    ----------
    model : nn.Module
        The network; changed in place, and returned.
    dtype : torch.dtype
        A real type.
    """

    def cast(tensor: Tensor) -> Tensor:
        if tensor.is_complex():
            return tensor.to(dtype.to_complex())
        return tensor.to(dtype) if tensor.is_floating_point() else tensor

    model._apply(cast)  # type: ignore[no-untyped-call]  # torch leaves it untyped
    return model


def dense(value: Any) -> Any:  # noqa: ANN401  # arguments of a network may be anything
    """The same value; a sparse tensor as a dense one."""
    return value.to_dense() if isinstance(value, Tensor) and value.layout != torch.strided else value


def own_names(model: nn.Module, params: Any) -> Any:  # noqa: ANN401  # anything else is returned unchanged
    """Rename a state dict to the model's own names, if one of them is wrapped and the other is not.

    `DataParallel` and `torch.compile` add the parts "module" and "_orig_mod" to names. Everything else is returned
    unchanged.

    Parameters
    ----------
    model : nn.Module
        The network.
    params : mapping of str to Tensor
        A state dict.
    """
    own = list(model.state_dict())
    if not isinstance(params, Mapping) or params.keys() == set(own):
        return params
    given = {_without_wrappers(name): name for name in params}
    expected = {name: given.get(_without_wrappers(name)) for name in own}
    if not len(given) == len(params) == len(own) or set(expected.values()) != params.keys():
        return params
    return {name: params[source] for name, source in expected.items() if source is not None}


def _without_wrappers(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in ("module", "_orig_mod"))


def _held_name(module: nn.Module) -> str:
    """Name under which a wrapper holds its module; "" for every other module."""
    if isinstance(module, _PARALLEL):
        return "module"
    return "_orig_mod" if type(module).__name__ == "OptimizedModule" and "_orig_mod" in module._modules else ""


def _tensors(value: object) -> Iterator[Tensor]:
    """The tensors in nested dicts, lists and tuples."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for each in value.values():
            yield from _tensors(each)
    elif isinstance(value, (list, tuple)):
        for each in value:
            yield from _tensors(each)


def _densify(module: nn.Module) -> None:
    for held in (module._buffers, vars(module)):
        for name, value in held.items():
            if isinstance(value, Tensor):
                held[name] = dense(value)
