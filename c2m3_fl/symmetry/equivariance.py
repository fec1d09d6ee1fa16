"""How one operator of a graph treats a dimension: whether it carries every coordinate of it, or reads it by a weight.

Nothing is looked up by the operator's name. The operator is run on random numbers in double precision: one that maps
``x * s`` to ``f(x) * s`` for random factors `s` along a dimension, and constants to themselves, carries that
dimension; one with ``f(x * s, w) = f(x, w * s)`` reads it by an axis of `w`.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, fx

Function = Callable[[Tensor], Any]
_CLOSE = 1e-4  # relative: an operator may compute in single precision
_OCTAVES = 9  # factors between 2^-9 and 2^9: functions that are linear near zero alone show


def shape(node: fx.Node) -> tuple[int, ...] | None:
    """Shape of a node's value; None if it is not one tensor of floating-point numbers."""
    value = node.meta.get("val")
    return tuple(map(int, value.shape)) if isinstance(value, Tensor) and value.is_floating_point() else None


def factors(size: int) -> Tensor:
    """Random factors of both signs, powers of two, shape (size,)."""
    generator = torch.Generator().manual_seed(size)
    signs = torch.randint(0, 2, (size,), generator=generator).double() * 2 - 1
    signs[0] = -1.0
    return signs * 2.0 ** torch.randint(-_OCTAVES, _OCTAVES + 1, (size,), generator=generator)


