"""Pieces of a tensor that are cut, treated alike and joined again: the cuts do not tell their units apart.

``cat([h[:, 6:].relu(), h[:, :6].relu()], 1)`` is a permutation of ``h.relu()``, and a loop over the units of a layer
that ends in a stack computes all of them in the same way.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import fx

from c2m3_fl.symmetry.facts import Atoms, Structure
from c2m3_fl.symmetry.labels import Labels
from c2m3_fl.symmetry.reshape_labels import concatenate
from c2m3_fl.symmetry.unit_labels import permute, take

_CUTS = {
    "slice": 1,
    "narrow": 1,
    "select": 1,
    "unbind": 1,
    "split": 2,
    "split_with_sizes": 2,
    "chunk": 2,
}  # place of dim


@dataclass(frozen=True, eq=False)
class Piece:
    """A part of a tensor along one dimension, after operators that act entry by entry.

    Attributes
    ----------
    source : fx.Node
        The tensor.
    dim : int
        The dimension.
    index : ndarray
        The coordinates along it.
    single : bool
        Whether the dimension is gone.
    treatment : str
        The operators, with their arguments.
    path : tuple of fx.Node
        The cut and all that follows it, without the join.
    """

    source: fx.Node
    dim: int
    index: Atoms
    single: bool
    treatment: str
    path: tuple[fx.Node, ...]


@dataclass(frozen=True, eq=False)
class Join:
    """Pieces of one tensor, and possibly other tensors, that are joined.

    Attributes
    ----------
    source : fx.Node
        What the pieces are cut from.
    parts : tuple of Piece or fx.Node
        What is joined, in order.
    dim : int
        The dimension of the result.
    stacks : bool
        Whether it is a new one.
    """

    source: fx.Node
    parts: tuple[Piece | fx.Node, ...]
    dim: int
    stacks: bool

    @property
    def nodes(self) -> set[fx.Node]:
        """Nodes between the source and the join, which need no labels."""
        found = {node for part in self.parts if isinstance(part, Piece) for node in part.path}
        cuts = {node.args[0] for node in found if node.target is operator.getitem}
        return found | {cut for cut in cuts if isinstance(cut, fx.Node) and found.issuperset(cut.users)}

    def labels(self, structure: Structure, known: Mapping[fx.Node, Labels]) -> Labels:
        """Labels of the result: all pieces that are treated alike are cut at once."""
        whole, parts, order, end = known[self.source], [], [], 0
        groups: dict[str, list[tuple[Piece, Atoms]]] = {}
        for part in self.parts:
            size = len(part.index) if isinstance(part, Piece) else known[part].shape[self.dim]
            places, end = np.arange(end, end + size), end + size
            if isinstance(part, Piece):
                groups.setdefault(part.treatment, []).append((part, places))
            else:
                parts.append(known[part])
                order.append(places)
        for found in groups.values():
            dim = found[0][0].dim
            cut = take(structure, whole, dim, np.concatenate([piece.index for piece, _ in found]))
            if self.stacks:
                rest = [other for other in range(whole.ndim) if other != dim]
                cut = permute(cut, [*rest[: self.dim], dim, *rest[self.dim :]])
            parts.append(cut)
            order += [places for _, places in found]
        joined = concatenate(structure, parts, self.dim)
        return take(structure, joined, self.dim, np.argsort(np.concatenate(order)))


def joins(graph: fx.Graph, entry_by_entry: Callable[[fx.Node], bool]) -> dict[fx.Node, Join]:
    """Nodes that join pieces of one tensor, two of which at least are treated alike.

    Parameters
    ----------
    graph : fx.Graph
        The graph of an exported program.
    entry_by_entry : callable
        Whether a node acts entry by entry on a single tensor, without writing to it.
    """
    found: dict[fx.Node, Join] = {}
    for node in graph.nodes:
        stacks = node.target is torch.ops.aten.stack.default
        if not (stacks or node.target is torch.ops.aten.cat.default):
            continue
        dim = _argument(node, 1) % node.meta["val"].ndim
        parts = [_piece(part, node, entry_by_entry) or part for part in node.args[0]]
        fits = [part for part in parts if isinstance(part, Piece) and part.single == stacks]
        fits = [part for part in fits if stacks or part.dim == dim]
        kinds = Counter((part.source, part.dim, part.treatment) for part in fits)
        most = max(kinds, key=kinds.__getitem__, default=None)
        if most is None or kinds[most] < 2 or (stacks and kinds[most] < len(parts)):
            continue
        kept = tuple(
            part if part in fits and part.source is most[0] else whole
            for part, whole in zip(parts, node.args[0], strict=True)
        )
        found[node] = Join(most[0], kept, dim, stacks)
    return found


def _piece(node: fx.Node, join: fx.Node, entry_by_entry: Callable[[fx.Node], bool]) -> Piece | None:
    """What a node is a piece of; None if anything but the join uses it on the way."""
    after, path, treatment = join, [], ""
    while set(node.users) == {after}:
        path.append(node)
        cut: Any = node.args[0] if node.target is operator.getitem else node
        name = str(cut.target).split(".")[1] if str(cut.target).startswith("aten.") else ""
        if name in _CUTS:
            shape = cut.args[0].meta["val"].shape
            dim = _argument(cut, _CUTS[name]) % len(shape)
            coordinates = torch.arange(shape[dim]).reshape([-1 if at == dim else 1 for at in range(len(shape))])
            values = cut.target(coordinates, *cut.args[1:], **cut.kwargs)
            values = values if cut is node else values[node.args[1]]
            single = values.ndim < len(shape)
            return Piece(cut.args[0], dim, values.reshape(-1).numpy(), single, treatment, tuple(path))
        if not entry_by_entry(node):
            return None
        treatment += f"{node.target}{fx.map_arg((node.args, node.kwargs), lambda _: None)}"
        after, (node,) = node, node.all_input_nodes
    return None


def _argument(node: fx.Node, place: int) -> int:
    found: Any = node.args[place] if len(node.args) > place else node.kwargs.get("dim", 0)
    return int(found)
