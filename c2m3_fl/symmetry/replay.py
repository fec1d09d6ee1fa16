"""Replay a recorded run with other parameters, so that a wrong permutation shows wherever it first makes a difference.

The outputs alone may hide one: a branch may be scaled by almost nothing, a signal may fade over many layers. Therefore

- parameters and results of operators that are very small or very large are rescaled as whole tensors. A permutation of
  units does not change the size of a tensor, so a right one passes, and no signal fades;
- results may also be turned, each by the same sign as a whole: what is always positive hides a slope for negatives;
- a *print* of every result is compared as well: the mean of a bounded function of its entries, whatever their order.
  Units in another order leave it unchanged. Results of the same operator and shape share one print, so that units may
  also move between them; so do parts that are cut from tensors of one shape.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from c2m3_fl.core.spec import Params
from c2m3_fl.symmetry.recording import Operation, Ref, Tape, Value, replace_tensors

_SMALL, _LARGE, _TARGET = 0.02, 10.0, 0.2  # root mean squares between the first two stay as they are
_FINE, _COARSE = 1e-3, 1e3  # the same for parameters
_MASK = 1e4  # larger entries are masks of attention, no part of the size
_CANCELLED = 1e-10  # a result that much smaller than its operands is rounding
_UNSTABLE = ("linalg", "lu_", "svd", "qr", "eig", "cholesky", "cumsum", "cumprod", "logcumsumexp", "sort", "empty")

Prints = dict[tuple[str, tuple[int, ...]], float]


@dataclass(frozen=True)
class Replayed:
    """What a replay computed.

    Attributes
    ----------
    outputs : list of Tensor
        The outputs of the run, rescaled.
    prints : dict
        The print of all results of one operator and shape.
    gradients : mapping of str to Tensor
        Gradients of a random combination of all prints and outputs by the parameters that influence it.
    """

    outputs: list[Tensor]
    prints: Prints
    gradients: Mapping[str, Tensor]


def replay(
    tape: Tape,
    outputs: list[int],
    params: Params,
    *,
    gradients: bool = False,
    rescale: bool = True,
    signs: int | None = None,
) -> Replayed:
    """Run the operators of a tape.

    Parameters
    ----------
    tape : Tape
        The recorded run.
    outputs : list of int
        Numbers of its outputs.
    params : mapping of str to Tensor
        Parameters and buffers in double precision, by the names on the tape.
    gradients : bool
        Whether to compute gradients.
    rescale : bool
        Whether to rescale small and large tensors.
    signs : int, optional
        Seed of the signs by which results are turned; by default none is.
    """
    with torch.random.fork_rng(devices=[]), torch.set_grad_enabled(gradients):
        torch.manual_seed(0)
        return _Replay(tape, params, gradients, rescale, signs).run(outputs)


class _Replay:
    def __init__(self, tape: Tape, params: Params, gradients: bool, rescale: bool, signs: int | None) -> None:
        self.signs = None if signs is None else torch.Generator().manual_seed(signs)
        self.tape, self.rescale, self.gradients = tape, rescale, gradients
        self.generator = torch.Generator().manual_seed(1)
        self.values: dict[int, Tensor] = {}
        self.roots: dict[int, int] = {}  # of a view: the value whose memory it shares
        self.wholes: dict[int, torch.Size] = {}  # of a part: the shape of the tensor that it is cut from
        self.sizes: dict[int, float] = {}  # root mean squares, by root, of all values that depend on parameters
        self.pools: dict[tuple[str, tuple[int, ...]], list[float]] = {}
        self.total = torch.zeros((), dtype=torch.float64)
        self.leaves: dict[str, Tensor] = {}
        self.rounded = {number for operation in tape.operations if _rounds(operation) for number in _numbers(operation)}
        written = {number for operation in tape.operations for number in operation.written}
        for number, value in tape.constants.items():
            self.values[number] = value.clone() if number in written else value
        for name, number in tape.names.items():
            if number not in self.values:
                self._hold(name, number, params[name], number in written)

    def _hold(self, name: str, number: int, value: Tensor, written: bool) -> None:
        if value.is_floating_point():
            if self.gradients:
                value = self.leaves[name] = value.detach().requires_grad_()
            size = _size(value)
            if self.rescale and not written and size > 0 and not _FINE <= size <= _COARSE:
                value, size = value * (_TARGET / size), _TARGET
            self.sizes[number] = size
        self.values[number] = value.clone() if written else value

    def run(self, outputs: list[int]) -> Replayed:
        last = {number: len(self.tape.operations) for number in outputs}
        for place, operation in reversed([*enumerate(self.tape.operations)]):
            for number in (*_numbers(operation), *operation.outputs):
                last.setdefault(number, place)
        ends: dict[int, list[int]] = {}
        for number, place in last.items():
            ends.setdefault(place, []).append(number)
        for place, operation in enumerate(self.tape.operations):
            self._step(operation)
            for number in ends.get(place, ()):
                del self.values[number]
        found = [self.values[number] for number in outputs]
        gradients: dict[str, Tensor] = {}
        if self.gradients:
            for value in found:
                if value.is_floating_point() and value.requires_grad:
                    weights = torch.randn(value.shape, generator=self.generator, dtype=torch.float64)
                    self._add(
                        (value.nan_to_num(0, 0, 0) * weights).sum() / (value.numel() ** 0.5 * (_size(value) or 1))
                    )
            if self.total.requires_grad:
                by: Sequence[Tensor | None] = torch.autograd.grad(
                    self.total, list(self.leaves.values()), allow_unused=True
                )
                gradients = {name: one for name, one in zip(self.leaves, by, strict=True) if one is not None}
        prints = {key: sum(each) for key, each in self.pools.items()}
        return Replayed([value.detach() for value in found], prints, gradients)

    def _step(self, operation: Operation) -> None:
        numbers = _numbers(operation)
        read = [self._root(number) for number in numbers if self._root(number) in self.sizes]
        if operation.unshared:  # what autograd keeps of a tensor must not be overwritten
            for number in operation.written:
                self.values[number] = self.values[number].clone()
        args = replace_tensors(operation.args, self._value, Ref)
        kwargs = {key: replace_tensors(value, self._value, Ref) for key, value in operation.kwargs.items()}
        function: Callable[..., Any] = _FUNCTIONS.get(operation.name, operation.function)
        found: list[Tensor] = []
        replace_tensors(function(*args, **kwargs), found.append)
        largest = max((self.sizes[root] for root in read), default=0.0)
        probed = bool(read) and not operation.name.partition("::")[2].lstrip("_").startswith(_UNSTABLE)
        for number, value in zip(operation.outputs, found, strict=True):
            if number in operation.written:
                continue
            self.values[number] = value
            self._cut_from(number, numbers, fresh=operation.fresh)
            if not operation.fresh:
                self.roots[number] = self._root(numbers[0])
            elif probed:
                rescale = self.rescale and number not in self.rounded  # in another size all may be rounded to zero
                self.values[number] = self._probe(operation.name, number, value, largest, rescale=rescale)
            elif read and value.is_floating_point():
                self.sizes[number] = largest
        for number in operation.written if read else ():
            self._probe(operation.name, number, self.values[number], largest, rescale=False)

    def _cut_from(self, number: int, numbers: Sequence[int], *, fresh: bool) -> None:
        """Note what a view is a part of; what is computed from a part alone, entry by entry, is a part, too."""
        sources = set(numbers)
        if not numbers or (fresh and len(sources) > 1):
            return
        value, source = self.values[number], self.values[numbers[0]]
        whole = self.wholes.get(numbers[0], source.shape)
        part = value.shape == source.shape if fresh else value.numel() < source.numel()
        if part and value.numel() < whole.numel():
            self.wholes[number] = whole

    def _root(self, number: int) -> int:
        return self.roots.get(number, number)

    def _value(self, ref: Ref) -> Tensor:
        return self.values[ref.number]

    def _probe(self, name: str, number: int, value: Tensor, largest: float, *, rescale: bool) -> Tensor:
        """Note the print of a result, and rescale it."""
        if not value.is_floating_point() or value.numel() == 0:
            return value
        size = _size(value)
        self.sizes[self._root(number)] = size
        if size <= _CANCELLED * largest:
            return value
        if rescale and not _SMALL <= size <= _LARGE:
            value, size = value * (_TARGET / size), _TARGET
            self.sizes[self._root(number)] = size
        if rescale and self.signs is not None and bool(torch.rand((), generator=self.signs) < 0.5):
            value = -value
        # The size of a part depends on the units in it, and these may move between parts that are treated alike.
        scale = 1.0 if _SMALL <= size <= _LARGE else size
        found = _Print.apply(value, scale) if self.gradients else _print(value, scale)
        whole = self.wholes.get(number, value.shape)
        self.pools.setdefault((name, tuple(whole)), []).append(float(found.detach()) * value.numel() / whole.numel())
        if self.gradients:
            self._add(found * float(torch.randn((), generator=self.generator)))
        return value

    def _add(self, part: Tensor) -> None:
        if bool(part.isfinite()):
            self.total = self.total + part


def _numbers(operation: Operation) -> list[int]:
    found: list[Ref] = []
    replace_tensors([operation.args, [*operation.kwargs.values()]], found.append, Ref)
    return [ref.number for ref in found]


def _rounds(operation: Operation) -> bool:
    """Whether an operator turns what it reads into whole numbers."""
    name, dtype = operation.name.partition("::")[2].strip("_"), operation.kwargs.get("dtype")
    whole = isinstance(dtype, torch.dtype) and not (dtype.is_floating_point or dtype.is_complex)
    return name in ("round", "floor", "ceil", "trunc") or (name == "to_copy" and whole)


def _size(value: Tensor) -> float:
    """Root mean square of the entries that are finite, and no masks."""
    value = value.detach()
    size = _root_mean_square(value)
    if size <= _LARGE:
        return size
    inner = value[value.abs() <= _MASK]
    inner = inner if inner.any() else value[value.isfinite()]
    return _root_mean_square(inner)


def _root_mean_square(value: Tensor) -> float:
    return float(torch.linalg.vector_norm(value)) / math.sqrt(max(1, value.numel()))


def _print(value: Tensor, size: float) -> Tensor:
    shifted = _shifted(value, size)
    return shifted.div_(shifted.abs().add_(1)).mean()


def _shifted(value: Tensor, size: float) -> Tensor:
    """A new tensor in the unit of its size, its entries that are not finite left out."""
    return (value / size).nan_to_num_(0, 0, 0).add_(0.3)


class _Print(torch.autograd.Function):
    """`_print` with a gradient that keeps nothing but its argument."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, size: float) -> Tensor:  # noqa: ANN401  # as autograd calls it
        ctx.save_for_backward(value)
        ctx.size = size
        return _print(value, size)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # noqa: ANN401  # as above
        (value,) = ctx.saved_tensors
        slope = _shifted(value, ctx.size).abs_().add_(1).square_().reciprocal_()
        return slope.mul_(gradient / (ctx.size * value.numel())), None


def _batch_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor | None,
    variance: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Batch normalisation from differentiable operators: the operator has no gradient by its running statistics."""
    dims, shape = [0, *range(2, x.ndim)], [1, -1, *[1] * (x.ndim - 2)]
    if training or mean is None or variance is None:
        spread, centre = torch.var_mean(x, dims, correction=0)
        if mean is not None and variance is not None:
            mean.mul_(1 - momentum).add_(momentum * centre)
            variance.mul_(1 - momentum).add_(momentum * spread)
    else:
        centre, spread = mean, variance
    scale = (spread + eps).rsqrt()
    found = (x - centre.reshape(shape)) * scale.reshape(shape)
    found = found if weight is None else found * weight.reshape(shape)
    found = found if bias is None else found + bias.reshape(shape)
    return found, centre, scale


def _same(x: Value) -> Value:
    return x


_FUNCTIONS: dict[str, Callable[..., Any]] = {"aten::native_batch_norm": _batch_norm, "aten::detach": _same}
