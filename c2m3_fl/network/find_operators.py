"""Find the parameterised operators in an exported graph, and the parameters that belong to none."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace

import torch
from torch import fx

from c2m3_fl.network.operators import LAYOUTS, Kind, Layout, Operator, obstacle

_TRAINING = 5  # position of the training flag among the arguments of aten.batch_norm


def find_operators(
    graph: fx.Graph, names: Mapping[str, str], sharing: Collection[str] = ()
) -> tuple[tuple[Operator, ...], dict[str, str]]:
    """The operators in forward order, and the names of the other parameters, each with the reason.

    Parameters
    ----------
    graph : fx.Graph
        ATen calls in forward order.
    names : mapping of str to str
        State-dict name of every placeholder that stands for a parameter or a persistent buffer.
    sharing : collection of str
        Names of tensors that share memory with others: their operators are left out.
    """
    final = _final_nodes(graph)
    found: list[Operator] = []
    skipped: dict[str, str] = {}
    for index, node in enumerate(graph.nodes):
        layout = LAYOUTS.get(node.target) if node.op == "call_function" else None
        operator = None if layout is None else _operator(node, index, layout, names, node in final)
        used = [names[arg.name] for arg in node.all_input_nodes if arg.name in names]
        if operator is None:
            reason = f"used by {node.target} in {_module(node)!r}, which {obstacle(node.target)}"
            skipped |= dict.fromkeys(used, reason)
        elif any(len(arg.users) > 1 for arg in node.all_input_nodes if arg.name in names):
            skipped |= dict.fromkeys(used, "shared by several operators")
        elif any(name in sharing for name in used):
            skipped |= dict.fromkeys(used, "shares memory with another parameter")
        else:
            found.append(operator)
    owned = {name for operator in found for name in (operator.weight, operator.bias)}
    norms = {each.node for each in found if each.mean}
    found = [replace(each, feeds_norm=_feeds_norm(each, norms)) for each in found]
    return tuple(found), {name: reason for name, reason in skipped.items() if name not in owned}


def _operator(node: fx.Node, index: int, layout: Layout, names: Mapping[str, str], final: bool) -> Operator | None:
    def name_of(position: int) -> str:
        argument = node.args[position] if 0 <= position < len(node.args) else None
        return names.get(argument.name, "") if isinstance(argument, fx.Node) else ""

    _, weight, bias = layout.arguments
    statistics = ("", "")
    if layout.kind is Kind.BATCH_NORM and not node.args[_TRAINING]:
        statistics = (name_of(3), name_of(4))
    if not name_of(weight) and not statistics[0]:
        return None
    source = node.args[weight] if layout.kind in (Kind.LINEAR, Kind.PRODUCT) else None
    if isinstance(source, fx.Node) and source.meta["val"].ndim != 2:
        return None  # only the columns of a two-dimensional weight are channels
    return Operator(node, index, layout, _module(node), name_of(weight), name_of(bias), *statistics, final)


def _feeds_norm(operator: Operator, norms: Collection[fx.Node]) -> bool:
    user = next(iter(operator.node.users), None)
    if user is None or len(operator.node.users) > 1 or user.target is not torch.ops.aten.batch_norm.default:
        return False
    renewed = user in norms or bool(user.args[_TRAINING])  # in training mode the batch's own statistics are used
    return renewed and operator.layout.channel % operator.node.meta["val"].ndim == 1


def _module(node: fx.Node) -> str:
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    return str(stack[-1][0]) if stack else ""


def _final_nodes(graph: fx.Graph) -> set[fx.Node]:
    """Nodes that reach the output with no parameterised operator in between, the last such operators included."""
    reached: set[fx.Node] = set()
    open_nodes = [graph.output_node()]
    while open_nodes:
        node = open_nodes.pop()
        if node in reached:
            continue
        reached.add(node)
        if node.target not in LAYOUTS:
            open_nodes.extend(node.all_input_nodes)
    return reached
