"""Streams that only LayerNorms read: what writes to them can be centred, since every reader subtracts the mean."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import fx

from c2m3_fl.network.operators import LAYOUTS, OUTPUT_AXIS, Kind
from c2m3_fl.symmetry.equivariance import carried, run, shape, uses
from c2m3_fl.symmetry.traced_graph import TracedGraph

_aten = torch.ops.aten
_LAYER_NORM = _aten.layer_norm.default
_SUMS = (_aten.add.Tensor, _aten.add_.Tensor, _aten.sub.Tensor)
Axis = tuple[str, int]  # a tensor and one of its axes


class _Read(Exception):  # noqa: N818  # not an error: the stream is not centred
    """The stream is read or written by something else."""


def find_streams(traced: TracedGraph) -> tuple[tuple[Axis, ...], ...]:
    """The axes of the tensors that write to each stream of which nothing but LayerNorms reads the mean.

    Parameters
    ----------
    traced : TracedGraph
        The traced network.
    """
    streams, seen = [], set[fx.Node]()
    for node in traced.graph.nodes:
        if node.target is not _LAYER_NORM or node.all_input_nodes[0] in seen:
            continue
        stream = _Stream(traced)
        try:
            stream.visit(node.all_input_nodes[0], len(shape(node) or (0,)) - 1)
            streams.append(stream.written())
        except _Read:
            pass
        seen |= stream.dims.keys()
    return tuple(filter(None, streams))


class _Stream:
    """The tensors that are added to one another, with the dimension of each that holds the stream's coordinates."""

    def __init__(self, traced: TracedGraph) -> None:
        self.traced = traced
        self.dims: dict[fx.Node, int] = {}
        self.writers: dict[Axis, set[fx.Node]] = {}

    def visit(self, first: fx.Node, dim: int) -> None:
        """Add a node and all that belongs to the same stream; raise `_Read` where anything but a LayerNorm reads it."""
        waiting = [(first, dim)]
        while waiting:
            node, dim = waiting.pop()
            size = shape(node)
            if size is None or self.dims.get(node, dim) != dim or not 0 <= dim < len(size) or size[dim] < 2:
                raise _Read
            if node not in self.dims:
                self.dims[node] = dim
                waiting += [*self._forward(node, size, dim), *self._backward(node, size, dim)]

    def written(self) -> tuple[Axis, ...]:
        """The axes that write to the stream; raise `_Read` if one of the tensors is used elsewhere."""
        for (tensor, _), nodes in self.writers.items():
            if not self.traced.users(tensor) <= nodes | self.dims.keys():
                raise _Read
        if len({tensor for tensor, _ in self.writers}) < len(self.writers):
            raise _Read
        return tuple(self.writers)

    def _forward(self, node: fx.Node, size: tuple[int, ...], dim: int) -> Iterator[tuple[fx.Node, int]]:
        for user, result, function in uses(node):
            if user.target is _LAYER_NORM and user.args[0] is node and user.args[1] == [size[-1]]:
                if dim != len(size) - 1:
                    raise _Read
            elif user.target in _SUMS or user.target is _aten.cat.default:
                yield user, dim + len(shape(user) or ()) - len(size)
            else:
                place = None if function is None else carried(function, size, dim)
                if place is None:
                    raise _Read
                yield result, place

    def _backward(self, node: fx.Node, size: tuple[int, ...], dim: int) -> Iterator[tuple[fx.Node, int]]:
        layout = LAYOUTS.get(node.target)
        if node.op == "placeholder":
            if node.name not in self.traced.names:
                raise _Read
            self._write(node, dim, node)
        elif node.target is _aten.embedding.default and dim == len(size) - 1:
            self._write(node.args[0], 1, node)
        elif node.target in _SUMS and len(node.all_input_nodes) == len(node.args):
            for part in node.all_input_nodes:
                yield part, dim - len(size) + len(shape(part) or ())
        elif node.target is _aten.cat.default and _joined(node) % len(size) != dim:
            yield from ((part, dim) for part in node.all_input_nodes)
        elif layout is not None and layout.kind in (Kind.LINEAR, Kind.PRODUCT, Kind.CONVOLUTION):
            self._written_by(node, size, dim)
        else:
            yield self._source(node, dim)

    def _written_by(self, node: fx.Node, size: tuple[int, ...], dim: int) -> None:
        """A linear operator that writes to the stream by its weight and its bias."""
        layout = LAYOUTS[node.target]
        _, weight, bias = layout.arguments
        groups = node.args[6] if layout.kind is Kind.CONVOLUTION and len(node.args) > 6 else 1
        if layout.channel % len(size) != dim or groups != 1:
            raise _Read
        self._write(node.args[weight], OUTPUT_AXIS[layout.kind], node)
        if 0 <= bias < len(node.args) and node.args[bias] is not None:
            self._write(node.args[bias], 0, node)

    def _write(self, tensor: object, axis: int, node: fx.Node) -> None:
        size = shape(tensor) if isinstance(tensor, fx.Node) else None
        if not isinstance(tensor, fx.Node) or tensor.name not in self.traced.names or size is None:
            raise _Read
        if axis >= len(size) or size[axis] < 2:
            raise _Read
        self.writers.setdefault((self.traced.names[tensor.name], axis), set()).add(node)

    def _source(self, node: fx.Node, dim: int) -> tuple[fx.Node, int]:
        """The argument, and its dimension, that an operator carries to a dimension of its result."""
        if node.op == "call_function" and len(node.all_input_nodes) == 1:
            source = node.all_input_nodes[0]
            size = shape(source)
            for place in range(len(size or ())):
                if size is not None and carried(lambda x: run(node, {source: x}), size, place) == dim:
                    return source, place
        raise _Read


def _joined(node: fx.Node) -> int:
    """The dimension along which tensors are joined."""
    dim = node.args[1] if len(node.args) > 1 else 0
    assert isinstance(dim, int)  # by the operator's schema
    return dim
