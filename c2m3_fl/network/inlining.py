"""Bring an exported graph to a plain form: one level, shapes that are numbers, dense products."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram

from c2m3_fl.network.calibration import Inputs

_aten = torch.ops.aten
_higher = torch.ops.higher_order


def inline_branches(graph: fx.GraphModule) -> None:
    """Replace calls of subgraphs by their operators.

    Both branches of `torch.cond` are computed, and `torch.where` chooses. A region under `torch.no_grad` computes
    the same values as one outside.

    Parameters
    ----------
    graph : fx.GraphModule
        The graph of an exported program; changed in place.
    """
    for child in graph.children():
        if isinstance(child, fx.GraphModule):
            inline_branches(child)
    for node in list(graph.graph.nodes):
        if node.target is _higher.cond and isinstance(node.args[0], fx.Node):
            _inline_cond(graph, node)
        elif node.target is _higher.wrap_with_set_grad_enabled:
            _replace(graph, node, _paste(graph, node, node.args[1], node.args[2:]))
    graph.recompile()


def plain_operators(program: ExportedProgram, inputs: Inputs) -> None:
    """Replace operators whose results depend on the content of tensors, or on sparse ones, by operators of numbers.

    A mask of rows becomes the indices of the rows that it chooses, a linear layer of the unit matrix the transpose of
    its weight. Sizes that depend on content become those of the
    example inputs.

    Parameters
    ----------
    program : ExportedProgram
        A functional program; its graph is changed in place.
    inputs : Inputs
        The example inputs that it was exported with.
    """
    graph = program.graph_module.graph
    for node in list(graph.nodes):
        if node.target is _aten._sparse_mm.default:
            node.target = _aten.mm.default
        elif node.target is _aten.index.Tensor:
            _index_by_number(graph, node)
        elif node.target is _aten.linear.default and len(node.args) == 2:
            source, weight = node.args
            if isinstance(source, fx.Node) and source.target is _aten.eye.default:
                node.target, node.args = _aten.t.default, (weight,)  # the adapters of DoRA write a weight so
    if any(_unknown(node.meta.get("val")) for node in graph.nodes):
        args, kwargs = inputs
        flat = program._graph_module_flat_inputs(args, kwargs)
        copies = [value.detach().clone() if isinstance(value, Tensor) else value for value in flat]
        with torch.no_grad():
            _Measure(program.graph_module).run(*copies)
    program.graph_module.recompile()


class _Measure(fx.Interpreter):
    """Runs a graph and notes the shape of every value."""

    def run_node(self, n: fx.Node) -> Any:  # noqa: ANN401  # a node's value may be a tensor, a size, a tuple, …
        found = super().run_node(n)
        n.meta["val"] = torch.utils._pytree.tree_map_only(Tensor, lambda value: value.to("meta"), found)
        return found


def _inline_cond(graph: fx.GraphModule, node: fx.Node) -> None:
    condition, *branches, operands = node.args
    results = [_paste(graph, node, branch, operands) for branch in branches]
    chosen: list[fx.Node | None] = []
    with graph.graph.inserting_before(node):
        for place, (yes, no) in enumerate(zip(*results, strict=True)):
            if yes is None:
                chosen.append(None)
                continue
            made = graph.graph.call_function(_aten.where.self, (condition, yes, no))
            made.meta = {**node.meta, "val": node.meta["val"][place]}
            chosen.append(made)
    _replace(graph, node, chosen)


def _paste(graph: fx.GraphModule, node: fx.Node, holder: Any, operands: Any) -> list[Any]:  # noqa: ANN401  # as above
    """Copy a subgraph's operators before its call, and return the values of its outputs."""
    sub = graph.get_submodule(str(holder.target))
    assert isinstance(sub, fx.GraphModule)
    placeholders = [each for each in sub.graph.nodes if each.op == "placeholder"]
    with graph.graph.inserting_before(node):
        found = graph.graph.graph_copy(sub.graph, dict(zip(placeholders, operands, strict=True)))
    return list(found) if isinstance(found, list | tuple) else [found]


def _replace(graph: fx.GraphModule, node: fx.Node, values: list[Any]) -> None:
    """Let the users of a call of a subgraph use these values."""
    holders = [each for each in node.all_input_nodes if each.op == "get_attr"]
    for user in list(node.users):
        assert user.target is operator.getitem  # such calls return tuples
        place: Any = user.args[1]
        user.replace_all_uses_with(values[place])
        graph.graph.erase_node(user)
    for each in [node, *holders]:
        if not each.users:
            graph.graph.erase_node(each)


def _index_by_number(graph: fx.Graph, node: fx.Node) -> None:
    """Index by ``nonzero(mask)`` instead of ``mask``."""
    source, given = node.args
    assert isinstance(given, list | tuple)
    indices: list[Any] = []
    with graph.inserting_before(node):
        for index in given:
            if not isinstance(index, fx.Node) or index.meta["val"].dtype is not torch.bool:
                indices.append(index)
                continue
            places = graph.call_function(_aten.nonzero.default, (index,))
            dims = range(index.meta["val"].ndim)
            indices += [graph.call_function(_aten.select.int, (places, 1, dim)) for dim in dims]
    node.args = (source, indices)


def _unknown(value: object) -> bool:
    """Whether a value of a graph has a size that depends on the content of tensors."""
    if isinstance(value, list | tuple):
        return any(map(_unknown, value))
    if isinstance(value, Tensor):
        return any(isinstance(size, torch.SymInt) for size in value.shape)
    return isinstance(value, torch.SymInt | torch.SymBool | torch.SymFloat)
