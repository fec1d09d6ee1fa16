"""Gradients of nodes at permutations, kept from one visit to the next and changed by what has moved in between.

A node's gradient for a group is the sum, over the terms that carry it, of products of the other nodes' sum with the
node's own part. Where another node moves some units along an axis, the product changes by that of those units alone;
where the node itself does, likewise. So the cost of a sweep falls with the share of units that move. A gradient is
computed anew where that is cheaper, and after many changes, which keeps rounding small.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from c2m3_fl.core.mapped import contract
from c2m3_fl.core.problem import Problem
from c2m3_fl.core.shifts import Shift
from c2m3_fl.core.terms import Term
from c2m3_fl.core.universe import Universe

_MODELS = 4  # gradients are kept where those of all nodes take no more memory than so many models
_WORTH = 0.5  # share of a product's work above which it is computed anew: changes also take copies
_CALL = 1 << 20  # multiplications in whose time a change's tensors are set up
_LARGE = 1 << 24  # multiplications of a gradient; smaller ones take no longer than the changes of a few nodes
_FASTER = 1 << 10  # times that an accelerator is faster in multiplications than a thread; it is called no faster
_CHANGES = 64  # after which a gradient is computed anew


@dataclass(frozen=True, eq=False)
class _Change:
    """Some units of a term that a node has moved: by how much its weighted part changed there."""

    node: int
    axis: int
    units: Tensor
    weighted: Tensor
    share: float  # of the axis's units


@dataclass(eq=False)
class _Kept:
    """A gradient, and how many changes of every term it has seen."""

    value: Tensor
    seen: dict[int, int]
    changes: int = 0


@dataclass(eq=False)
class _Journal:
    """The changes of one term: those before `first` have been forgotten."""

    first: int = 0
    changes: list[_Change] = field(default_factory=list)

    @property
    def end(self) -> int:
        return self.first + len(self.changes)

    def since(self, seen: int) -> list[_Change] | None:
        """The changes after the first ones; None where some of them have been forgotten."""
        return None if seen < self.first else self.changes[seen - self.first :]

    def forget(self) -> None:
        """Forget all changes so far, and one that is too large to be written down."""
        self.first, self.changes = self.end + 1, []

    def add(self, change: _Change) -> None:
        """Write a change down; those that together cost more than a new product are forgotten."""
        self.changes.append(change)
        while sum(each.share for each in self.changes) > _WORTH:
            self.first += 1
            self.changes.pop(0)


class Gradients:
    """Gradients of a universe whose nodes move one after the other.

    Parameters
    ----------
    universe : Universe
        Moved by `settle` alone while these are used.
    """

    def __init__(self, universe: Universe) -> None:
        self._universe, self._problem = universe, universe.problem
        self._journals = [_Journal() for _ in universe.problem.terms]
        self._kept: dict[tuple[int, str], _Kept] = {}
        self._keeps = _worth_keeping(universe.problem)
        self._call = _CALL * _faster(universe.problem)
        self._followed = set(universe.problem.touched(self._keeps))

    def of(self, node: int, groups: Collection[str], numbers: Sequence[int]) -> dict[str, Tensor]:
        """Per group, shape (size, size); the node's weight is left out.

        Parameters
        ----------
        node : int
            The node.
        groups : collection of str
            The groups.
        numbers : sequence of int
            The terms that they touch.
        """
        new = [name for name in groups if not self._update(node, name)]
        sizes = {name: self._problem.spec.groups[name].size for name in new}
        found = {name: self._problem.like.new_zeros(size, size) for name, size in sizes.items()}
        if new:
            for number in numbers:
                if any(name in found for name in self._problem.terms[number].groups):
                    self._universe.slope(number, node, self._universe.others(number, node), found)
        if not self._universe.places[node]:
            for name in self._keeps & found.keys():
                value = found[name]
                seen = {number: self._journals[number].end for number in self._problem.touched([name])}
                self._kept[node, name] = _Kept(value, seen)
        return found | {name: self._kept[node, name].value for name in groups if name not in found}

    def settle(self, node: int, index: Mapping[str, Tensor]) -> None:
        """Put groups of a node at permutations of its frame, as `Universe.settle` does."""
        around = {name for number in self._problem.touched(index) for name in self._problem.terms[number].groups}
        around = {name for name in around if (node, name) in self._kept and not self._update(node, name)}
        for name in around:
            self._kept.pop((node, name))
        for number, shift in self._universe.settle(node, index, self._followed).items():
            if shift is None:
                self._journals[number].forget()
            else:
                self._tell(number, node, shift)
        for name, rows in index.items():
            if (node, name) in self._kept and rows.ndim == 1:
                self._kept[node, name].value = self._kept[node, name].value[:, rows]
            else:
                self._kept.pop((node, name), None)

    def _tell(self, number: int, node: int, shift: Shift) -> None:
        """Write a node's move down for the others, and change its own gradients of the term's other axes."""
        term, share = self._problem.terms[number], float(self._problem.weights[node])
        change, dim = shift.after - shift.before, term.dim(shift.axis) - 1
        own = [axis for axis, name in enumerate(term.groups) if axis != shift.axis and (node, name) in self._kept]
        if own:
            mean = self._universe.means[number].index_select(dim, shift.units)
            others = mean.sub_(shift.after, alpha=share)
            for axis in own:
                contract(others, change, term.dim(axis) - 1, self._kept[node, term.groups[axis]].value)
        part = len(shift.units) / self._universe.means[number].shape[dim]
        self._journals[number].add(_Change(node, shift.axis, shift.units, change.mul_(share), part))
        for name in term.groups:
            if (node, name) in self._kept:
                self._kept[node, name].seen[number] = self._journals[number].end

    def _update(self, node: int, name: str) -> bool:
        """Change a gradient by what has moved since it was last seen; False where it has to be computed anew."""
        kept = self._kept.get((node, name))
        if kept is None or self._universe.places[node]:
            return False
        todo, work, whole = [], 0.0, 0
        for number, seen in kept.seen.items():
            product = self._problem.terms[number].value[0].numel() * len(kept.value)
            changes = self._journals[number].since(seen)
            if changes is None:
                return False
            others = [change for change in changes if change.node != node]
            todo += [(number, change) for change in others]
            work += sum(product * change.share + self._call for change in others)
            whole += product
        kept.changes += len(todo)
        if work > _WORTH * whole or kept.changes > _CHANGES:
            return False
        for number, change in todo:
            _add(self._problem.terms[number], node, name, change, kept.value)
        kept.seen = {number: self._journals[number].end for number in kept.seen}
        return True


def _add(term: Term, node: int, name: str, change: _Change, into: Tensor) -> None:
    """Add what a change of the others' sum makes of a node's gradient."""
    own, moved = term.value[node], term.dim(change.axis) - 1
    for axis, group in enumerate(term.groups):
        if group != name:
            continue
        if axis == change.axis:
            left, right = (tensor.movedim(moved, 0).flatten(1) for tensor in (change.weighted, own))
            into.index_add_(0, change.units, left @ right.T)
        else:
            contract(change.weighted, own.index_select(moved, change.units), term.dim(axis) - 1, into)


def _worth_keeping(problem: Problem) -> set[str]:
    """Groups whose products take long beside a change; none where the gradients would take too much memory."""
    numels = [term.value[0].numel() for term in problem.terms]
    sizes = {name: group.size for name, group in problem.spec.groups.items()}
    products = {name: size * sum(numels[number] for number in problem.touched([name])) for name, size in sizes.items()}
    large = {name for name, product in products.items() if product > _LARGE * _faster(problem)}
    memory = problem.count * sum(sizes[name] ** 2 for name in large)
    return large if memory <= _MODELS * sum(numels) else set()


def _faster(problem: Problem) -> int:
    """How many multiplications take as long as one of a thread of the CPU."""
    return 1 if problem.like.device.type == "cpu" else _FASTER
