"""A stand-in for a GPU on machines without one: tensors of another device, whose values are kept on the CPU.

Under `standin()` tensors may be made on, or moved to, a device of their own. As on a GPU, operators refuse tensors of
two devices (apart from scalars, copies, and indices on the CPU), and such a tensor has no `.numpy()`. So code that
makes a tensor on the wrong device fails here as it would there. Arithmetic that differs on a GPU does not show.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

DEVICE = torch.device("privateuseone", 0)

_aten = torch.ops.aten
_COPIES = {_aten.copy_.default, _aten._to_copy.default}
_INDEXED = {_aten.index.Tensor, _aten.index_put.default, _aten.index_put_.default, _aten._index_put_impl_.default}


class Elsewhere(Tensor):
    """A tensor of the stand-in device."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> Elsewhere:
        made: Elsewhere = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]  # not in torch's stubs
            cls,
            held.shape,
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=DEVICE,
            requires_grad=held.requires_grad,
        )
        made.held = held
        return made

    def __repr__(self) -> str:
        return f"Elsewhere({self.held!r})"

    def untyped_storage(self) -> torch.UntypedStorage:
        return self.held.untyped_storage()

    def tolist(self) -> Any:
        return self.held.tolist()

    def numpy(self, *, force: bool = False) -> Any:
        raise TypeError(f"can't convert {self.device} device type tensor to numpy. Use Tensor.cpu() first")

    def __deepcopy__(self, memo: dict[int, Any]) -> Elsewhere:
        made = self.detach().clone().requires_grad_(self.requires_grad)
        if isinstance(self, nn.Parameter):
            made._is_param = True  # what makes it one
        return memo.setdefault(id(self), made)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class _Factories(TorchDispatchMode):
    """Sends what is made on the stand-in device there."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


_tensor = torch.tensor  # no mode sees what it makes inside of other functions


def _made(*args: Any, device: Any = None, **kwargs: Any) -> Tensor:
    if device is not None and torch.device(device).type == DEVICE.type:
        return _tensor(*args, **kwargs).to(device)
    return _tensor(*args, device=device, **kwargs)


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    leaves, spec = tree_flatten((args, kwargs))
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    ours = [leaf for leaf in tensors if isinstance(leaf, Elsewhere)]
    device = kwargs.get("device")
    if ours and func not in _COPIES:
        _check(func, args, tensors)
    there = torch.device(device) if device is not None else None
    if there is not None and there.type == DEVICE.type:
        kwargs = {**kwargs, "device": torch.device("cpu")}
        leaves, spec = tree_flatten((args, kwargs))
    plain = [leaf.held if isinstance(leaf, Elsewhere) else leaf for leaf in leaves]
    inner_args, inner_kwargs = tree_unflatten(plain, spec)
    found = func(*inner_args, **inner_kwargs)
    if func is _aten._local_scalar_dense.default:
        return found
    if func is _aten._to_copy.default or there is not None:
        wraps = there.type == DEVICE.type if there is not None else bool(ours)
    elif func is _aten.copy_.default:
        wraps = isinstance(args[0], Elsewhere)
    else:
        wraps = bool(ours)
    if "out" in kwargs:
        return kwargs["out"]
    if func._schema.is_mutable:
        return args[0]
    if not wraps:
        return found
    same = {id(leaf.held): leaf for leaf in ours}

    def wrap(value: Any) -> Any:
        return same.get(id(value)) or Elsewhere(value) if isinstance(value, Tensor) else value

    return tree_map(wrap, found)


def _check(func: Any, args: Any, tensors: list[Tensor]) -> None:
    """Refuse tensors of two devices, as operators of a GPU do."""
    if func in _INDEXED and isinstance(args[0], Elsewhere):
        tensors = [args[0], *args[2:3]] if len(args) > 2 else [args[0]]
        tensors = [each for each in tensors if isinstance(each, Tensor)]
    mixed = [each for each in tensors if not isinstance(each, Elsewhere) and each.ndim > 0]
    if mixed:
        raise RuntimeError(
            f"Expected all tensors to be on the same device, but {func} got {[str(each.device) for each in tensors]}"
        )


@functools.cache
def _register() -> None:
    _setup_privateuseone_for_python_backend()
    module: Any = getattr(torch, DEVICE.type)
    module.is_available = lambda: False  # `DataParallel` takes any device that there is, and what is registered stays


@contextlib.contextmanager
def standin() -> Iterator[torch.device]:
    """Context in which the stand-in device can be used."""
    _register()
    with _Factories(), mock.patch.object(torch, "tensor", _made):
        yield DEVICE