def noise(size: tuple[int, ...]) -> Tensor:
    """Random numbers."""
    return torch.randn(size, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def along(values: Tensor, dim: int, ndim: int) -> Tensor:
    """A vector along one of `ndim` dimensions, to be broadcast."""
    return values.reshape([-1 if other == dim else 1 for other in range(ndim)])


def close(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors agree but for rounding."""
    if a.shape != b.shape or not a.numel():
        return False
    return bool((a.double() - b.double()).abs().max() <= _CLOSE * b.double().abs().max())


def carried(function: Function, size: tuple[int, ...], dim: int) -> int | None:
    """The dimension of the result that holds dimension `dim` of the argument; None if it is not carried.

    Parameters
    ----------
    function : callable
        The operator as a function of one tensor.
    size : tuple of int
        Shape of that tensor.
    dim : int
        The dimension.
    """
    scale = factors(size[dim])
    marker = along(scale, dim, len(size))
    try:
        with torch.no_grad():
            out = function(marker.expand(size).clone())
            if not isinstance(out, Tensor) or not out.is_floating_point():
                return None
            places = [
                place
                for place, length in enumerate(out.shape)
                if length == len(scale) and close(out / along(scale, place, out.ndim), torch.ones_like(out))
            ]
            if len(places) != 1:
                return None
            x, back = noise(size), along(scale, places[0], out.ndim)
            return places[0] if close(function(x * marker) / back, function(x)) else None
    except (RuntimeError, TypeError, ValueError, IndexError):  # the operator does not take such numbers
        return None


def uses(node: fx.Node) -> Iterator[tuple[fx.Node, fx.Node, Function | None]]:
    """The tensors that are computed from a node: the user, the node of the tensor, and the function of this node alone.

    The function is None where the user takes other tensors as well, or is the graph's output.
    """
    for user in node.users:
        if user.op == "output":
            yield user, user, None
            continue
        alone = user.op == "call_function" and user.all_input_nodes == [node]
        value = user.meta.get("val")
        if isinstance(value, list | tuple):
            for part in user.users:
                index = part.args[1] if len(part.args) > 1 else 0
                yield user, part, _call(user, node, index) if alone else None
        elif isinstance(value, Tensor) or user.users:
            yield user, user, _call(user, node) if alone else None


def _call(node: fx.Node, source: fx.Node, index: Any = None) -> Function:  # noqa: ANN401  # a key of a tuple
    def function(x: Tensor) -> Any:  # noqa: ANN401  # an operator may return anything
        found = run(node, {source: x})
        return found if index is None else found[index]

    return function


def run(node: fx.Node, values: Mapping[fx.Node, Any]) -> Any:  # noqa: ANN401  # as above
    """The value of a call, given those of its arguments."""
    assert callable(node.target)
    return node.target(*fx.map_arg(node.args, values.__getitem__), **fx.map_arg(node.kwargs, values.__getitem__))


def parameter(node: fx.Node, names: Mapping[str, str]) -> tuple[fx.Node, ...]:
    """The calls from a parameter, or from rows of one, to a node, each of one argument and one user; () if none."""
    path = [node]
    while (
        path[-1].op == "call_function"
        and rows_of(path[-1], names) is None
        and len(path[-1].all_input_nodes) == 1
        and len(path[-1].users) == 1
    ):
        path.append(path[-1].all_input_nodes[0])
    return tuple(reversed(path)) if rows_of(path[-1], names) is not None and shape(path[-1]) is not None else ()


def rows_of(node: fx.Node, names: Mapping[str, str]) -> tuple[fx.Node, range] | None:
    """The placeholder of a parameter, and the rows of it that a node is: all, or those of a split; None if it is none.

    Parameters
    ----------
    node : fx.Node
        A placeholder, or a call that takes rows out of one.
    names : mapping of str to str
        Placeholders of parameters, with their names in the state dict.
    """
    cut = node.all_input_nodes[0] if node.target is operator.getitem else node
    source = node if node.name in names else next(iter(cut.all_input_nodes), node)
    size = shape(source)
    if source.name not in names or not size:
        return None
    if source is node:
        return node, range(size[0])
    if cut.all_input_nodes != [source] or shape(node) is None or (shape(node) or ())[1:] != size[1:]:
        return None
    marker = along(torch.arange(size[0], dtype=torch.float64), 0, len(size)).expand(size)
    try:
        found = run(cut, {source: marker}) if cut is node else run(cut, {source: marker})[node.args[1]]
    except (RuntimeError, TypeError, ValueError, IndexError):  # as above
        return None
    first = int(found.flatten()[0]) if found.numel() else 0
    if not 0 < found.shape[0] < size[0] or not torch.equal(found, marker[first : first + found.shape[0]]):
        return None
    return source, range(first, first + found.shape[0])


def reading(node: fx.Node, source: fx.Node, dim: int, names: Mapping[str, str]) -> tuple[fx.Node, int] | None:
    """The parameter, and the axis of it, by which a call reads dimension `dim` of `source`; None if there is none.

    Parameters
    ----------
    node : fx.Node
        The call.
    source : fx.Node
        One of its arguments; all others must be parameters, or rows of them.
    dim : int
        A dimension of `source`.
    names : mapping of str to str
        Placeholders of parameters, with their names in the state dict.
    """
    paths = {other: parameter(other, names) for other in node.all_input_nodes if other is not source}
    size = shape(source)
    if node.op != "call_function" or not paths or not all(paths.values()) or size is None:
        return None
    weights = {path[0]: noise(shape(path[0]) or ()) for path in paths.values()}

    def call(x: Tensor, weights: Mapping[fx.Node, Tensor]) -> Tensor:
        values: dict[fx.Node, Any] = {source: x}
        for other, path in paths.items():
            value: Any = weights[path[0]]
            for step, before in zip(path[1:], path, strict=False):
                value = run(step, {before: value})
            values[other] = value
        return torch.as_tensor(run(node, values))

    x, scale = noise(size), factors(size[dim])
    try:
        with torch.no_grad():
            scaled = call(x * along(scale, dim, len(size)), weights)
            for weight, value in weights.items():
                for axis in (axis for axis, length in enumerate(value.shape) if length == len(scale)):
                    if close(call(x, {**weights, weight: value * along(scale, axis, value.ndim)}), scaled):
                        return weight, axis
    except (RuntimeError, TypeError, ValueError, IndexError):  # as above
        return None
    return None
