"""Outputs of networks of other widths, seen in the units of their average: what recalibrations take as endpoints.

Every network runs at its own width, so denominators of norms, and everything else that depends on a network's own
width, are its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache

import torch
from torch import Tensor, fx

from c2m3_fl.core.spec import PermutationSpec
from c2m3_fl.errors import SpecError
from c2m3_fl.merging.recalibrate.targets import View
from c2m3_fl.merging.widths.injections import Injection, axis_sources, take
from c2m3_fl.network.operators import OUTPUT_AXIS, Operator
from c2m3_fl.network.program import Program

_ATTENTION = torch.ops.aten.scaled_dot_product_attention.default
_DROPOUT = "dropout"  # does nothing in evaluation mode, whatever its rate
_ARITHMETIC = ("add", "sub", "rsub", "mul", "div", "pow")  # whole numbers among their arguments are no sizes


def channel_sources(
    operator: Operator, source: PermutationSpec, target: PermutationSpec, units: Injection
) -> list[tuple[int, Tensor]]:
    """The channel axes of an operator's output; for each channel of the target that of the source, or -1.

    Parameters
    ----------
    operator : Operator
        An operator of either network.
    source, target : PermutationSpec
        Two networks that differ in width alone.
    units : mapping of str to Tensor
        For every group and unit of the target the unit of the source, or -1.
    """
    name = operator.weight or operator.mean
    shape = target.tensors[name].shape
    made = OUTPUT_AXIS.get(operator.kind)
    sides = range(len(shape)) if made is None else (made,)
    axes = operator.channel_axes({name: torch.empty(shape, device="meta")})
    return [(axis, axis_sources(name, side, source, target, units)) for axis, side in zip(axes, sides, strict=True)]


def seen_from(source: PermutationSpec, target: PermutationSpec, units: Injection) -> View:
    """The view of a network's outputs in the units of another width; units that it lacks give zeros.

    Parameters
    ----------
    source, target, units
        As for `channel_sources`.
    """

    @cache
    def sources(operator: Operator) -> list[tuple[int, Tensor]]:
        return channel_sources(operator, source, target, units)

    def view(operator: Operator, value: Tensor) -> Tensor:
        for axis, index in sources(operator):
            value = take(value, axis, index)
        return value

    return view


def owned_channels(
    specs: Sequence[PermutationSpec], target: PermutationSpec, units: Sequence[Injection]
) -> Callable[[Operator], Tensor]:
    """Which networks have the channels of an operator's output: see `Setting.owned`.

    Parameters
    ----------
    specs : sequence of PermutationSpec
        Symmetries of each network.
    target : PermutationSpec
        Symmetries of their average.
    units : sequence of mappings of str to Tensor
        Each network's injection.
    """

    @cache
    def owned(operator: Operator) -> Tensor:
        rows = []
        for spec, own in zip(specs, units, strict=True):
            mask = torch.ones((), dtype=torch.bool)
            for _, index in channel_sources(operator, spec, target, own):
                mask = mask[..., None] & (index >= 0)
            rows.append(mask.reshape(-1))
        return torch.stack(rows)

    return owned


def check_programs(one: Program, other: Program, names: tuple[str, str]) -> None:
    """Raise `SpecError` unless two networks run the same operators, with constants that do not depend on the width.

    Parameters
    ----------
    one, other : Program
        Two exported networks.
    names : (str, str)
        Their names in the error.

    Raises
    ------
    SpecError
        Naming the first operator that differs, and its module.
    """
    pairs = zip(one.graph.nodes, other.graph.nodes, strict=False)
    for mine, theirs in pairs:
        where = f"{names[1]} differs from {names[0]} in more than its width: {_described(theirs)}"
        if mine.op != theirs.op or (mine.op == "call_function" and mine.target != theirs.target):
            raise SpecError(f"{where}, there {_described(mine)}; they must run the same operators in the same order")
        if _constants(mine) != _constants(theirs):
            raise SpecError(
                f"{where} has the constants {_constants(theirs)}, there {_constants(mine)}: a scale that "
                "depends on the width cannot be averaged; give all networks the same one (of attention, heads of one "
                "size)"
            )
    if len(one.graph.nodes) != len(other.graph.nodes):
        counts = f"{len(other.graph.nodes)} operators, expected {len(one.graph.nodes)}"
        raise SpecError(f"{names[1]} differs from {names[0]} in more than its width: it has {counts}")


def _constants(node: fx.Node) -> list[object]:
    """Numbers among a call's arguments that are not sizes, and the size of heads, which scales attention."""
    operator = str(node.target).removeprefix("aten.").split(".")[0].rstrip("_")
    if _DROPOUT in operator:
        return []
    numbers = (float, int) if operator in _ARITHMETIC else float
    found: list[object] = []
    stack: list[object] = [node.args, node.kwargs]
    while stack:
        value = stack.pop()
        if isinstance(value, numbers):
            found.append(value)
        elif isinstance(value, dict):
            stack.extend(value.values())
        elif isinstance(value, (list, tuple)):
            stack.extend(value)
    if node.target == _ATTENTION and node.kwargs.get("scale") is None:
        query = node.args[0]
        assert isinstance(query, fx.Node)
        found.append(f"heads of {query.meta['val'].shape[-1]} units")
    return found


def _described(node: fx.Node) -> str:
    stack = node.meta.get("nn_module_stack") or {}
    module = next(reversed(stack.values()))[0] if stack else ""
    return f"{node.target} in {module!r}"
