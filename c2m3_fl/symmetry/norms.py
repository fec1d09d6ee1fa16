"""The norms of a graph whose scale, and perhaps shift, can be folded into all operators that read them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import fx

from c2m3_fl.network.operators import LAYOUTS, Kind
from c2m3_fl.symmetry.equivariance import carried, parameter, reading, rows_of, shape, uses
from c2m3_fl.symmetry.traced_graph import TracedGraph

_aten = torch.ops.aten
_LAYER_NORM, _RMS_NORM = _aten.layer_norm.default, _aten.rms_norm.default


@dataclass(frozen=True)
class Reader:
    """An axis of a weight that reads the outputs of a norm.

    Attributes
    ----------
    weight : str
        Name in the state dict.
    axis : int
        The axis that runs along the norm's outputs.
    bias : str
        Name of the bias that takes the norm's shift, or "".
    rows, bias_rows : range, optional
        The rows of weight and bias that read, where one tensor is split among several operators; None for all.
    """

    weight: str
    axis: int
    bias: str = ""
    rows: range | None = None
    bias_rows: range | None = None

    @property
    def parts(self) -> tuple[tuple[str, range | None], ...]:
        """The tensors, and the rows of them, that read."""
        return tuple((name, rows) for name, rows in ((self.weight, self.rows), (self.bias, self.bias_rows)) if name)


@dataclass(frozen=True)
class Norm:
    """A norm over the last dimension, whose scale its readers take.

    Attributes
    ----------
    scale, shift : str
        Names in the state dict; `shift` is "" where the norm has none.
    readers : tuple of Reader
        All operators that read it.
    mean_free : bool
        Whether it subtracts the mean, as LayerNorm does.
    """

    scale: str
    shift: str
    readers: tuple[Reader, ...]
    mean_free: bool

    @property
    def folds_shift(self) -> bool:
        """Whether the biases of all readers take the shift; otherwise it stays, divided by the scale."""
        return bool(self.shift) and all(reader.bias for reader in self.readers)

    @property
    def centres(self) -> bool:
        """Whether what reads the norm can be centred: nothing but numbers of mean zero arrives."""
        return self.mean_free and (self.folds_shift or not self.shift)


@dataclass(frozen=True)
class _Call:
    """One call of a norm: its scale, its shift, and the nodes that compute it, the output last."""

    scale: fx.Node
    shift: fx.Node | None
    nodes: tuple[fx.Node, ...]
    mean_free: bool

    @property
    def output(self) -> fx.Node:
        return self.nodes[-1]


class _Kept(Exception):  # noqa: N818  # not an error: the norm keeps its scale
    """Why a scale cannot be folded."""


def find_norms(traced: TracedGraph) -> tuple[tuple[Norm, ...], dict[str, str]]:
    """The norms that can be folded, and the names of the other scales, each with the reason.

    Parameters
    ----------
    traced : TracedGraph
        The traced network.
    """
    calls: dict[str, list[_Call]] = {}
    for call in _calls(traced):
        calls.setdefault(traced.names[call.scale.name], []).append(call)
    found, kept = [], {}
    for name, same in calls.items():
        try:
            found.append(_norm(traced, name, same))
        except _Kept as reason:
            kept[name] = str(reason)
    return tuple(found), kept


def _calls(traced: TracedGraph) -> Iterator[_Call]:
    """All norms over the last dimension with a scale of one axis: calls of the operator, or spelled out."""
    for node in traced.graph.nodes:
        if node.target in (_LAYER_NORM, _RMS_NORM):
            layout = LAYOUTS[node.target]
            assert layout.kind is Kind.NORM
            _, weight, bias = layout.arguments
            scale, shift = (_vector(traced, _argument(node, place)) for place in (weight, bias))
            if scale is not None:
                yield _Call(scale, shift, (node,), node.target is _LAYER_NORM)
        elif node.target is _aten.mul.Tensor:
            for scale, x in (node.args, reversed(node.args)):
                vector = _vector(traced, scale)
                if vector is not None and isinstance(x, fx.Node) and _is_normalised(x):
                    yield _spelled_out(traced, vector, node)
                    break


def _argument(node: fx.Node, place: int) -> object:
    return node.args[place] if 0 <= place < len(node.args) else None


def _vector(traced: TracedGraph, node: object) -> fx.Node | None:
    """The node, if it is a parameter of one axis with several entries."""
    if not isinstance(node, fx.Node) or node.name not in traced.names:
        return None
    size = shape(node)
    return node if size is not None and len(size) == 1 and size[0] > 1 else None


def _is_normalised(node: fx.Node) -> bool:
    """Whether a tensor is another one times, or divided by, one number per row; or a norm without a scale."""
    while node.target in (_aten.to.dtype, _aten._to_copy.default, _aten.to.device, _aten.type_as.default):
        node = node.all_input_nodes[0]
    if node.target in (_LAYER_NORM, _RMS_NORM):
        return _argument(node, 2) is None
    if node.target not in (_aten.mul.Tensor, _aten.div.Tensor) or len(node.all_input_nodes) != 2:
        return False
    sizes = [shape(each) for each in node.all_input_nodes]
    lasts = [size[-1] if size else 0 for size in sizes]
    return min(lasts) == 1 < max(lasts) and len(sizes[0] or ()) == len(sizes[1] or ())


def _spelled_out(traced: TracedGraph, scale: fx.Node, node: fx.Node) -> _Call:
    """A product with a scale, and the sum with a shift that alone follows it."""
    (user, *more) = list(node.users) or [node]
    if not more and user.target is _aten.add.Tensor:
        for shift in user.all_input_nodes:
            if shift is not node and _vector(traced, shift) is shift:
                return _Call(scale, shift, (node, user), mean_free=False)
    return _Call(scale, None, (node,), mean_free=False)


def _norm(traced: TracedGraph, name: str, calls: list[_Call]) -> Norm:
    """A norm, from all of its calls."""
    readers: dict[Reader, set[fx.Node]] = {}
    for call in calls:
        size = shape(call.output)
        assert size is not None  # a norm's output is a floating-point tensor
        _follow(traced, call.output, len(size) - 1, readers)
    if not readers:
        raise _Kept("nothing reads it")
    shifts = {traced.names[call.shift.name] if call.shift is not None else "" for call in calls}
    if len(shifts) > 1:
        raise _Kept("its calls have different shifts")
    own = {node for call in calls for node in call.nodes}
    taken = {node for found in readers.values() for node in found}
    for tensor in (name, *filter(None, shifts)):
        _require_alone(traced, tensor, None, own)
    for tensor, rows in (part for reader in readers for part in reader.parts):
        _require_alone(traced, tensor, rows, taken)
    return Norm(name, shifts.pop(), tuple(readers), all(call.mean_free for call in calls))


def _follow(traced: TracedGraph, node: fx.Node, dim: int, readers: dict[Reader, set[fx.Node]]) -> None:
    """Add all readers of a dimension of a node; raise `_Kept` where something else reads it."""
    size = shape(node)
    assert size is not None  # only floating-point tensors are followed
    for user, result, function in uses(node):
        if user.op == "output":
            raise _Kept("it is an output of the network")
        place = None if function is None else carried(function, size, dim)
        if place is not None:
            _follow(traced, result, place, readers)
            continue
        read = reading(user, node, dim, traced.names)
        if read is None:
            raise _Kept(f"no parameter of {_words(user)}, which reads it, takes the scale")
        weight, axis = read
        name, rows = _part(traced, weight)
        if rows is not None and axis == 0:
            raise _Kept(f"{_words(user)} reads a part of {name!r} that is split along the norm's outputs")
        bias, bias_rows = _bias(traced, user, weight)
        reader = Reader(name, axis, bias, rows, bias_rows)
        readers.setdefault(reader, set()).update({user, *_path(traced, user, weight)})


def _path(traced: TracedGraph, user: fx.Node, weight: fx.Node) -> set[fx.Node]:
    """The calls that lead from a weight to its reader."""
    paths = (parameter(node, traced.names) for node in user.all_input_nodes)
    return {step for path in paths if path and path[0] is weight for step in path[1:]}


def _bias(traced: TracedGraph, user: fx.Node, weight: fx.Node) -> tuple[str, range | None]:
    """The bias of a linear operator, to which it adds what arrives, and the rows of it; "" where there is none."""
    layout = LAYOUTS.get(user.target)
    if layout is None or layout.kind not in (Kind.LINEAR, Kind.PRODUCT, Kind.CONVOLUTION):
        return "", None
    padding = _argument(user, 4) if layout.kind is Kind.CONVOLUTION else None
    if padding not in (None, "valid") and padding != [0] * layout.spatial:
        return "", None  # the zeros around an image have no shift
    bias = _argument(user, layout.arguments[2])
    size = shape(bias) if isinstance(bias, fx.Node) else None
    if not isinstance(bias, fx.Node) or bias is weight or size is None or len(size) != 1 or size[0] < 2:
        return "", None
    return ("", None) if rows_of(bias, traced.names) is None else _part(traced, bias)


def _part(traced: TracedGraph, node: fx.Node) -> tuple[str, range | None]:
    """The name of the tensor that a node is or takes rows of, and these rows; None for all."""
    found = rows_of(node, traced.names)
    assert found is not None  # callers check
    return traced.names[found[0].name], None if found[0] is node else found[1]


def _require_alone(traced: TracedGraph, tensor: str, rows: range | None, nodes: set[fx.Node]) -> None:
    """Raise `_Kept` if these rows of a tensor are used by other calls than these, under any of its names."""
    for user in sorted(traced.users(tensor) - nodes):
        parts = list(user.users) if isinstance(user.meta.get("val"), list | tuple) else [user]
        cuts = [rows_of(part, traced.names) for part in parts]
        if rows is None or not all(cuts):
            raise _Kept(f"{_words(user)} uses {tensor!r} as well")
        for part, cut in zip(parts, cuts, strict=True):
            if cut is not None and set(cut[1]).intersection(rows):
                for other in sorted(part.users.keys() - nodes):
                    raise _Kept(f"{_words(other)} uses {tensor!r} as well")


def _words(node: fx.Node) -> str:
    """An operator and the module that calls it."""
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    where = f" in {stack[-1][0]!r}" if stack and stack[-1][0] else ""
    return f"{str(node.target).removesuffix('.default')}{where}"
