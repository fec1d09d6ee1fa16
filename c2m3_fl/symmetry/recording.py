"""Record the ATen operators of one run of a network, in double precision throughout.

Casts to narrower types, which networks make for speed (normalisation in single precision, attention in half), would
leave rounding errors that hide wrong permutations. Inside a `Recorder` every floating type is double precision, and
dropout keeps everything. The tape can be replayed with other parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

Value = Any  # tensors, numbers, types, or lists of them


@dataclass(frozen=True)
class Ref:
    """A tensor on a tape, by its number."""

    number: int


@dataclass(frozen=True)
class Operation:
    """One operator of a tape.

    Attributes
    ----------
    name : str
        Name of the operator: ``"aten::add"``.
    function : callable
        What computes it.
    args, kwargs : tuple, dict
        Its arguments, tensors replaced by `Ref`.
    outputs : tuple of int
        Numbers of the tensors that it returns.
    written : tuple of int
        Numbers of the tensors that it writes to.
    fresh : bool
        Whether its outputs share no memory with its arguments.
    unshared : bool
        Whether no other tensor shares memory with those that it writes to.
    """

    name: str
    function: Callable[..., Any]
    args: tuple[Value, ...]
    kwargs: dict[str, Value]
    outputs: tuple[int, ...]
    written: tuple[int, ...]
    fresh: bool
    unshared: bool


@dataclass
class Tape:
    """The operators of a run in order, the numbers of named tensors, and the tensors that nobody named."""

    operations: list[Operation] = field(default_factory=list)
    names: dict[str, int] = field(default_factory=dict)
    constants: dict[int, Tensor] = field(default_factory=dict)
    single: bool = False  # whether an operator had to run in single precision


def replace_tensors(value: Value, change: Callable[[Any], Any], kind: type | tuple[type, ...] = Tensor) -> Value:
    """The same arguments with everything of a type changed, also inside lists."""
    if isinstance(value, kind):
        return change(value)
    if isinstance(value, list | tuple):
        return [replace_tensors(one, change, kind) for one in value]
    return value


class Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch leaves it untyped
    """Within this mode, networks compute in double precision and their operators are recorded in `tape`.

    Parameters
    ----------
    known : mapping of str to Tensor
        Names of tensors: parameters, buffers, inputs.
    device : str
        ``"meta"`` to record shapes without content.
    """

    supports_higher_order_operators = True

    def __init__(self, known: Mapping[str, Tensor], device: str = "cpu") -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # as above
        self.tape = Tape()
        self._device = torch.device(device)
        self._numbers: dict[int, int] = {}
        self._held: list[Tensor] = []  # while a tensor is held, no other one gets its identity or its memory
        self._sharing: dict[int, list[int]] = {}
        self._wide: dict[int, Tensor] = {}
        for name, tensor in known.items():
            self.tape.names[name] = self._numbers.get(id(tensor), -1)
            if self.tape.names[name] < 0:
                self.tape.names[name] = self._add(tensor)

    def __torch_dispatch__(
        self,
        func: Any,  # noqa: ANN401  # as torch calls it
        types: Any,  # noqa: ANN401  # as above
        args: tuple[Value, ...] = (),
        kwargs: dict[str, Value] | None = None,
    ) -> Any:  # noqa: ANN401  # an operator takes and returns anything
        if isinstance(func, torch._ops.HigherOrderOperator):
            return self._both_branches(*args) if func is torch.ops.higher_order.cond else NotImplemented
        kept = func is torch.ops.aten.view.dtype  # reinterprets bits: its type is no precision
        args = tuple(args if kept else self._widen(args))
        kwargs = {key: self._widen(value) for key, value in (kwargs or {}).items()}
        name, fresh, writes = _kind(func)
        function = _SUBSTITUTES.get(name, func)
        try:
            found = function(*args, **kwargs)
        except (RuntimeError, NotImplementedError):
            function = _Single(func)
            if writes:
                raise
            try:
                found = function(*args, **kwargs)
            except Exception:  # the first error is the true one
                function = None
            if function is None:
                raise
            self.tape.single = True
        self._record(name, function, args, kwargs, found, fresh, writes)
        return found

    def _both_branches(
        self, condition: Value, yes: Callable[..., Value], no: Callable[..., Value], operands: Sequence[Value]
    ) -> Value:
        """Both branches of `torch.cond`, so that the parameters of the one that is not taken are seen as well."""
        with self:
            chosen = torch.as_tensor(condition)
            return pytree.tree_map(lambda *pair: torch.where(chosen, *pair), yes(*operands), no(*operands))

    def ref(self, tensor: Tensor) -> Ref:
        """The number of a tensor; one that is not known yet becomes a constant, or a view of a known one."""
        number = self._numbers.get(id(tensor))
        if number is not None:
            return Ref(number)
        sharing = self._sharing.get(_memory(tensor), [])
        number = self._add(tensor)
        if sharing:  # as `tensor.data` of a parameter: made without an operator
            view = (Ref(sharing[0]), list(tensor.size()), list(tensor.stride()), tensor.storage_offset())
            function = torch.ops.aten.as_strided.default
            self.tape.operations.append(Operation("aten::as_strided", function, view, {}, (number,), (), False, False))
        else:
            self.tape.constants[number] = tensor.detach().clone()
        return Ref(number)

    def _add(self, tensor: Tensor) -> int:
        number = len(self._held)
        self._held.append(tensor)
        self._numbers[id(tensor)] = number
        if memory := _memory(tensor):
            self._sharing.setdefault(memory, []).append(number)
        return number

    def _widen(self, value: Value) -> Value:
        if isinstance(value, torch.dtype):
            return _WIDE.get(value, value)
        return replace_tensors(value, self._wide_tensor)

    def _wide_tensor(self, tensor: Tensor) -> Tensor:
        device = tensor.device if tensor.device == self._device else self._device
        dtype = _WIDE.get(tensor.dtype, tensor.dtype)
        if dtype == tensor.dtype and device == tensor.device:
            return tensor
        if id(tensor) not in self._wide:
            wide = tensor.detach().to(device, dtype)
            if id(tensor) in self._numbers:
                operation = torch.ops.aten._to_copy.default
                self._record("aten::_to_copy", operation, (tensor,), {"dtype": dtype}, wide, True, ())
            self._held.append(tensor)
            self._wide[id(tensor)] = wide
        return self._wide[id(tensor)]

    def _record(
        self,
        name: str,
        function: Callable[..., Any],
        args: tuple[Value, ...],
        kwargs: dict[str, Value],
        found: object,
        fresh: bool,
        writes: tuple[int | str, ...],
    ) -> None:
        outputs: list[Tensor] = []
        replace_tensors(found, outputs.append)
        targets = [
            args[place] if isinstance(place, int) and place < len(args) else kwargs.get(str(place)) for place in writes
        ]
        written = [self.ref(one).number for one in targets if isinstance(one, Tensor)]
        shared = any(len(self._sharing.get(_memory(self._held[number]), [])) > 1 for number in written)
        refs = tuple(replace_tensors(args, self.ref)), {key: replace_tensors(x, self.ref) for key, x in kwargs.items()}
        numbers = tuple(self._numbers[id(one)] if id(one) in self._numbers else self._add(one) for one in outputs)
        self.tape.operations.append(Operation(name, function, *refs, numbers, tuple(written), fresh, not shared))


_NARROW = (torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2)
_WIDE = {**dict.fromkeys(_NARROW, torch.float64), torch.complex64: torch.complex128, torch.complex32: torch.complex128}


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr() if tensor.layout == torch.strided and tensor.device.type == "cpu" else 0


@cache
def _kind(func: Any) -> tuple[str, bool, tuple[int | str, ...]]:  # noqa: ANN401  # an operator of any library
    """Name of an operator, whether it returns new memory, and the arguments that it writes to."""
    schema = func._schema
    fresh = all(one.alias_info is None for one in schema.returns)
    # The schema of batch normalisation does not say that it writes to its statistics.
    writes: list[int | str] = [3, 4] if schema.name == "aten::native_batch_norm" else []
    for place, one in enumerate(schema.arguments):
        if one.alias_info is not None and one.alias_info.is_write:
            writes.append(one.name if one.kwarg_only else place)
    return schema.name, fresh, tuple(writes)


class _Single:
    """An operator that has no kernel for double precision, run in single precision."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function

    def __call__(self, *args: Value, **kwargs: Value) -> Any:  # noqa: ANN401  # whatever the operator returns
        def narrow(value: Any) -> Any:  # noqa: ANN401  # a tensor or a type
            if isinstance(value, torch.dtype):
                return torch.float32 if value == torch.float64 else value
            return value.float() if value.dtype == torch.float64 else value

        kinds = (Tensor, torch.dtype)
        changed = {key: replace_tensors(value, narrow, kinds) for key, value in kwargs.items()}
        found = self.function(*replace_tensors(args, narrow, kinds), **changed)
        return replace_tensors(found, lambda value: value.double() if value.is_floating_point() else value)


def _keep_all(x: Tensor, *_: Value) -> tuple[Tensor, Tensor]:
    return x.clone(), torch.ones_like(x, dtype=torch.bool)


def _fill(x: Tensor, p: Value = 0.5, **_: Value) -> Tensor:
    return x.copy_(p) if isinstance(p, Tensor) else x.fill_(p)


def _half_like(x: Tensor, *_: Value, generator: Value = None, **options: Any) -> Tensor:  # noqa: ANN401  # its options
    return torch.full_like(x, 0.5, **options)


def _half(size: Sequence[int], *_: Value, generator: Value = None, **options: Any) -> Tensor:  # noqa: ANN401  # as above
    return torch.full(size, 0.5, **options)


def _grouped(x: Tensor, weight: Tensor, ends: Tensor | None = None, *rest: Value, **options: Value) -> Tensor:
    """Runs of rows against one matrix each, in any precision; the operator itself has no double one."""
    if ends is None or (x.ndim, weight.ndim) != (2, 3) or rest or any(each is not None for each in options.values()):
        raise NotImplementedError("only rows in runs against a stack of matrices")
    starts, stops = [0, *ends.tolist()[:-1]], ends.tolist()
    runs = [x[start:stop] @ each for start, stop, each in zip(starts, stops, weight, strict=True)]
    return torch.cat([*runs, x.new_zeros(len(x) - stops[-1], weight.shape[2])])


# Random numbers are drawn without regard to units: the same for every entry, they leave what can be compared.
_SUBSTITUTES: dict[str, Callable[..., Any]] = {
    "aten::_grouped_mm": _grouped,
    "aten::native_dropout": _keep_all,
    "aten::bernoulli_": _fill,
    "aten::randn_like": _half_like,
    "aten::rand_like": _half_like,
    "aten::randn": _half,
    "aten::rand": _half,
}
